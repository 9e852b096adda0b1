package config

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/pillion-project/pillion/redirect/flow"
)

// Capability is something that a path can do and a cheaper one may not.
type Capability uint8

// The capabilities, in the order in which they are asked for.
const (
	CapBalance     Capability = iota // pick one of several endpoints
	CapHealth                        // mind which endpoints are well
	CapEnd                           // end connections to an endpoint that is gone
	CapOtherFamily                   // reach an endpoint of the family that the service is not of
	CapLinkLocal                     // reach an endpoint on a link, by its zone
	CapRetry                         // try another endpoint for the same connection
	CapIdleTimeout                   // end a connection on which no byte moves
	CapMaxLifetime                   // end a connection that is open for long
	CapEarly                         // end connect(2) before the dial has

	capabilityCount
)

var capabilityNames = [capabilityCount]string{
	"balance", "health", "end", "other_family", "link_local", "retry", "idle_timeout", "max_lifetime", "early",
}

// String returns the capability's name.
func (c Capability) String() string {
	if c < capabilityCount {
		return capabilityNames[c]
	}
	return fmt.Sprintf("capability(%d)", uint8(c))
}

// MarshalText implements encoding.TextMarshaler.
func (c Capability) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// ladder is the paths that a service can be on, cheapest first, with what each
// can do beyond the one before.
var ladder = []struct {
	path flow.Path
	adds []Capability
}{
	{flow.PathPass, nil},
	// The connect hook writes an address into the socket's own: one of its
	// family, and without a scope id, which it cannot write.
	{flow.PathDirect, []Capability{CapBalance, CapHealth, CapEnd}},
	{flow.PathRelay, []Capability{CapOtherFamily, CapLinkLocal, CapRetry, CapIdleTimeout, CapMaxLifetime, CapEarly}},
}

// can reports whether a path has a capability.
func can(path flow.Path, c Capability) bool { return cheapest(c) <= path }

// cheapest returns the first path that has a capability. The paths' own order is
// that of the ladder.
func cheapest(c Capability) flow.Path {
	for _, step := range ladder {
		if slices.Contains(step.adds, c) {
			return step.path
		}
	}
	return flow.PathRelay
}

// Need is one thing that a service asks of its path.
type Need struct {
	Capability Capability
	// Option is the key of the service that asks: attempts, endpoints[2].address.
	Option string
	// What says what is asked for, with its verb: 3 attempts need.
	What string
}

// Obstacle is why a service is not on a path that is cheaper than its own.
type Obstacle struct {
	// Path is the cheaper one.
	Path flow.Path `json:"path"`
	// Option is the path of the value that stands in the way, such as
	// services[0].attempts, and Where its place in the file, or empty.
	Option string `json:"option"`
	Where  string `json:"where,omitempty"`
	// Text is a sentence without its end: 3 attempts need path: relay.
	Text string `json:"text"`
}

// takes is the path that a service has, or asks for: unlike [Config.Asked], of one that
// stays as it was it is that which it had.
func (c *Config) takes(s *Service) PathChoice { return cmp.Or(s.Path, c.Path) }

// PathOf returns the path that the connections of a service take, which is
// PathPass, PathDirect or PathRelay, and all that it asks of one.
func (c *Config) PathOf(s *Service) (flow.Path, []Need) {
	needs := s.needs()
	switch c.takes(s) {
	case PathPass:
		return flow.PathPass, needs
	case PathDirect:
		return flow.PathDirect, needs
	case PathAuto:
		path := flow.PathPass
		for _, n := range needs {
			path = max(path, cheapest(n.Capability))
		}
		return path, needs
	default:
		return flow.PathRelay, needs
	}
}

// needs returns what the service asks of its path. What the section relay says is
// how the handler carries what it carries, and asks for nothing.
func (s *Service) needs() []Need {
	var all []Need
	add := func(when bool, c Capability, option, format string, args ...any) {
		if when {
			all = append(all, Need{c, option, fmt.Sprintf(format, args...)})
		}
	}
	add(len(s.Endpoints) > 0, CapBalance, "endpoints", "endpoints need")
	add(s.Discover != nil, CapBalance, "discover", "a source of endpoints needs")
	add(s.Policy != flow.Policies()[0], CapBalance, "policy", "policy: %s needs", s.Policy)
	add(s.NoEndpoint != "", CapBalance, "no_endpoint", "no_endpoint needs")
	add(s.Check != nil, CapHealth, "health_check", "health checks need")
	add(s.Health != (Health{}), CapHealth, "health", "the ejection of endpoints needs")
	add(s.OnRemove != OnRemoveKeep, CapEnd, "on_remove", "on_remove: %s needs", s.OnRemove)
	for i, e := range s.Endpoints {
		option := index("endpoints", i) + ".address"
		a := e.Addr.Addr().Unmap()
		other := a.IsValid() && s.Addr.IsValid() && a.Is4() != s.Addr.Addr().Unmap().Is4()
		add(other, CapOtherFamily, option, "%s, which is not of the service's family, needs", e.Addr)
		add(a.Zone() != "", CapLinkLocal, option, "%s, which is on a link, needs", e.Addr)
	}
	if d := s.Discover; d != nil && d.DNS != nil && s.Addr.IsValid() {
		t := d.DNS.Type
		add(t == DNSAddress || (t == DNSA || t == DNSAAAA) && t != ownFamily(s.Addr), CapOtherFamily,
			"discover.dns.type", "type: %s, for endpoints that are not of the service's family, needs", t)
	}
	add(s.Attempts > 1, CapRetry, "attempts", "%d attempts need", s.Attempts)
	add(positive(s.IdleTimeout), CapIdleTimeout, "idle_timeout", "an idle timeout needs")
	add(positive(s.MaxLifetime), CapMaxLifetime, "max_lifetime", "a longest lifetime needs")
	add(s.Connect == ConnectEarly, CapEarly, "connect", "connect: early needs")
	return all
}

// pathSaid are the places that say the path of the service at path.
func (s *Service) pathSaid(path string) []string {
	if s.Path != "" {
		return []string{path + ".path"}
	}
	return []string{path + ".path", "path"}
}

// path refuses what the service at path asks for and its path cannot do.
func (k *check) path(path string, c *Config, s *Service) {
	own, needs := c.PathOf(s)
	whose := "this service is on " + own.String()
	if s.Path == "" {
		whose = own.String() + " is the path of all services"
		if flag := c.at.flag("path"); flag != "" {
			whose += " (" + flag + ")" // the file may have another one
		}
	}
	for _, n := range needs {
		if !can(own, n.Capability) {
			k.addOn(s.pathSaid(path), path+"."+n.Option, "%s path: %s, %s", n.What, cheapest(n.Capability), whose)
		}
	}
}

// Why returns, for each path that is cheaper than the service's own, why it is
// not on that, cheapest first. The service is number n of the configuration's, or
// like one of them if that is negative.
func (c *Config) Why(n int, s *Service) []Obstacle {
	if s.kept != nil {
		c, s = &s.kept.config, &s.kept.service
	}
	own, needs := c.PathOf(s)
	at := "services[?]"
	if n >= 0 {
		at = index("services", n)
	}
	var all []Obstacle
	for _, step := range ladder {
		if step.path >= own {
			break
		}
		i := slices.IndexFunc(needs, func(n Need) bool { return !can(step.path, n.Capability) })
		if i < 0 {
			all = append(all, c.chosen(at, s, step.path))
			continue
		}
		all = append(all, Obstacle{
			Path: step.path, Option: at + "." + needs[i].Option, Where: s.Where(needs[i].Option),
			Text: fmt.Sprintf("%s path: %s", needs[i].What, cheapest(needs[i].Capability)),
		})
	}
	return all
}

// chosen is the obstacle that the user's own choice is to a path that could do
// it all.
func (c *Config) chosen(at string, s *Service, could flow.Path) Obstacle {
	o := Obstacle{Path: could, Option: at + ".path", Where: s.Where("path")}
	if s.Path == "" {
		o.Option, o.Where = "path", c.Where("path")
	}
	o.Text = fmt.Sprintf("path: %s is asked for, and path: auto would take %s", c.Asked(s), could)
	if o.Where == "" && s.Path == "" && c.Path == PathRelay {
		o.Text = fmt.Sprintf("path: relay is the default, and path: auto would take %s", could)
	}
	return o
}
