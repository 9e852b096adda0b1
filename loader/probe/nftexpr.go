package probe

import (
	"encoding/binary"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// registers is the size of an nftables rule's registers in bytes.
const registers = 64

// vm runs one rule for one packet. A byte of a register is known or it is not.
type vm struct {
	p     *packet
	b     [registers]byte
	known [registers]bool
	// slot marks the bytes that are the slot's address.
	slot [registers]bool
	out  outcome
}

// expr is one expression of a rule.
type expr func(*vm) truth

// nftRule is one rule of nftables.
type nftRule struct {
	handle uint64
	exprs  []expr
	sender bool
}

func (r *nftRule) String() string { return fmt.Sprintf("rule with handle %d", r.handle) }

func (r *nftRule) asksSender() bool { return r.sender }

func (r *nftRule) judge(p *packet) outcome {
	v := &vm{p: p}
	match := yes
	for _, e := range r.exprs {
		if match = min(match, e(v)); match == no {
			break
		}
	}
	v.out.match = match
	return v.out
}

// span turns a register's number into where its bytes are.
func span(reg uint32, size int) (at int, ok bool) {
	const perWord, perReg = 4, 16
	switch {
	case reg >= unix.NFT_REG_1 && reg <= unix.NFT_REG_4:
		at = int(reg-unix.NFT_REG_1) * perReg
	case reg >= unix.NFT_REG32_00 && reg <= unix.NFT_REG32_15:
		at = int(reg-unix.NFT_REG32_00) * perWord
	default:
		return 0, false
	}
	return at, size >= 0 && at+size <= registers
}

// store puts a known value into a register; nil leaves it unknown.
func (v *vm) store(reg uint32, value []byte) {
	at, ok := span(reg, len(value))
	if !ok {
		return
	}
	if value == nil {
		// How much would have been written is not known either.
		clear(v.known[at:min(at+16, registers)])
		return
	}
	copy(v.b[at:], value)
	for i := range value {
		v.known[at+i], v.slot[at+i] = true, false
	}
}

// forget makes every register unknown.
func (v *vm) forget() { clear(v.known[:]) }

// isKnown tells whether all bytes of a span are known.
func (v *vm) isKnown(at, size int) bool { return !slices.Contains(v.known[at:at+size], false) }

// isSlot tells whether a span has bytes of the slot's address.
func (v *vm) isSlot(at, size int) bool { return slices.Contains(v.slot[at:at+size], true) }

// exprAsksSender tells whether an expression looks at who sends.
func exprAsksSender(name string, a attrs) bool {
	switch name {
	case "meta":
		key := a.u32(unix.NFTA_META_KEY)
		return key == unix.NFT_META_SKUID || key == unix.NFT_META_SKGID || key == unix.NFT_META_CGROUP
	case "socket":
		const keyAttr, cgroupv2 = 1, 3
		return a.u32(keyAttr) == cgroupv2
	case "match":
		match := a.text(unix.NFTA_MATCH_NAME)
		return match == "owner" || match == "cgroup"
	}
	return false
}

func always(*vm) truth { return yes }

// strange is an expression that is not understood: it may match or not, and may
// have changed every register.
func strange(v *vm) truth {
	v.forget()
	return maybe
}

// perhaps is one that matches by something that only the moment knows.
func perhaps(*vm) truth { return maybe }

func ends(with verdict) expr {
	return func(v *vm) truth {
		v.out.verdict = with
		return yes
	}
}

// simple are the expressions without attributes that matter.
var simple = map[string]expr{
	"counter": always, "log": always, "notrack": always, "last": always, "dup": always, "secmark": always, "flow_offload": always, "tproxy": always,
	"limit": perhaps, "quota": perhaps, "connlimit": perhaps, "objref": perhaps, "dynset": perhaps,
	"reject": ends(drop), "nat": ends(accept), "masq": ends(accept), "redir": ends(accept),
	"queue": func(v *vm) truth {
		v.out.verdict = accept
		return maybe
	},
}

// compile turns an expression into a function. Those it does not know are
// strange, never an error.
func (r *nftReader) compile(family byte, table, name string, a attrs) (expr, error) {
	if e, ok := simple[name]; ok {
		return e, nil
	}
	switch name {
	case "immediate":
		return compileImmediate(a), nil
	case "meta":
		return compileMeta(a), nil
	case "payload":
		return compilePayload(a), nil
	case "ct":
		return compileCt(a), nil
	case "cmp":
		return compileCmp(a), nil
	case "range":
		return compileRange(a), nil
	case "bitwise":
		return compileBitwise(a), nil
	case "lookup":
		return r.compileLookup(family, table, a)
	case "match":
		if a.text(unix.NFTA_MATCH_NAME) == "comment" {
			return always, nil
		}
		return perhaps, nil
	case "target":
		return compileTarget(a.text(unix.NFTA_TARGET_NAME)), nil
	case "fib", "rt", "numgen", "hash", "byteorder":
		return func(v *vm) truth { v.forget(); return yes }, nil
	}
	return strange, nil
}

func compileImmediate(a attrs) expr {
	dreg := a.u32(unix.NFTA_IMMEDIATE_DREG)
	if dreg != unix.NFT_REG_VERDICT {
		value := a.value(unix.NFTA_IMMEDIATE_DATA)
		return func(v *vm) truth { v.store(dreg, value); return yes }
	}
	does, target := parseVerdict(a.nested(unix.NFTA_IMMEDIATE_DATA))
	return func(v *vm) truth {
		v.out.verdict, v.out.target = does, target
		return yes
	}
}

func compileMeta(a attrs) expr {
	if a.get(unix.NFTA_META_SREG) != nil {
		return always
	}
	dreg, key := a.u32(unix.NFTA_META_DREG), a.u32(unix.NFTA_META_KEY)
	return func(v *vm) truth { v.store(dreg, v.p.meta(key)); return yes }
}

// meta is what the kernel knows of the packet beside its bytes, or nil where
// that differs from packet to packet. lo has index 1 in every namespace.
func (p *packet) meta(key uint32) []byte {
	const lo, arphrdLoopback = 1, 772
	none := make([]byte, 16)
	in, out := p.inbound, !p.inbound
	switch key {
	case unix.NFT_META_L4PROTO:
		return []byte{unix.IPPROTO_TCP}
	case unix.NFT_META_NFPROTO:
		if p.v6 {
			return []byte{unix.NFPROTO_IPV6}
		}
		return []byte{unix.NFPROTO_IPV4}
	case unix.NFT_META_PROTOCOL:
		if p.v6 {
			return binary.BigEndian.AppendUint16(nil, unix.ETH_P_IPV6)
		}
		return binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP)
	case unix.NFT_META_IIFNAME, unix.NFT_META_OIFNAME:
		if in == (key == unix.NFT_META_IIFNAME) {
			return ifname()
		}
		return none
	case unix.NFT_META_IIF, unix.NFT_META_OIF:
		if in == (key == unix.NFT_META_IIF) {
			return native32(lo)
		}
		return none[:4]
	case unix.NFT_META_IIFTYPE, unix.NFT_META_OIFTYPE:
		if in && key == unix.NFT_META_IIFTYPE || out && key == unix.NFT_META_OIFTYPE {
			return binary.NativeEndian.AppendUint16(nil, arphrdLoopback)
		}
	}
	return nil
}

func compilePayload(a attrs) expr {
	if a.get(unix.NFTA_PAYLOAD_SREG) != nil {
		return always
	}
	dreg, base := a.u32(unix.NFTA_PAYLOAD_DREG), a.u32(unix.NFTA_PAYLOAD_BASE)
	from, size := int(a.u32(unix.NFTA_PAYLOAD_OFFSET)), int(a.u32(unix.NFTA_PAYLOAD_LEN))
	return func(v *vm) truth {
		at, ok := span(dreg, size)
		if !ok {
			return strange(v)
		}
		header, known := v.p.ip, v.p.knownIP
		if base == unix.NFT_PAYLOAD_TRANSPORT_HEADER {
			header, known = v.p.tcp, v.p.knownTCP
		}
		if base != unix.NFT_PAYLOAD_TRANSPORT_HEADER && base != unix.NFT_PAYLOAD_NETWORK_HEADER || from+size > len(header) {
			clear(v.known[at : at+size])
			return yes
		}
		copy(v.b[at:], header[from:from+size])
		copy(v.known[at:], known[from:from+size])
		clear(v.slot[at : at+size])
		if base == unix.NFT_PAYLOAD_NETWORK_HEADER {
			copy(v.slot[at:], v.p.slot[from:from+size])
		}
		return yes
	}
}

func compileCt(a attrs) expr {
	if a.get(unix.NFTA_CT_SREG) != nil {
		return always
	}
	dreg, key := a.u32(unix.NFTA_CT_DREG), a.u32(unix.NFTA_CT_KEY)
	return func(v *vm) truth {
		if key == unix.NFT_CT_STATE {
			v.store(dreg, native32(v.p.ctState))
		} else {
			v.store(dreg, nil)
		}
		return yes
	}
}

func compileCmp(a attrs) expr {
	sreg, op, data := a.u32(unix.NFTA_CMP_SREG), a.u32(unix.NFTA_CMP_OP), a.value(unix.NFTA_CMP_DATA)
	return func(v *vm) truth {
		at, ok := span(sreg, len(data))
		if !ok {
			return maybe
		}
		have, known := v.b[at:at+len(data)], v.known[at:at+len(data)]
		if op == unix.NFT_CMP_EQ || op == unix.NFT_CMP_NEQ {
			is := fits(data, have, known)
			if op == unix.NFT_CMP_NEQ {
				return is.not()
			}
			v.name(is, at, len(data))
			return is
		}
		if slices.Contains(known, false) {
			return maybe
		}
		is := no
		if compare(op, have, data) {
			is = yes
		}
		v.name(is, at, len(data))
		return is
	}
}

// name notes that a condition asked for the slot's address and got it, whatever
// else it asked for.
func (v *vm) name(is truth, at, size int) {
	if is != no && v.isSlot(at, size) {
		v.out.named = true
	}
}

func compileRange(a attrs) expr {
	sreg, op := a.u32(unix.NFTA_RANGE_SREG), a.u32(unix.NFTA_RANGE_OP)
	from, to := a.value(unix.NFTA_RANGE_FROM_DATA), a.value(unix.NFTA_RANGE_TO_DATA)
	return func(v *vm) truth {
		at, ok := span(sreg, len(from))
		if !ok || len(from) != len(to) || !v.isKnown(at, len(from)) {
			return maybe
		}
		have := v.b[at : at+len(from)]
		is := no
		if slices.Compare(from, have) <= 0 && slices.Compare(have, to) <= 0 {
			is = yes
		}
		if op == unix.NFT_RANGE_NEQ {
			return is.not()
		}
		v.name(is, at, len(from))
		return is
	}
}

// compileBitwise knows the mask-and-xor form; a byte that the mask clears is
// known whatever it was.
func compileBitwise(a attrs) expr {
	const opAttr = 6 // NFTA_BITWISE_OP: 0 is mask and xor
	sreg, dreg := a.u32(unix.NFTA_BITWISE_SREG), a.u32(unix.NFTA_BITWISE_DREG)
	mask, xor := a.value(unix.NFTA_BITWISE_MASK), a.value(unix.NFTA_BITWISE_XOR)
	if a.u32(opAttr) != 0 || len(mask) == 0 || len(mask) != len(xor) {
		return func(v *vm) truth { v.forget(); return yes }
	}
	return func(v *vm) truth {
		from, ok1 := span(sreg, len(mask))
		to, ok2 := span(dreg, len(mask))
		if !ok1 || !ok2 {
			return strange(v)
		}
		for i := range mask {
			v.b[to+i] = v.b[from+i]&mask[i] ^ xor[i]
			v.known[to+i] = v.known[from+i] || mask[i] == 0
			v.slot[to+i] = v.slot[from+i] && mask[i] != 0
		}
		return yes
	}
}

func (r *nftReader) compileLookup(family byte, table string, a attrs) (expr, error) {
	s, err := r.set(family, table, a.text(unix.NFTA_LOOKUP_SET))
	if err != nil {
		return nil, err
	}
	if s == nil {
		return strange, nil
	}
	sreg, dreg := a.u32(unix.NFTA_LOOKUP_SREG), a.u32(unix.NFTA_LOOKUP_DREG)
	toReg := a.get(unix.NFTA_LOOKUP_DREG) != nil && dreg != unix.NFT_REG_VERDICT
	inverted := a.u32(unix.NFTA_LOOKUP_FLAGS)&unix.NFT_LOOKUP_F_INV != 0
	return func(v *vm) truth {
		at, ok := span(sreg, s.keyLen)
		if !ok {
			return strange(v)
		}
		e, is := s.find(v.b[at:at+s.keyLen], v.known[at:at+s.keyLen])
		if toReg {
			v.store(dreg, nil)
		}
		if inverted {
			return is.not()
		}
		if is == yes || !s.opaque && !s.interval {
			v.name(is, at, s.keyLen)
		}
		if s.verdicts && is == yes {
			v.out.verdict, v.out.target = e.verdict, e.target
		} else if s.verdicts {
			// Which of the verdicts is open: it may accept.
			v.out.verdict = accept
		}
		return is
	}, nil
}

// harmless are the targets of iptables after which the next rule is asked.
var harmless = []string{
	"LOG", "NFLOG", "ULOG", "MARK", "CONNMARK", "CT", "NOTRACK", "TRACE", "SET", "CLASSIFY", "DSCP", "TOS",
	"TTL", "HL", "AUDIT", "CHECKSUM", "TCPMSS", "TEE", "CONNSECMARK", "SECMARK", "RATEEST", "LED", "IDLETIMER", "ECN",
}

// translating are those of its table nat.
var translating = []string{"DNAT", "SNAT", "MASQUERADE", "REDIRECT", "NETMAP"}

// compileTarget is for the rules that iptables keeps in nftables.
func compileTarget(name string) expr {
	does, is := targetVerdict(name)
	return func(v *vm) truth {
		v.out.verdict = does
		return is
	}
}

// targetVerdict is what an iptables target does. One that is not known may
// accept.
func targetVerdict(name string) (verdict, truth) {
	switch {
	case name == "DROP", name == "REJECT":
		return drop, yes
	case name == "ACCEPT":
		return accept, yes
	case name == "RETURN":
		return leave, yes
	case slices.Contains(harmless, name):
		return goOn, yes
	case slices.Contains(translating, name):
		return accept, yes
	}
	return accept, maybe
}
