package file

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"unicode"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
	"github.com/pillion-project/pillion/redirect/upstream/discover/spelling"
)

// maxZone is how many bytes the name of a zone may have, as a label's value in
// Kubernetes.
const maxZone = 63

// interpreter turns nodes into endpoints.
type interpreter struct {
	*problems
	all   []discover.Endpoint
	first map[netip.AddrPort]listed
}

// listed is where an address stands, and what was said of it.
type listed struct {
	index int
	at    position
}

// interpret returns the endpoints of a whole file, sorted.
func interpret(p *problems, root *node) []discover.Endpoint {
	r := &interpreter{problems: p, first: make(map[netip.AddrPort]listed)}
	switch {
	case root == nil || root.kind == isNull:
		p.add(position{1, 1}, "empty: want a list, and [] for no endpoints at all")
	case root.kind != isList:
		p.add(root.at, "this is %s: want a list of endpoints, or of {targets: [...], labels: {...}}", root.kind)
	default:
		for _, item := range root.items {
			r.item(item)
		}
	}
	discover.Sort(r.all)
	return r.all
}

// item reads an address, an endpoint or a group of targets.
func (r *interpreter) item(n *node) {
	if n.kind != isMapping {
		r.endpoint(n, 1, "")
		return
	}
	_, grouped := n.member("targets")
	_, labeled := n.member("labels")
	_, single := n.member("address")
	switch {
	case grouped && single:
		r.add(n.at, "both targets and address: want {targets, labels} or {address, weight, zone}")
	case grouped || labeled:
		r.group(n)
	default:
		r.single(n)
	}
}

// single reads {address, weight, zone}.
func (r *interpreter) single(n *node) {
	weight, zone := uint32(1), ""
	var address *node
	for _, m := range r.members(n) {
		switch m.key {
		case "address":
			address = m.value
		case "weight":
			if m.value.kind == isText {
				r.add(m.value.at, "weight: this is text: want a number from 1 to %d, without quotes", discover.MaxWeight)
				continue
			}
			weight = r.weight(m)
		case "zone":
			zone = r.zone(m)
		default:
			r.add(m.at, "unknown key %s, %s", spelling.Show(m.key), spelling.Meant(m.key, []string{"address", "weight", "zone", "targets", "labels"}))
		}
	}
	switch {
	case address != nil:
		r.endpoint(address, weight, zone)
	case len(n.members) == 0:
		r.add(n.at, "no address: want {address: ADDR:PORT}")
	default:
		r.add(n.at, "no address: want {address: ADDR:PORT}, or {targets: [...]}")
	}
}

// group reads {targets, labels} of Prometheus.
func (r *interpreter) group(n *node) {
	var targets *node
	weight, zone := uint32(1), ""
	for _, m := range r.members(n) {
		switch m.key {
		case "targets":
			targets = m.value
		case "labels":
			weight, zone = r.labels(m.value)
		default:
			r.add(m.at, "unknown key %s, %s", spelling.Show(m.key), spelling.Meant(m.key, []string{"targets", "labels"}))
		}
	}
	switch {
	case targets == nil:
		r.add(n.at, "labels without targets: want {targets: [ADDR:PORT], labels: {...}}")
	case targets.kind != isList:
		r.add(targets.at, "targets: this is %s: want a list of ADDR:PORT", targets.kind)
	default:
		for _, t := range targets.items {
			r.endpoint(t, weight, zone)
		}
	}
}

// labels reads the labels that mean something here. The others are for whoever
// else reads the file. Prometheus drops labels that begin with __, so one file
// may say what is meant for us only; where both forms are, that one counts.
func (r *interpreter) labels(n *node) (weight uint32, zone string) {
	weight = 1
	if n.kind == isNull {
		return weight, ""
	}
	if n.kind != isMapping {
		r.add(n.at, "labels: this is %s: want a mapping", n.kind)
		return weight, ""
	}
	chosen := make(map[string]member)
	for _, m := range r.members(n) {
		switch m.value.kind {
		case isList, isMapping, isNull:
			r.add(m.value.at, "label %s: this is %s: want text", spelling.Show(m.key), m.value.kind)
			continue
		default:
		}
		switch m.key {
		case "__weight__", "__zone__":
			chosen[strings.Trim(m.key, "_")] = m
		case "weight", "zone":
			if _, ok := chosen[m.key]; !ok {
				chosen[m.key] = m
			}
		default:
		}
	}
	if m, ok := chosen["weight"]; ok {
		weight = r.weight(m)
	}
	if m, ok := chosen["zone"]; ok {
		zone = r.zone(m)
	}
	return weight, zone
}

func (r *interpreter) weight(m member) uint32 {
	w, err := strconv.Atoi(m.value.text)
	switch {
	case m.value.kind != isText && m.value.kind != isNumber:
		r.add(m.value.at, "%s: this is %s: want a number from 1 to %d", m.key, m.value.kind, discover.MaxWeight)
	case err == nil && w == 0:
		r.add(m.value.at, "%s: 0: want 1 to %d, and leave out an endpoint that is to get nothing", m.key, discover.MaxWeight)
	case err != nil || w < 1 || w > discover.MaxWeight || strconv.Itoa(w) != m.value.text:
		r.add(m.value.at, "%s: %s: want a number from 1 to %d", m.key, spelling.Show(m.value.text), discover.MaxWeight)
	default:
		return uint32(w)
	}
	return 1
}

func (r *interpreter) zone(m member) string {
	z := m.value.text
	unprintable := func(c rune) bool { return !unicode.IsPrint(c) }
	switch {
	case m.value.kind != isText && m.value.kind != isNumber:
		r.add(m.value.at, "%s: this is %s: want text", m.key, m.value.kind)
	case len(z) > maxZone || strings.ContainsFunc(z, unprintable):
		r.add(m.value.at, "%s: %s: want at most %d printable characters", m.key, spelling.Show(z), maxZone)
	default:
		return z
	}
	return ""
}

// endpoint takes the address that n is.
func (r *interpreter) endpoint(n *node, weight uint32, zone string) {
	switch n.kind {
	case isText, isNumber:
	case isNull:
		r.add(n.at, "empty: want ADDR:PORT")
		return
	case isList:
		r.add(n.at, "this is a list: want ADDR:PORT (in quotes if it begins with [)")
		return
	default:
		r.add(n.at, "this is %s: want ADDR:PORT", n.kind)
		return
	}
	if addr, weight, ok := strings.Cut(n.text, "*"); ok {
		r.add(n.at, "%s: want {address: %s, weight: %s}", spelling.Show(n.text), addr, weight)
		return
	}
	addr, err := parseAddrPort(n.text)
	if err != nil {
		r.add(n.at, "%s: %v", spelling.Show(n.text), err)
		return
	}
	e := discover.Endpoint{Addr: addr, Weight: weight, Zone: zone}
	first, twice := r.first[addr]
	switch {
	case !twice:
		r.first[addr] = listed{len(r.all), n.at}
		r.all = append(r.all, e)
	case r.all[first.index] != e:
		r.add(n.at, "%s is listed on line %d with another weight or zone: want it once", addr, first.at.line)
	default:
		// The same again, as two groups of Prometheus's may have it.
	}
}

func (n *node) member(key string) (*node, bool) {
	for _, m := range n.members {
		if m.key == key {
			return m.value, true
		}
	}
	return nil, false
}

// members returns the keys of n, each once.
func (r *interpreter) members(n *node) []member {
	lines := make(map[string]int)
	var once []member
	for _, m := range n.members {
		if first, twice := lines[m.key]; twice {
			r.add(m.at, "%s is given twice, first on line %d", spelling.Show(m.key), first)
			continue
		}
		lines[m.key] = m.at.line
		once = append(once, m)
	}
	return once
}

// interfaceName is a zone of an address; netip takes any text for one.
var interfaceName = regexp.MustCompile(`^[\w.-]{1,15}$`)

// parseAddrPort reads ADDR:PORT or [ADDR]:PORT and says what to write instead.
func parseAddrPort(s string) (netip.AddrPort, error) {
	host, port, err := spelling.SplitAddrPort(s)
	if err != nil {
		return netip.AddrPort{}, err
	}
	bare, bracketed := strings.CutPrefix(host, "[")
	bare = strings.TrimSuffix(bare, "]")
	a, err := netip.ParseAddr(bare)
	p, perr := strconv.ParseUint(port, 10, 16)
	switch {
	case err != nil:
		return netip.AddrPort{}, notAddress(bare)
	case bracketed != a.Is6():
		return netip.AddrPort{}, errors.New("brackets are for IPv6: want ADDR:PORT or [ADDR]:PORT")
	case a.Zone() != "" && !interfaceName.MatchString(a.Zone()):
		return netip.AddrPort{}, fmt.Errorf("zone %s: want the name of an interface", spelling.Show(a.Zone()))
	case perr != nil || p == 0 || strconv.FormatUint(p, 10) != port:
		return netip.AddrPort{}, fmt.Errorf("port %s: want 1 to 65535", spelling.Show(port))
	default:
	}
	if err := discover.CheckAddr(a); err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(p)), nil
}

// notAddress says why s is no IP address.
func notAddress(s string) error {
	isLetter := func(r rune) bool { return unicode.IsLetter(r) || r == '_' }
	if strings.ContainsFunc(s, isLetter) && !strings.ContainsAny(s, ":%[] \t\n") {
		return fmt.Errorf("%s is a name, and names in a file are not resolved: "+
			"want an IP address here, or a service whose endpoints come from dns", spelling.Show(s))
	}
	return fmt.Errorf("%s is not an IP address: want ADDR:PORT", spelling.Show(s))
}
