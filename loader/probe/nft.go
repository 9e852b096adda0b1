package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// What linux/netfilter/nf_tables.h has and x/sys does not.
const (
	nftSetConcat    = 0x80
	nftElemCatchall = 2
	attrTypeMask    = 0x3fff
)

// nftReader reads the tables of this thread's network namespace over netlink,
// so that neither the nft command nor a writable anything is needed.
type nftReader struct {
	tables map[string]*table
	order  []*table
	sets   map[string]*nftSet
}

// readNft returns no tables when the kernel has no nf_tables. Asking it would
// load the module, which would be a change to the machine.
func (m *machine) readNft() ([]*table, error) {
	if !m.exists("/sys/module/nf_tables") {
		names, err := m.read("/proc/kallsyms")
		if err == nil && !strings.Contains(names, " nf_tables_newrule") {
			return nil, nil
		}
	}
	r := &nftReader{tables: map[string]*table{}, sets: map[string]*nftSet{}}
	steps := []struct {
		what string
		msg  int
		each func(family byte, a attrs) error
	}{
		{"tables", unix.NFT_MSG_GETTABLE, r.addTable},
		{"chains", unix.NFT_MSG_GETCHAIN, r.addChain},
		{"sets", unix.NFT_MSG_GETSET, r.addSet},
		{"rules", unix.NFT_MSG_GETRULE, r.addRule},
	}
	for _, s := range steps {
		if err := dump(s.msg, unix.NFPROTO_UNSPEC, nil, s.each); err != nil {
			if absent(err) {
				return nil, nil
			}
			return nil, fmt.Errorf("read nftables %s: %w", s.what, err)
		}
	}
	return r.order, nil
}

// absent tells whether the kernel answered that it has no nf_tables at all.
func absent(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EINVAL)
}

// dump asks for all objects of a kind.
func dump(msg int, family byte, with []*nl.RtAttr, each func(byte, attrs) error) error {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|msg, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	for _, a := range with {
		req.AddData(a)
	}
	answers, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return err
	}
	for _, b := range answers {
		if len(b) < nl.SizeofNfgenmsg {
			return errUnexpected
		}
		if err := each(b[0], parseAttrs(b[nl.SizeofNfgenmsg:])); err != nil {
			return err
		}
	}
	return nil
}

// attr is one netlink attribute.
type attr struct {
	typ  int
	data []byte
}

// attrs is a list of attributes, in the order of the message.
type attrs []attr

// parseAttrs stops at the first one that does not fit.
func parseAttrs(b []byte) attrs {
	const header, align = 4, 4
	var all attrs
	for len(b) >= header {
		size := int(binary.NativeEndian.Uint16(b))
		if size < header || size > len(b) {
			break
		}
		all = append(all, attr{int(binary.NativeEndian.Uint16(b[2:])) & attrTypeMask, b[header:size]})
		b = b[min(len(b), (size+align-1)&^(align-1)):]
	}
	return all
}

// get is nil for an attribute that is not there.
func (a attrs) get(typ int) []byte {
	for _, x := range a {
		if x.typ == typ {
			return x.data
		}
	}
	return nil
}

func (a attrs) nested(typ int) attrs { return parseAttrs(a.get(typ)) }

func (a attrs) text(typ int) string { return strings.TrimRight(string(a.get(typ)), "\x00") }

// u32 is 0 for an attribute that is not there, as in the kernel.
func (a attrs) u32(typ int) uint32 {
	if d := a.get(typ); len(d) >= 4 {
		return binary.BigEndian.Uint32(d)
	}
	return 0
}

// value reads a nested NFTA_DATA_VALUE.
func (a attrs) value(typ int) []byte { return a.nested(typ).get(unix.NFTA_DATA_VALUE) }

var familyNames = map[byte]string{unix.NFPROTO_INET: "inet", unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6"}

// addTable leaves out families that no slot packet meets, and dormant tables.
func (r *nftReader) addTable(family byte, a attrs) error {
	fam, ok := familyNames[family]
	if !ok || a.u32(unix.NFTA_TABLE_FLAGS)&unix.NFT_TABLE_F_DORMANT != 0 {
		return nil
	}
	t := &table{
		name: "table " + fam + " " + a.text(unix.NFTA_TABLE_NAME),
		v4:   family != unix.NFPROTO_IPV6, v6: family != unix.NFPROTO_IPV4,
		chains: map[string]*chain{},
	}
	r.tables[tableKey(family, a.text(unix.NFTA_TABLE_NAME))] = t
	r.order = append(r.order, t)
	return nil
}

func tableKey(family byte, name string) string { return string(family) + name }

func (r *nftReader) addChain(family byte, a attrs) error {
	t := r.tables[tableKey(family, a.text(unix.NFTA_CHAIN_TABLE))]
	if t == nil {
		return nil
	}
	c := &chain{name: "chain " + a.text(unix.NFTA_CHAIN_NAME)}
	if hook := a.nested(unix.NFTA_CHAIN_HOOK); hook != nil {
		c.base, c.hook = true, hook.u32(unix.NFTA_HOOK_HOOKNUM)
		c.drops = a.get(unix.NFTA_CHAIN_POLICY) != nil && a.u32(unix.NFTA_CHAIN_POLICY) == 0
	}
	t.chains[a.text(unix.NFTA_CHAIN_NAME)] = c
	t.order = append(t.order, c)
	return nil
}

func (r *nftReader) addRule(family byte, a attrs) error {
	tableName := a.text(unix.NFTA_RULE_TABLE)
	t := r.tables[tableKey(family, tableName)]
	if t == nil {
		return nil
	}
	c := t.chains[a.text(unix.NFTA_RULE_CHAIN)]
	if c == nil {
		// Added since the chains were read.
		return nil
	}
	rule := &nftRule{}
	if h := a.get(unix.NFTA_RULE_HANDLE); len(h) == 8 {
		rule.handle = binary.BigEndian.Uint64(h)
	}
	for _, e := range a.nested(unix.NFTA_RULE_EXPRESSIONS) {
		x := parseAttrs(e.data)
		exprName, data := x.text(unix.NFTA_EXPR_NAME), x.nested(unix.NFTA_EXPR_DATA)
		made, err := r.compile(family, tableName, exprName, data)
		if err != nil {
			return err
		}
		rule.exprs = append(rule.exprs, made)
		rule.sender = rule.sender || exprAsksSender(exprName, data)
	}
	c.rules = append(c.rules, rule)
	return nil
}

// nftSet is a set or map. Its elements are read when a rule uses it.
type nftSet struct {
	keyLen   int
	interval bool
	verdicts bool
	// opaque sets change by themselves, or have keys that are not understood.
	opaque bool
	read   bool
	elems  []nftElem
}

type nftElem struct {
	key      []byte
	end      bool // of an interval: the first key that is not in it
	catchall bool
	verdict  verdict
	target   string
}

func setKey(family byte, table, name string) string {
	return tableKey(family, table) + "\x00" + name
}

func (r *nftReader) addSet(family byte, a attrs) error {
	const verdictType = 0xffffff00
	flags := a.u32(unix.NFTA_SET_FLAGS)
	r.sets[setKey(family, a.text(unix.NFTA_SET_TABLE), a.text(unix.NFTA_SET_NAME))] = &nftSet{
		keyLen:   int(a.u32(unix.NFTA_SET_KEY_LEN)),
		interval: flags&unix.NFT_SET_INTERVAL != 0,
		verdicts: flags&unix.NFT_SET_MAP != 0 && a.u32(unix.NFTA_SET_DATA_TYPE) == verdictType,
		opaque:   flags&unix.NFT_SET_EVAL != 0 || flags&unix.NFT_SET_INTERVAL != 0 && flags&nftSetConcat != 0,
	}
	return nil
}

// set returns a set with its elements, or nil for one that is not known.
func (r *nftReader) set(family byte, table, name string) (*nftSet, error) {
	s := r.sets[setKey(family, table, name)]
	if s == nil || s.read || s.opaque {
		return s, nil
	}
	s.read = true
	with := []*nl.RtAttr{
		nl.NewRtAttr(unix.NFTA_SET_ELEM_LIST_TABLE, nl.ZeroTerminated(table)),
		nl.NewRtAttr(unix.NFTA_SET_ELEM_LIST_SET, nl.ZeroTerminated(name)),
	}
	if err := dump(unix.NFT_MSG_GETSETELEM, family, with, s.addElems); err != nil {
		return nil, fmt.Errorf("read elements of set %s: %w", name, err)
	}
	if s.interval {
		slices.SortStableFunc(s.elems, beforeElem)
	}
	return s, nil
}

// beforeElem sorts by key; where one interval ends and the next begins, the end
// comes first.
func beforeElem(a, b nftElem) int {
	if n := slices.Compare(a.key, b.key); n != 0 {
		return n
	}
	switch {
	case a.end == b.end:
		return 0
	case a.end:
		return -1
	}
	return 1
}

func (s *nftSet) addElems(_ byte, a attrs) error {
	for _, e := range a.nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS) {
		x := parseAttrs(e.data)
		flags := x.u32(unix.NFTA_SET_ELEM_FLAGS)
		elem := nftElem{
			key:      x.value(unix.NFTA_SET_ELEM_KEY),
			end:      flags&unix.NFT_SET_ELEM_INTERVAL_END != 0,
			catchall: flags&nftElemCatchall != 0,
		}
		if s.verdicts && !elem.end {
			elem.verdict, elem.target = parseVerdict(x.nested(unix.NFTA_SET_ELEM_DATA))
		}
		s.elems = append(s.elems, elem)
	}
	return nil
}

// find looks a key up of which only the known bytes count. elem is what was
// found when the answer is yes.
func (s *nftSet) find(key []byte, known []bool) (elem *nftElem, is truth) {
	if s.opaque {
		return nil, maybe
	}
	if s.interval {
		return s.findInterval(key, known)
	}
	is = no
	var other *nftElem
	for i := range s.elems {
		e := &s.elems[i]
		if e.catchall {
			other = e
			continue
		}
		switch fits(e.key, key, known) {
		case yes:
			return e, yes
		case maybe:
			is = maybe
		}
	}
	if is == no && other != nil {
		return other, yes
	}
	return nil, is
}

func (s *nftSet) findInterval(key []byte, known []bool) (*nftElem, truth) {
	if slices.Contains(known, false) {
		return nil, maybe
	}
	var in, other *nftElem
	for i := range s.elems {
		e := &s.elems[i]
		if e.catchall {
			other = e
			continue
		}
		if slices.Compare(e.key, key) > 0 {
			break
		}
		in = e
		if e.end {
			in = nil
		}
	}
	switch {
	case in != nil:
		return in, yes
	case other != nil:
		return other, yes
	}
	return nil, no
}

// fits compares the known bytes.
func fits(want, have []byte, known []bool) truth {
	if len(want) < len(have) {
		return maybe
	}
	all := yes
	for i := range have {
		if !known[i] {
			all = maybe
		} else if want[i] != have[i] {
			return no
		}
	}
	return all
}

// parseVerdict reads a nested data attribute that holds a verdict.
func parseVerdict(data attrs) (v verdict, target string) {
	const nfDrop, nfAccept = 0, 1
	a := data.nested(unix.NFTA_DATA_VERDICT)
	switch int32(a.u32(unix.NFTA_VERDICT_CODE)) {
	case nfDrop:
		if a.get(unix.NFTA_VERDICT_CODE) != nil {
			v = drop
		}
	case nfAccept:
		v = accept
	case unix.NFT_JUMP:
		v = jump
	case unix.NFT_GOTO:
		v = goTo
	case unix.NFT_RETURN:
		v = leave
	}
	return v, a.text(unix.NFTA_VERDICT_CHAIN)
}
