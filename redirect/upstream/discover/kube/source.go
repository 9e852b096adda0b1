package kube

import (
	"cmp"
	"context"
	"fmt"
	"hash/maphash"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
)

// source tells the endpoints of one port of a service.
type source struct {
	client *Client
	ref    Ref
}

// Run implements [discover.Source].
func (s *source) Run(ctx context.Context, out chan<- discover.Snapshot) error {
	return s.Follow(ctx, func(next discover.Snapshot) {
		select {
		case out <- next:
		case <-ctx.Done():
		}
	})
}

// Follow implements [discover.Follower].
func (s *source) Follow(ctx context.Context, tell func(discover.Snapshot)) error {
	if err := s.ref.check(); err != nil {
		return err
	}
	w := s.client.acquire(key{s.ref.Namespace, s.ref.Name})
	defer s.client.release(w)
	wakeups := make(chan struct{}, 1)
	// Somebody else's watches may know it all already. Filled before anybody else
	// can: there is room for one.
	wakeups <- struct{}{}
	w.subscribe(wakeups, false)
	defer w.unsubscribe(wakeups)
	var (
		seed     = maphash.MakeSeed()
		last     uint64
		failures uint64
		sent     bool
	)
	for {
		select {
		case <-wakeups:
		case <-ctx.Done():
			return nil
		}
		v, ok := w.view()
		if !ok {
			continue
		}
		next := discover.Snapshot{Err: v.err}
		if next.Err == nil {
			next.Endpoints, next.Err = s.client.endpoints(s.ref, v)
		}
		sum := digest(seed, next)
		if sent && v.failures == failures && sum == last {
			continue
		}
		if tell(next); ctx.Err() != nil {
			return nil
		}
		last, failures, sent = sum, v.failures, true
	}
}

// digest stands for a snapshot that was sent: the snapshot itself is the
// receiver's, and a copy would double what a service takes. Of two that differ,
// one in 2^64 goes unnoticed until the next change.
func digest(seed maphash.Seed, s discover.Snapshot) uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	maphash.WriteComparable(&h, s.Err == nil)
	if s.Err != nil {
		h.WriteString(s.Err.Error())
	}
	for _, e := range s.Endpoints {
		maphash.WriteComparable(&h, e)
	}
	return h.Sum64()
}

// check says why a service cannot be served, or nil. kube-proxy would drop what
// asks for endpoints on its own node; which one that is, is not known here.
func (c *Client) check(s *service) error {
	switch {
	case s.external:
		return fmt.Errorf("service %s: an ExternalName has no endpoints: DNS knows them", s.key)
	case s.local && c.node == "":
		return fmt.Errorf("service %s: internalTrafficPolicy is Local, and the name of the node is not set", s.key)
	default:
		return nil
	}
}

// candidate is an endpoint that may be left out yet.
type candidate struct {
	addr netip.AddrPort
	zone string
	is   state
}

// endpoints returns those that kube-proxy would use, sorted by address. What is
// no answer is an error.
func (c *Client) endpoints(ref Ref, v view) ([]discover.Endpoint, error) {
	var local bool
	if v.service != nil {
		if err := c.check(v.service); err != nil {
			return nil, err
		}
		local = v.service.local
	}
	number, err := match(ref, v.service)
	if err != nil {
		return nil, err
	}
	var all []candidate
	zone := *c.zone.Load()
	for _, s := range v.slices {
		for i := range s.members {
			m := &s.members[i]
			n := number(s)
			if n == 0 || ref.Family != FamilyAny && familyOf(m.addr) != ref.Family {
				continue
			}
			all = append(all, candidate{netip.AddrPortFrom(m.addr, n), m.zone, m.sees(zone)})
		}
	}
	// An endpoint may be in two slices while it moves from one to the other. The
	// one in which it is ready counts.
	slices.SortFunc(all, func(a, b candidate) int {
		return cmp.Or(a.addr.Compare(b.addr), cmp.Compare(b.is&(ready|serving), a.is&(ready|serving)))
	})
	all = slices.CompactFunc(all, func(a, b candidate) bool { return a.addr == b.addr })
	use := usable(all, local)
	endpoints := make([]discover.Endpoint, 0, len(use))
	for _, u := range use {
		endpoints = append(endpoints, discover.Endpoint{Addr: u.addr, Weight: 1, Zone: u.zone})
	}
	return endpoints, nil
}

// match returns what tells the number that ref's port has in a slice, 0 if that
// slice has it not. A port of a Service and those of its slices have the same
// name; the number may be different in each slice.
func match(ref Ref, s *service) (func(*slice) uint16, error) {
	wanted, err := strconv.ParseUint(ref.Port, 10, 16)
	numbered := err == nil
	byName := func(name string) func(*slice) uint16 {
		return func(s *slice) uint16 {
			for _, p := range s.ports {
				if p.name == name {
					return p.number
				}
			}
			return 0
		}
	}
	switch {
	case s == nil && (numbered || ref.Port == ""):
		return nil, fmt.Errorf("service %s/%s: not found, and only it knows its port's name", ref.Namespace, ref.Name)
	case s == nil:
		return byName(ref.Port), nil
	case ref.Port == "" && len(s.ports) == 1:
		return byName(s.ports[0].name), nil
	default:
	}
	for _, p := range s.ports {
		if numbered && p.number == uint16(wanted) || !numbered && ref.Port != "" && p.name == ref.Port {
			return byName(p.name), nil
		}
	}
	// The names of a headless service are those of its endpoints, to which one
	// connects at any port that they have.
	if numbered && len(s.addrs) == 0 {
		return func(*slice) uint16 { return uint16(wanted) }, nil
	}
	return nil, fmt.Errorf("service %s: no TCP port %q; it has %s", s.key, ref.Port, s.listPorts())
}

func (s *service) listPorts() string {
	if len(s.ports) == 0 {
		return "none"
	}
	ports := slices.Clone(s.ports)
	slices.SortFunc(ports, func(a, b port) int { return cmp.Compare(a.number, b.number) })
	var list []string
	for _, p := range ports {
		text := strconv.Itoa(int(p.number))
		if p.name != "" {
			text += " (" + p.name + ")"
		}
		list = append(list, text)
	}
	return strings.Join(list, ", ")
}

// usable does what kube-proxy's CategorizeEndpoints does: the ready endpoints,
// if there are none those that serve although they terminate. Of the ready ones,
// those that the hints give to this node or zone, if all have hints and some are
// given to it. A local service has those of the own node only.
func usable(all []candidate, local bool) []candidate {
	keep := func(from []candidate, want state) []candidate {
		var kept []candidate
		for _, c := range from {
			if c.is&want == want {
				kept = append(kept, c)
			}
		}
		return kept
	}
	if local {
		all = keep(all, onNode)
	}
	isReady := keep(all, ready)
	if len(isReady) == 0 {
		return keep(all, serving|terminating)
	}
	if local {
		return isReady
	}
	for _, hint := range []struct{ has, mine state }{{hasNodes, forNode}, {hasZones, forZone}} {
		mine := keep(isReady, hint.mine)
		if len(mine) > 0 && len(keep(isReady, hint.has)) == len(isReady) {
			return mine
		}
	}
	return isReady
}
