package main

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"time"

	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/discover"
	"github.com/pillion-project/pillion/redirect/upstream/discover/kube"
)

// This file has what is left for the next process beside the maps, of what those do not
// say: sources may tell it nothing for a while.

// note is what is left.
type note struct {
	// Found are the services that nobody lists.
	Found []noted `json:"found,omitempty"`
	// Zones are those of the endpoints of services whose endpoints a source tells.
	Zones []notedZones `json:"zones,omitempty"`
	// Removals are what is to be ended still, the first first.
	Removals []notedRemoval `json:"removals,omitempty"`
	// Former are where services were before, which connections are known by; by name.
	Former map[string][]formerly `json:"former,omitempty"`
}

type noted struct {
	Name     string         `json:"name"`
	Addr     netip.AddrPort `json:"addr"`
	Affinity bool           `json:"affinity,omitempty"`
}

type notedZones struct {
	Addr  netip.AddrPort              `json:"addr"` // of the service
	Zones map[string][]netip.AddrPort `json:"zones"`
}

// notedRemoval is an endpoint whose connections are to be ended at a time of
// CLOCK_MONOTONIC, which was so far off when it was noted.
type notedRemoval struct {
	Service  string         `json:"service"`
	Addr     netip.AddrPort `json:"addr"`
	Endpoint netip.AddrPort `json:"endpoint"`
	At       int64          `json:"at_ns"`
	After    time.Duration  `json:"after_ns"`
}

// left is how long it takes still. The clock may be another one, in another namespace.
func (r *notedRemoval) left() time.Duration {
	return min(max(time.Duration(r.At-monotonicNow()), 0), r.After)
}

// zones are those of the endpoints of services, by the addresses of both.
type zones map[netip.AddrPort]map[netip.AddrPort]string

// noteOf is what services in force, and endpoints that are gone, leave.
func noteOf(services []service, removals []removal, former map[string][]formerly) *note {
	n := &note{Former: former}
	for _, r := range removals {
		n.Removals = append(n.Removals, notedRemoval{r.service, r.addr, r.endpoint, r.due, r.after})
	}
	for i := range services {
		s := &services[i]
		if s.found && s.known && s.Addr.IsValid() {
			n.Found = append(n.Found, noted{s.Name, s.Addr, s.Policy == flow.PolicyMaglev})
		}
		if s.Discover == nil {
			continue
		}
		in := map[string][]netip.AddrPort{}
		for _, e := range s.endpoints {
			if e.Zone != "" {
				in[e.Zone] = append(in[e.Zone], e.Addr)
			}
		}
		if len(in) > 0 {
			n.Zones = append(n.Zones, notedZones{s.Addr, in})
		}
	}
	return n
}

// text is the note as it is left: nil if it says nothing.
func (n *note) text() ([]byte, error) {
	if len(n.Found)+len(n.Zones)+len(n.Removals)+len(n.Former) == 0 {
		return nil, nil
	}
	text, err := json.Marshal(n)
	if err != nil || len(text) <= loader.NoteMax {
		return text, err
	}
	// What is long, and can be done without.
	less := *n
	switch {
	case n.Zones != nil:
		less.Zones = nil
	case len(n.Removals) > 0:
		less.Removals = n.Removals[:len(n.Removals)/2]
	default:
		return text, nil
	}
	return less.text()
}

// noteChanges leaves a note of the services in force, if it is another one than the
// last. What cannot be left is not tried again before there is something new: the
// next process then waits for its sources.
func (c *control) noteChanges() {
	now := c.listing()
	if c.unsettled || !c.inCharge || !c.removals.ends.changed.Swap(false) && now == c.notedFor {
		return
	}
	c.notedFor = now
	text, err := noteOf(c.list(), c.removals.all(), c.former).text()
	if err == nil && !bytes.Equal(text, c.noted) {
		err = c.i.datapath.Note(text)
	}
	if err != nil {
		c.i.log.Warn("cannot note for a restart which services were found, zones, and connections to end", "error", err)
		return
	}
	c.noted = text
}

// noteOfBefore reads what an earlier process noted. What it cannot read it does without.
func (c *control) noteOfBefore() *note {
	n := &note{}
	text, err := c.i.datapath.Noted()
	if err == nil && len(text) > 0 {
		err = json.Unmarshal(text, n)
	}
	if err != nil {
		c.i.log.Warn("cannot read which services an earlier process had found, zones, and connections to end", "error", err)
		return &note{}
	}
	c.noted = text
	return n
}

// recall takes up what an earlier process noted that sets are made of.
func (c *control) recall() error {
	if !c.i.datapath.Adopted() {
		return nil
	}
	n := c.noteOfBefore()
	if len(c.noted) == 0 {
		return nil
	}
	c.zones = n.zones()
	c.sources.recall(n.Found)
	// From the beginning, as if they had been there before.
	c.i.snapshot.Store(nil)
	return c.apply(c.inForce())
}

func (n *note) zones() zones {
	all := zones{}
	for _, s := range n.Zones {
		of := map[netip.AddrPort]string{}
		for zone, endpoints := range s.Zones {
			for _, e := range endpoints {
				of[e] = zone
			}
		}
		all[s.Addr] = of
	}
	return all
}

// of gives the endpoints of a service the zones that were noted.
func (z zones) of(service netip.AddrPort, endpoints []discover.Endpoint) {
	for i := range endpoints {
		endpoints[i].Zone = z[service][endpoints[i].Addr]
	}
}

// recall makes services found that were when another process ended.
func (s *sources) recall(found []noted) {
	if s.demand == nil || len(found) == 0 {
		return
	}
	all := make([]kube.Service, 0, len(found))
	for _, f := range found {
		all = append(all, kube.Service{Name: f.Name, Addr: f.Addr, Affinity: f.Affinity})
	}
	all = s.demand.Recall(all)
	s.mu.Lock()
	s.dynamic = all
	s.mu.Unlock()
}
