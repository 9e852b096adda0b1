package config

import (
	"cmp"
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
func (c *Config) Asked(s *Service) PathChoice { return cmp.Or(s.Path, c.Path) }
