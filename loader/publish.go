package loader

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

// proposal is a set that a service is to have. Nil: none is to be published.
type proposal struct {
	service netip.AddrPort
	set     *flow.Set
}

// RoomError tells for which services there was no room: the set of each stays what it
// was, if it had one, and all the others are in force. Of each it says whether it is
// [ErrTooManySets] or [ErrTooManyEndpoints].
type RoomError struct {
	Services map[netip.AddrPort]error
}

// Error implements error.
func (e *RoomError) Error() string {
	errs := slices.Collect(maps.Values(e.Services))
	return fmt.Sprintf("no room for the endpoints of %d services, such as %s", len(errs), errs[0])
}

// Unwrap returns why, of each.
func (e *RoomError) Unwrap() []error { return slices.Collect(maps.Values(e.Services)) }

// publishing is one round of publishing.
type publishing struct {
	*setTable
	changes []change
	// What differs only in what is written in place.
	rewrites []change
	// What has an index, and another name.
	renamed  []uint32
	newNames []bpf.EndpointName
	// For what there is no room, and why.
	lacking map[netip.AddrPort]error
}

// publish makes sets the kernel's, [setsTogether] of them in one step, after everything
// is prepared. The services need not point to them yet. It returns those for which there
// is no room.
func (s *setTable) publish(sets []proposal) (map[netip.AddrPort]error, error) {
	p := &publishing{setTable: s, changes: make([]change, 0, len(sets)), lacking: map[netip.AddrPort]error{}}
	for _, v := range sets {
		if v.set == nil {
			continue
		}
		switch err := checkSet(v.service, v.set); {
		case errors.Is(err, ErrTooManyEndpoints):
			p.lacking[v.service] = err
		case err != nil:
			return nil, err
		}
	}
	s.round++
	for _, v := range sets {
		if v.set != nil && p.lacking[v.service] == nil {
			p.plan(v)
		}
	}
	return p.lacking, p.commit()
}

// plan notes what is to be done about the set of one service.
func (p *publishing) plan(v proposal) {
	own, err := p.take(v.service)
	switch {
	case err != nil:
		p.lacking[v.service] = err
	case own.set == v.set:
	case sameRows(own.set, v.set):
		p.rewrites = append(p.rewrites, change{own: own, set: v.set})
	default:
		p.changes = append(p.changes, change{own: own, set: v.set, before: own.endpoints})
	}
}

// commit carries the plan out. What fails is tried again with the next set.
func (p *publishing) commit() error {
	for n := range p.rewrites {
		if err := p.rewrite(&p.rewrites[n]); err != nil {
			return err
		}
	}
	if len(p.changes) == 0 {
		return nil
	}
	longest := 0
	for n := range p.changes {
		longest = max(longest, p.changes[n].rows())
	}
	for i := len(p.keys); i < longest; i++ {
		p.keys = append(p.keys, uint32(i))
	}
	together := setsTogether()
	var preparing sync.WaitGroup
	most := min(len(p.changes), together) // number takes out what there is no room for
	preparing.Go(func() { p.foresee(most) })
	err := p.number()
	if err == nil {
		err = p.rename()
	}
	p.renamed, p.newNames = p.renamed[:0], p.newNames[:0] // from here on those that are removed
	for part := range slices.Chunk(p.changes, together) {
		if err != nil {
			p.takeBack(part) // nobody has begun with these
			continue
		}
		err = p.replace(part, &preparing)
	}
	preparing.Wait()
	if err != nil {
		return err
	}
	return p.rename()
}

// rename writes names again. Who takes over sees by them what is in the last set.
func (p *publishing) rename() error {
	if len(p.renamed) == 0 {
		return nil
	}
	if _, err := p.table.names.BatchUpdate(p.renamed, p.newNames, nil); err != nil {
		return fmt.Errorf("rename %d endpoints: %w", len(p.renamed), err)
	}
	for n, i := range p.renamed {
		p.members[i].weight = p.newNames[n].Weight
	}
	return nil
}

// rewrite writes in place what differs.
func (p *publishing) rewrite(c *change) error {
	for _, e := range c.set.Endpoints {
		if i, ok := c.own.endpoints.find(unmapped(e.Addr)); ok {
			p.tellDown(i, e.Down)
		}
	}
	c.own.set = c.set
	return p.setSpill(c.own, c.set.Spill)
}

// tellDown writes what a set says of an endpoint's health, if it is not what the
// last one said: SetDown may have spoken since.
func (s *setTable) tellDown(i uint32, down bool) {
	m := &s.members[i]
	if !m.told || m.down != down {
		s.table.at(i).setDown(down)
	}
	m.told, m.down = true, down
}

// published notes that the kernel has a set, and appends the maps that are to be
// closed.
func (p *publishing) published(c *change, unused []*ebpf.Map) []*ebpf.Map {
	own, now := c.own, time.Now()
	if own.inner != nil {
		unused = append(unused, own.inner)
	}
	own.inner = nil
	if c.set.Policy == flow.PolicyRoundRobin || hasSpill(c.set) {
		own.inner = c.inner
	} else {
		unused = append(unused, c.inner)
	}
	own.set, own.spill = c.set, c.set.Spill
	if len(c.before) == 0 {
		return unused // all that there are are in the set
	}
	for _, e := range own.endpoints {
		if p.members[e.index].round == p.round {
			delete(p.out, e.index)
			continue
		}
		p.remove(own, e, now)
		if p.members[e.index].weight > 0 {
			p.renamed, p.newNames = append(p.renamed, e.index), append(p.newNames, nameOf(own.id, e.addr(), 0))
		}
	}
	return unused
}

// turn tells with whom a set goes on: one that is replaced often must not begin
// with the same endpoint every time.
func (own *serviceSet) turn() [2]uint32 {
	var row bpf.SetRow
	if own.inner == nil || own.inner.Lookup(uint32(rowState), &row) != nil {
		return [2]uint32{rand.Uint32(), rand.Uint32()}
	}
	return (*bpf.SetState)(unsafe.Pointer(&row)).Turn
}

func hasSpill(set *flow.Set) bool { return set.Tiers[0].Count > 0 && set.Tiers[1].Count > 0 }

// setSpill writes a share where it is. A set that has but one tier has none.
func (s *setTable) setSpill(own *serviceSet, spill uint32) error {
	if !hasSpill(own.set) || own.spill == spill {
		return nil
	}
	if err := own.inner.Put(uint32(rowConfig), toRow(setConfig(own.set, spill))); err != nil {
		return fmt.Errorf("write spill of service %s: %w", own.addr, err)
	}
	own.spill = spill
	return nil
}

// SetSpill changes, of 2^32, the share of a service's connections that go to its
// second tier, in place. It does nothing when a tier is empty, and fails with
// [ErrNoService] when the service has no set.
func (d *Datapath) SetSpill(service netip.AddrPort, spill uint32) error {
	s := &d.sets
	s.mu.Lock()
	defer s.mu.Unlock()
	own, err := s.find(service)
	if err != nil {
		return err
	}
	if own == nil || own.set == nil {
		return fmt.Errorf("service %s has no endpoint set: %w", service, ErrNoService)
	}
	return s.setSpill(own, spill)
}

// SetEndpoints replaces the sets of some services, many in one step of the kernel:
// a pick finds the old set of a service or its new one. A nil set takes a
// service's away. What is published already is not published again. Down of an
// endpoint is written where the set says otherwise than the last one, so that a set
// that was made before a SetDown takes nothing back. On [ErrNoService] or
// [ErrBadSet] nothing was changed; see [RoomError] for what there is no room for.
func (d *Datapath) SetEndpoints(sets map[netip.AddrPort]*flow.Set) error {
	s := &d.sets
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]proposal, 0, len(sets))
	for service, set := range sets {
		service = unmapped(service)
		if !s.services[service] {
			return fmt.Errorf("service %s: %w", service, ErrNoService)
		}
		all = append(all, proposal{service, set})
	}
	// So that it is always the same ones that there is no room for.
	slices.SortFunc(all, func(a, b proposal) int { return a.service.Compare(b.service) })
	lacking, err := s.publish(all)
	if err != nil {
		return err
	}
	var back, unused []*serviceSet
	point := make(map[bpf.EndpointKey]uint32, len(all))
	for _, v := range all {
		own := s.byAddr[v.service]
		switch {
		case own == nil || lacking[v.service] != nil || (v.set != nil) == own.gone.IsZero():
			// It points to its set, or to none, already.
		case v.set != nil:
			point[serviceKey(v.service)] = own.id
			back = append(back, own)
		default:
			point[serviceKey(v.service)] = noSet
			unused = append(unused, own)
		}
	}
	if err := d.pointTo(point); err != nil {
		return err
	}
	for _, own := range back {
		own.gone = time.Time{}
	}
	if err := s.drop(unused); err != nil {
		return err
	}
	if len(lacking) > 0 {
		return &RoomError{lacking}
	}
	return nil
}

// pointTo makes the entries of services name sets.
func (d *Datapath) pointTo(sets map[bpf.EndpointKey]uint32) error {
	d.servicesMu.Lock()
	defer d.servicesMu.Unlock()
	keys, values := make([]bpf.EndpointKey, 0, len(sets)), make([]bpf.Service, 0, len(sets))
	for key, id := range sets {
		var v bpf.Service
		if err := d.maps.Services.Lookup(key, &v); err != nil {
			return fmt.Errorf("look up service %s: %w", netip.AddrPortFrom(bpf.ToAddr(key.Addr), key.Port), err)
		}
		v.Id = id
		keys, values = append(keys, key), append(values, v)
	}
	return putAll(d.maps.Services, keys, values)
}
