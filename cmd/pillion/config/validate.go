package config

import (
	"fmt"
	"net/netip"
	"slices"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/discover/spelling"
)

// What the kernel side has room for; a test compares them with its maps.
const (
	maxServices    = 65536
	maxRules       = 16384
	maxSlots       = 65536
	maxConnections = 262144
	maxWorkers     = 32
)

const (
	maxWeight    = 65535
	maxName      = 253 // bytes: as long as a name in DNS
	maxAttempts  = 8
	maxPort      = 65535
	maxThreshold = 1000
	maxFailures  = 65535 // the kernel side keeps 16 bits
)

// wantLimit is said of a time-out that is negative.
const wantLimit = "a positive duration, or 0 for none"

// slotRanges are the supernets of which every instance takes its slots.
var slotRanges = []netip.Prefix{
	netip.MustParsePrefix("240.0.0.0/10"),
	netip.MustParsePrefix("fd70:696c:6c69::/48"),
}

// What the kernel side leaves alone, as in bpf/include/decide.h.
var (
	loopback  = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}
	linkLocal = []netip.Prefix{netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10")}
	multicast = []netip.Prefix{
		netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("255.255.255.255/32"), netip.MustParsePrefix("ff00::/8"),
	}
)

// metadata are the addresses of is_metadata in bpf/include/decide.h.
var metadata = []netip.Addr{
	netip.MustParseAddr("169.254.169.254"),
	netip.MustParseAddr("169.254.170.2"),
	netip.MustParseAddr("168.63.129.16"),
	netip.MustParseAddr("100.100.100.200"),
	netip.MustParseAddr("fd00:ec2::254"),
	netip.MustParseAddr("fd00:ec2::23"),
	netip.MustParseAddr("fd20:ce::254"),
	netip.MustParseAddr("fd00:c1::a9fe:a9fe"),
	netip.MustParseAddr("fd00:42::42"),
}

// Validate reports everything in the configuration that makes no sense, in one
// error of which each line begins with the path of the value. It changes
// nothing and asks the system nothing.
func (c *Config) Validate() error { return joinPaths(c.problems()) }

// check gathers problems.
type check struct{ found []problem }

func (k *check) add(path, format string, args ...any) {
	k.found = append(k.found, problem{path: path, text: fmt.Sprintf(format, args...)})
}

// addOn is add for what goes by the values at other paths, too.
func (k *check) addOn(on []string, path, format string, args ...any) {
	k.found = append(k.found, problem{path: path, on: on, text: fmt.Sprintf(format, args...)})
}

// clash says that the value at path is at another path already.
func (k *check) clash(path, other, format string, args ...any) {
	k.found = append(k.found, problem{path: path, see: other, text: fmt.Sprintf(format, args...)})
}

func (k *check) number(path string, n, low, high int) {
	if n < low || n > high {
		k.add(path, "%d: want %d to %d", n, low, high)
	}
}

// oneWord says that the value at path is none of those known, unless it is one of
// also.
func oneWord[T ~string](k *check, path string, have T, known []T, also ...T) {
	if !slices.Contains(known, have) && !slices.Contains(also, have) {
		k.add(path, "%s: %s", spelling.Show(string(have)), spelling.Meant(string(have), known))
	}
}

func (c *Config) problems() []problem {
	k := &check{}
	k.services(c)
	k.rules("deny", c.Deny)
	k.rules("exclude", c.Exclude)
	if c.Default != flow.PathRelay && c.Default != flow.PathPass {
		k.add("default", "%s: want %s or %s", c.Default, flow.PathRelay, flow.PathPass)
	}
	oneWord(k, "path", c.Path, paths)
	k.text("zone", c.Zone)
	k.kubernetes(&c.Kubernetes)
	oneWord(k, "on_failure", c.OnFailure, onFailures)
	oneWord(k, "connect", c.Connect, connectModes)
	oneWord(k, "no_endpoint", c.NoEndpoint, noEndpoints)
	oneWord(k, "existing", c.Existing, existings)
	oneWord(k, "survive", c.Survive, survives)
	k.relay(c.Relay)
	if err := c.Health.Validate(); err != nil {
		for _, err := range split(err) {
			k.add("health", "%v", err)
		}
	}
	k.number("limits.slots_per_container", c.Limits.SlotsPerContainer, 1, maxSlots)
	k.number("limits.connections_per_container", c.Limits.ConnectionsPerContainer, 0, maxConnections)
	k.number("limits.connections", c.Limits.Connections, 1, maxConnections)
	k.text("flow_log", c.FlowLog)
	if c.Metrics != (netip.AddrPort{}) {
		k.listen("metrics", c.Metrics)
	}
	if c.Probes != (netip.AddrPort{}) {
		k.listen("probes", c.Probes)
		if c.Probes == c.Metrics {
			k.add("probes", "%s is taken by metrics", c.Probes)
		}
	}
	return k.found
}

func (k *check) services(c *Config) {
	services := c.Services
	if len(services) > maxServices {
		k.add("services", "%d services: the kernel side has room for %d", len(services), maxServices)
	} else {
		k.room(c)
	}
	addrs := make(map[netip.AddrPort]int, len(services))
	names := make(map[string]int, len(services))
	for i, s := range c.flagsFirst() {
		path := index("services", i)
		addr := unmap(s.Addr)
		first, taken := addrs[addr]
		switch {
		case !s.Addr.IsValid():
		case taken:
			k.clash(path+".address", index("services", first)+".address", "%s is the address of service %s already", addr, spelling.Show(services[first].Name))
		default:
			addrs[addr] = i
		}
		// A service without a name of its own clashes once.
		other, named := names[s.Name]
		switch {
		case s.Name == "" || named && taken && s.Name == addr.String():
		case named:
			k.clash(path+".name", index("services", other)+".name", "%s is the name of another service", spelling.Show(s.Name))
		default:
			names[s.Name] = i
		}
		k.service(path, c, s)
	}
}

func (k *check) name(path string, s Service) {
	switch {
	case s.Name == "" && s.Addr.IsValid():
		k.add(path, "empty")
	case len(s.Name) > maxName:
		k.add(path, "%s is %d bytes long: want at most %d", spelling.Show(s.Name), len(s.Name), maxName)
	default:
		k.text(path, s.Name)
	}
}

// text refuses what would spoil a line of a log or a listing.
func (k *check) text(path, s string) {
	unprintable := func(r rune) bool { return !unicode.IsPrint(r) }
	if !utf8.ValidString(s) || slices.ContainsFunc([]rune(s), unprintable) {
		k.add(path, "%s: want printable characters only", spelling.Show(s))
	}
}

// serviceAddr refuses the addresses that the kernel side leaves alone whatever
// the rules say: a service there would never see a connection.
func (k *check) serviceAddr(path string, a netip.AddrPort) {
	if !k.addrPort(path, a) {
		return
	}
	if kind := leftAlone(a.Addr().Unmap()); kind != "" {
		k.add(path, "%s is %s, which is never captured: want the address that applications connect to", a, kind)
	}
}

// leftAlone says what a is if the kernel side never captures it, else "".
func leftAlone(a netip.Addr) string {
	if a.Zone() != "" && !isSlot(a) {
		return "an address with a zone"
	}
	a = a.WithZone("")
	return rangeLeftAlone(netip.PrefixFrom(a, a.BitLen()))
}

// rangeLeftAlone says what every address in p is, as leftAlone does.
func rangeLeftAlone(p netip.Prefix) string {
	within := func(q netip.Prefix) bool { return q.Bits() <= p.Bits() && q.Contains(p.Addr()) }
	switch {
	case slices.ContainsFunc(slotRanges, within):
		return "a slot address of Pillion's own"
	case p.IsSingleIP() && slices.Contains(metadata, p.Addr()):
		return "a cloud provider's metadata service"
	case slices.ContainsFunc(loopback, within):
		return "a loopback address"
	case p.IsSingleIP() && p.Addr().IsUnspecified():
		return "the unspecified address"
	case slices.ContainsFunc(linkLocal, within):
		return "a link-local address"
	case slices.ContainsFunc(multicast, within):
		return "a multicast or broadcast address"
	default:
		return ""
	}
}

func (k *check) endpoints(path string, endpoints []Endpoint) {
	if n := len(endpoints); n > flow.SetEndpoints {
		k.add(path, "%d endpoints: want at most %d", n, flow.SetEndpoints)
		return
	}
	first := make(map[netip.AddrPort]int, len(endpoints))
	for i, e := range endpoints {
		path, other := index(path, i), path
		if e.Weight == 0 || e.Weight > maxWeight {
			k.add(path+".weight", "%d: want 1 to %d", e.Weight, maxWeight)
		}
		if !k.addrPort(path+".address", e.Addr) {
			continue
		}
		addr := unmap(e.Addr)
		if j, twice := first[addr]; twice {
			k.clash(path+".address", index(other, j)+".address", "%s is listed twice: give it a weight instead", addr)
			continue
		}
		first[addr] = i
		k.text(path+".zone", e.Zone)
		k.endpointAddr(path+".address", addr)
	}
}

// endpointAddr refuses what cannot be dialed, and what would come back to the
// handler.
func (k *check) endpointAddr(path string, addr netip.AddrPort) {
	switch a := addr.Addr(); {
	case isSlot(a):
		k.add(path, "%s is a slot address, where Pillion's own handler listens: a connection would go round for ever", addr)
	case a.IsUnspecified():
		k.add(path, "%s is the unspecified address: want the one that the endpoint is reached at", addr)
	case isMulticast(a):
		k.add(path, "%s is a multicast or broadcast address: TCP reaches none", addr)
	case a.Is6() && a.IsLinkLocalUnicast() && a.Zone() == "":
		k.add(path, "%s is a link-local address: want it with its zone, such as [%s%%eth0]:%d", addr, a, addr.Port())
	default:
	}
}

func (k *check) rules(path string, rules []Rule) {
	if len(rules) > maxRules {
		k.add(path, "%d rules: the kernel side has room for %d", len(rules), maxRules)
	}
	for i, r := range rules {
		switch {
		case !r.Prefix.IsValid():
			k.add(index(path, i), "no range of addresses")
		case r.Prefix != r.Prefix.Masked():
			k.add(index(path, i), "%s: host bits are set: want %s", r.Prefix, r.Prefix.Masked())
		case r.Prefix.Addr().Is4In6() && r.Prefix.Bits() >= 96:
			k.add(index(path, i), "%s: want the IPv4 range", r.Prefix)
		case path == "deny":
			// Who denies relies on it; to exclude what is left alone anyway does no harm.
			if kind := rangeLeftAlone(r.Prefix); kind != "" {
				k.add(index(path, i), "%s: connections to %s are never captured, whatever the rules say: leave it out", r.Prefix, kind)
			}
		default:
		}
	}
}

func (k *check) relay(r Relay) {
	k.number("relay.workers", r.Workers, 0, maxWorkers)
	k.number("relay.attempts", r.Attempts, 1, maxAttempts)
	for _, d := range []struct {
		path  string
		value time.Duration
		least time.Duration
		want  string
	}{
		{"relay.dial_timeout", r.DialTimeout, 1, "more than 0"},
		{"relay.dial_budget", r.DialBudget, 1, "more than 0"},
		{"relay.idle_timeout", r.IdleTimeout, 0, wantLimit},
		{"relay.max_lifetime", r.MaxLifetime, 0, wantLimit},
	} {
		if d.value < d.least {
			k.add(d.path, "%s: want %s", d.value, d.want)
		}
	}
}

// listen checks an address that Pillion itself binds.
func (k *check) listen(path string, a netip.AddrPort) {
	switch {
	case !k.addrPort(path, a):
	case isSlot(a.Addr().Unmap()):
		k.add(path, "%s is a slot address: nothing of it can be reached", a)
	case isMulticast(a.Addr().Unmap()):
		k.add(path, "%s is a multicast or broadcast address: want one of this host's, or 0.0.0.0 for all", a)
	default:
	}
}

// addrPort reports whether a is an address and a port.
func (k *check) addrPort(path string, a netip.AddrPort) bool {
	switch {
	case !a.IsValid():
		k.add(path, "missing, want ADDR:PORT")
		return false
	case a.Port() == 0:
		k.add(path, "%s: port 0: want 1 to 65535", a)
		return false
	default:
		return true
	}
}

func isSlot(a netip.Addr) bool {
	a = a.WithZone("")
	return slices.ContainsFunc(slotRanges, func(p netip.Prefix) bool { return p.Contains(a) })
}

func isMulticast(a netip.Addr) bool {
	a = a.WithZone("")
	return slices.ContainsFunc(multicast, func(p netip.Prefix) bool { return p.Contains(a) })
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

func index(path string, i int) string { return fmt.Sprintf("%s[%d]", path, i) }

// split undoes errors.Join, also of what was joined before.
func split(err error) []error {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	var all []error
	for _, err := range joined.Unwrap() {
		all = append(all, split(err)...)
	}
	return all
}
