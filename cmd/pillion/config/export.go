package config

import (
	"cmp"
	"fmt"
	"net/netip"
)

// NewService returns the service of a user who says nothing but its name and its
// address.
func NewService(name string, addr netip.AddrPort) Service {
	s := newService()
	s.Name, s.Addr = name, addr
	return s
}

// Asked returns the path that a service asks for, which may be PathAuto.
func (c *Config) Asked(s *Service) PathChoice {
	if s.kept != nil {
		c, s = &s.kept.config, &s.kept.service
	}
	return c.takes(s)
}

// Lines tells the changes, one a line.
func (c Changes) Lines() []string {
	all := []string{}
	line := func(what string, v Change) {
		text := fmt.Sprintf("%s%s: %s -> %s", what, v.Key, cmp.Or(v.Old, "none"), cmp.Or(v.New, "none"))
		if v.Restart {
			text += " (at the next start)"
		}
		all = append(all, text)
	}
	for _, s := range c.Services {
		name := "service " + s.Name
		if s.Kind != ServiceChanged {
			all = append(all, name+": "+string(s.Kind))
			continue
		}
		for _, f := range s.Fields {
			line(name+": ", f)
		}
		for _, e := range s.Added {
			all = append(all, name+": endpoint "+e.String()+" added")
		}
		for _, e := range s.Removed {
			all = append(all, name+": endpoint "+e.String()+" removed")
		}
	}
	for _, v := range c.Settings {
		line("", v)
	}
	return all
}
