package main

import (
	"net/netip"

	"github.com/pillion-project/pillion/cmd/pillion/config"
)

// listing finds services by name and by address: there may be thousands, each of which
// is looked for with every change.
type listing struct {
	services []service
	byName   map[string]int
	byAddr   map[netip.AddrPort]int
}

func listingOf(services []service) *listing {
	l := &listing{
		services: services,
		byName:   make(map[string]int, len(services)), byAddr: make(map[netip.AddrPort]int, len(services)),
	}
	for i := range services {
		first(l.byName, services[i].Name, i)
		first(l.byAddr, services[i].Addr, i)
	}
	return l
}

// first notes a place, unless one is noted already.
func first[K comparable](m map[K]int, key K, i int) {
	if _, ok := m[key]; !ok {
		m[key] = i
	}
}

// named returns the service of that name; nil: there is none.
func (l *listing) named(name string) *service {
	if l == nil {
		return nil
	}
	if i, ok := l.byName[name]; ok {
		return &l.services[i]
	}
	return nil
}

// at returns the service of that address; nil: there is none.
func (l *listing) at(addr netip.AddrPort) *service {
	if l == nil {
		return nil
	}
	if i, ok := l.byAddr[addr]; ok {
		return &l.services[i]
	}
	return nil
}

// same returns the service that s is: of its name, or else of its address; nil: there
// is none.
func (l *listing) same(s *service) *service {
	if is := l.named(s.Name); is != nil {
		return is
	}
	return l.at(s.Addr)
}

// said finds what a configuration says of services.
type said struct {
	config *config.Config
	byName map[string]int
	byAddr map[netip.AddrPort]int
}

func saidBy(c *config.Config) *said {
	s := &said{
		config: c,
		byName: make(map[string]int, len(c.Services)), byAddr: make(map[netip.AddrPort]int, len(c.Services)),
	}
	for i := range c.Services {
		first(s.byName, c.Services[i].Name, i)
		first(s.byAddr, c.Services[i].Addr, i)
	}
	return s
}

// lists tells whether the configuration has a service of that name or address.
func (s *said) lists(name string, addr netip.AddrPort) bool {
	_, named := s.byName[name]
	_, at := s.byAddr[addr]
	return named || at
}

// path is what the configuration says of the path of a service: the service in force
// has auto replaced by what it came to.
func (s *said) path(name string) config.PathChoice {
	if i, ok := s.byName[name]; ok {
		return s.config.Asked(&s.config.Services[i])
	}
	return s.config.Path // it was found
}

// why says, for each path that is cheaper than a service's own, why it is not on
// that, and where that stands.
func (s *said) why(v *config.Service) []string {
	// In force, a service has all that it takes from elsewhere, and so seems to
	// ask for what nobody asked for.
	i, ok := s.byName[v.Name]
	if ok {
		v = &s.config.Services[i]
	} else {
		i = -1
		found := config.NewService(v.Name, v.Addr)
		found.Discover, found.Policy, found.Hash = v.Discover, v.Policy, v.Hash
		v = &found
	}
	var all []string
	for _, o := range s.config.Why(i, v) {
		all = append(all, place(o.Path.String()+": "+o.Text, o.Where))
	}
	return all
}
