package probe

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// The packet filter is read and played through with the packets of a relayed
// connection: what leaves to a slot through lo, what comes in there, and the
// answers. Most rules can be decided for such a packet; what cannot (marks,
// owners, limits, ports) is carried on as a doubt.

// truth is the outcome of a condition. The order matters: the least wins where
// conditions are joined.
type truth int

const (
	no truth = iota
	maybe
	yes
)

// not keeps a doubt.
func (t truth) not() truth { return yes - t }

// verdict is what a rule does.
type verdict int

const (
	goOn verdict = iota
	accept
	drop
	jump
	goTo
	leave
)

// packet is one packet of a relayed connection at one hook.
type packet struct {
	name string
	v6   bool
	hook uint32 // NF_INET_*
	src  netip.Addr
	dst  netip.Addr
	// ip and tcp are headers; known marks the bytes that every such packet
	// has, slot those that are the slot's address.
	ip, tcp           []byte
	knownIP, knownTCP []bool
	slot              []bool
	ctState           uint32
	inbound           bool
}

// outcome is what a rule says of a packet.
type outcome struct {
	match truth
	// named tells that the rule asked for the slot's address: it is meant.
	named   bool
	verdict verdict
	target  string
}

// rule is one rule of a chain.
type rule interface {
	judge(p *packet) outcome
	// asksSender tells whether it looks at the user, group or cgroup of
	// who sends: for an upstream dial of the handler that is Pillion.
	asksSender() bool
	// String says which one it is, for a person.
	String() string
}

// chain is a list of rules; base tells that the kernel calls it.
type chain struct {
	name  string
	base  bool
	hook  uint32
	drops bool // the policy
	rules []rule
}

// table is a set of chains that call each other.
type table struct {
	// name begins with the family.
	name string
	// v4 and v6 tell which packets it sees.
	v4, v6 bool
	chains map[string]*chain
	// order is that of the chains in the kernel.
	order []*chain
}

// hit is a place where packets of slots end.
type hit struct {
	where  string
	packet string
	// certain is false when it depends on what could not be judged.
	certain bool
}

// walk plays one packet through one base chain.
type walk struct {
	table *table
	p     *packet
	hits  []hit
	// doubt: something before may have accepted the packet.
	doubt bool
	// unsure: the chain was entered by a rule that may not match.
	unsure int
}

// maxDepth is the kernel's own limit of chains that call chains.
const maxDepth = 16

func (w *walk) run(c *chain) {
	v := w.chain(c, 0)
	if v == goOn && c.drops {
		w.hit(fmt.Sprintf("policy drop of %s %s", w.table.name, c.name), !w.doubt)
	}
}

func (w *walk) hit(where string, certain bool) {
	w.hits = append(w.hits, hit{where, w.p.name, certain && w.unsure == 0})
}

// chain returns accept or drop when the packet ends here, else goOn.
func (w *walk) chain(c *chain, depth int) verdict {
	if c == nil || depth > maxDepth {
		w.doubt = true
		return goOn
	}
	for _, r := range c.rules {
		o := r.judge(w.p)
		if o.match == no {
			continue
		}
		sure := o.match == yes
		switch o.verdict {
		case goOn:
		case drop:
			if sure && w.unsure == 0 || o.named {
				w.hit(fmt.Sprintf("%s %s, %s", w.table.name, c.name, r), sure && !w.doubt)
			}
			if sure {
				return drop
			}
		case accept, leave:
			if sure {
				if o.verdict == leave {
					return goOn
				}
				return accept
			}
			w.doubt = true
		case jump, goTo:
			v := w.call(o, depth)
			if sure && (v != goOn || o.verdict == goTo) {
				return v
			}
		}
	}
	return goOn
}

// call enters another chain, in doubt if the rule may not match.
func (w *walk) call(o outcome, depth int) verdict {
	if o.match == yes {
		return w.chain(w.table.chains[o.target], depth+1)
	}
	w.unsure++
	v := w.chain(w.table.chains[o.target], depth+1)
	w.unsure--
	if v == accept || o.verdict == goTo {
		w.doubt = true
	}
	return v
}

// play sends every packet through every base chain that sees it.
func play(tables []*table) []hit {
	var all []hit
	for _, t := range tables {
		for _, c := range t.order {
			if !c.base {
				continue
			}
			for _, p := range packets() {
				if p.hook != c.hook || p.v6 && !t.v6 || !p.v6 && !t.v4 {
					continue
				}
				w := &walk{table: t, p: p}
				w.run(c)
				all = append(all, w.hits...)
			}
		}
	}
	return all
}

// packets are the SYN and its answer at each hook that they pass, for slots at
// the ends and in the middle of the range.
func packets() []*packet {
	slots := []string{"240.0.0.5", "240.31.0.5", "240.63.255.5", "fd70:696c:6c69::5"}
	hooks := []uint32{unix.NF_INET_LOCAL_OUT, unix.NF_INET_POST_ROUTING, unix.NF_INET_PRE_ROUTING, unix.NF_INET_LOCAL_IN}
	var all []*packet
	for _, s := range slots {
		for _, h := range hooks {
			all = append(all, newPacket(netip.MustParseAddr(s), h, false), newPacket(netip.MustParseAddr(s), h, true))
		}
	}
	return all
}

// newPacket builds the SYN to a slot, or the answer from it.
func newPacket(slot netip.Addr, hook uint32, answer bool) *packet {
	const (
		ctEstablished = 2
		ctNew         = 8
		flagsAt       = 13
		syn, ack      = 0x02, 0x10
	)
	p := &packet{
		v6: slot.Is6(), hook: hook, dst: slot, ctState: ctNew,
		inbound: hook == unix.NF_INET_PRE_ROUTING || hook == unix.NF_INET_LOCAL_IN,
		tcp:     make([]byte, 20), knownTCP: make([]bool, 20),
		name: "to " + supernetOf(slot),
	}
	at := p.fillIP()
	from, to := at+slot.BitLen()/8, at+slot.BitLen()/4
	p.tcp[flagsAt], p.knownTCP[flagsAt] = syn, true
	if answer {
		p.name, p.ctState = "from "+supernetOf(slot), ctEstablished
		p.src, p.dst = slot, netip.Addr{}
		p.tcp[flagsAt] = syn | ack
		from, to = at, from
	}
	copy(p.ip[from:to], slot.AsSlice())
	for i := from; i < to; i++ {
		p.knownIP[i], p.slot[i] = true, true
	}
	return p
}

// fillIP makes the header without its addresses, and returns where the source
// begins.
func (p *packet) fillIP() int {
	size, at, proto := 20, 12, 9
	if p.v6 {
		size, at, proto = 40, 8, 6
	}
	p.ip, p.knownIP, p.slot = make([]byte, size), make([]bool, size), make([]bool, size)
	p.ip[0], p.knownIP[0] = 0x45, true
	if p.v6 {
		// The low half is the traffic class.
		p.ip[0], p.knownIP[0] = 0x60, false
	}
	p.ip[proto], p.knownIP[proto] = unix.IPPROTO_TCP, true
	return at
}

func supernetOf(a netip.Addr) string {
	if a.Is4() {
		return super4.String()
	}
	return super6.String()
}

func checkFirewall(ctx context.Context, m *machine) []Finding {
	const name = "packet filter"
	tables, err := m.readNft()
	if err != nil {
		if denied(err) {
			return []Finding{warning(name, capsCure, "not checked: %v", err)}
		}
		return []Finding{warning(name, "look for rules that drop "+super4.String()+" or "+super6.String(), "not checked: %s", short(err))}
	}
	legacy, problems := m.readLegacy(ctx)
	tables = append(tables, legacy...)
	found := append(judgeHits(play(tables)), judgeSenders(tables)...)
	if len(found) == 0 && len(problems) == 0 {
		return []Finding{good(name, "no rule in the way of slots (%d tables)", len(tables))}
	}
	return append(found, problems...)
}

// judgeHits gives one finding for each place, the certain ones first.
func judgeHits(hits []hit) []Finding {
	const name = "packet filter"
	merged := map[string]*hit{}
	var order []*hit
	for _, h := range hits {
		key := h.where + "\x00" + h.packet
		if have := merged[key]; have != nil {
			have.certain = have.certain || h.certain
			continue
		}
		merged[key] = &h
		order = append(order, &h)
	}
	slices.SortStableFunc(order, func(a, b *hit) int {
		if a.certain == b.certain {
			return 0
		}
		if a.certain {
			return -1
		}
		return 1
	})
	cure := "before it, accept what goes over lo (nft: oifname lo accept, iifname lo accept), or at least " + super4.String() + " and " + super6.String()
	var found []Finding
	for _, h := range order {
		if h.certain {
			found = append(found, failure(name, cure, "%s drops packets %s: relayed connections would time out", h.where, h.packet))
		} else {
			found = append(found, warning(name, cure, "%s may drop packets %s", h.where, h.packet))
		}
	}
	return found
}

// judgeSenders reports rules that an application escapes on the path relay.
func judgeSenders(tables []*table) []Finding {
	var rules []string
	for _, t := range tables {
		for _, c := range t.order {
			for _, r := range c.rules {
				if r.asksSender() {
					rules = append(rules, fmt.Sprintf("%s %s, %s", t.name, c.name, r))
				}
			}
		}
	}
	if len(rules) == 0 {
		return nil
	}
	return []Finding{warning("packet filter by sender", "use path direct or pass for what these rules are about, or add the same for Pillion's user and cgroup",
		"they ask for the user or cgroup of the sender, which for relayed connections is Pillion and not the application: %s", listed(rules))}
}

// errUnexpected is what a table that cannot be read as documented gives.
var errUnexpected = errors.New("unexpected layout")

// ifname is how the kernel keeps the name of lo in a register.
func ifname() []byte { return append([]byte("lo"), make([]byte, 14)...) }

func native32(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }

// compare applies an nftables comparison to two values of one length.
func compare(op uint32, a, b []byte) bool {
	n := bytes.Compare(a, b)
	switch op {
	case unix.NFT_CMP_EQ:
		return n == 0
	case unix.NFT_CMP_NEQ:
		return n != 0
	case unix.NFT_CMP_LT:
		return n < 0
	case unix.NFT_CMP_LTE:
		return n <= 0
	case unix.NFT_CMP_GT:
		return n > 0
	}
	return n >= 0
}
