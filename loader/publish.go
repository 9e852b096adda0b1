package loader

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

// change is the new set of one service.
type change struct {
	own    *serviceSet
	set    *flow.Set
	ids    []uint32 // of its endpoints
	before roster   // of the service
	from   int      // its new indices in added, and up to:
	to     int
	inner  *ebpf.Map
	err    error
}

// rows is how many rows the set has.
func (c *change) rows() int {
	n := bpf.SetHead + len(c.set.Endpoints)
	for _, t := range c.set.Tiers {
		n += int(tableRows(len(t.Table)))
	}
	return n
}

// publishing is one round of publishing.
type publishing struct {
	*setTable
	changes []change
	// What differs only in what is written in place.
	rewrites []change
	// What has an index now that had none.
	added []uint32
	names []bpf.EndpointName
	// What has one, and another name.
	renamed  []uint32
	newNames []bpf.EndpointName
	// What index needs for a while, used again for the next set.
	list, fresh []enrolled
}

// publish makes sets the kernel's, in one step after everything is prepared. The
// services need not point to them yet. A set of nil is passed over.
func (s *setTable) publish(sets map[netip.AddrPort]*flow.Set) error {
	endpoints := 0
	for service, set := range sets {
		if set == nil {
			continue
		}
		if err := checkSet(service, set); err != nil {
			return err
		}
		// Who is new is not known yet: of a first round, all are.
		if own := s.byAddr[unmapped(service)]; own == nil || len(own.endpoints) == 0 {
			endpoints += len(set.Endpoints)
		}
	}
	p := &publishing{
		setTable: s, changes: make([]change, 0, len(sets)),
		added: make([]uint32, 0, endpoints), names: make([]bpf.EndpointName, 0, endpoints),
	}
	s.members = slices.Grow(s.members, min(endpoints, bpf.Endpoints))
	s.round++
	for service, set := range sets {
		if set == nil {
			continue
		}
		if err := p.prepare(unmapped(service), set); err != nil {
			p.takeBack()
			return err
		}
	}
	return p.commit()
}

// prepare plans the set of one service, if it is not there already.
func (p *publishing) prepare(service netip.AddrPort, set *flow.Set) error {
	own, err := p.take(service)
	if err != nil {
		return err
	}
	if own.set == set {
		return nil
	}
	if sameRows(own.set, set) {
		p.rewrites = append(p.rewrites, change{own: own, set: set})
		return nil
	}
	c := change{own: own, set: set, before: own.endpoints, from: len(p.added)}
	if err := p.index(&c); err != nil {
		return err
	}
	c.to = len(p.added)
	p.changes = append(p.changes, c)
	return nil
}

// index gives the endpoints of a set their indices: those that they have, or new ones.
func (p *publishing) index(c *change) error {
	c.ids = make([]uint32, len(c.set.Endpoints))
	// By address, as the service's own are: index is the place in the set.
	list := p.list[:0]
	for n, e := range c.set.Endpoints {
		list = append(list, enroll(unmapped(e.Addr), uint32(n)))
	}
	if !slices.IsSortedFunc(list, enrolled.compare) {
		slices.SortFunc(list, enrolled.compare)
	}
	p.list = list
	had, added := c.before, p.fresh[:0]
	for n, e := range list {
		place := e.index
		if n > 0 && e.compare(list[n-1]) == 0 {
			c.ids[place] = c.ids[list[n-1].index] // the set has it twice
			continue
		}
		for len(had) > 0 && had[0].compare(e) < 0 {
			had = had[1:]
		}
		weight := c.set.Endpoints[place].Weight
		if len(had) > 0 && had[0].compare(e) == 0 {
			e.index = had[0].index
			m := &p.members[e.index]
			if m.round = p.round; m.weight != weight {
				p.renamed, p.newNames = append(p.renamed, e.index), append(p.newNames, nameOf(c.own.id, e.addr(), weight))
			}
		} else {
			var err error
			if e.index, err = p.add(nameOf(c.own.id, e.addr(), weight)); err != nil {
				return err
			}
			added = append(added, e)
		}
		c.ids[place] = e.index
	}
	p.fresh = added
	c.own.endpoints = c.before.with(added)
	return nil
}

// add gives an index to an endpoint of that name.
func (p *publishing) add(name bpf.EndpointName) (uint32, error) {
	i, err := p.table.alloc()
	if err != nil {
		return 0, err
	}
	p.names, p.added = append(p.names, name), append(p.added, i)
	for len(p.members) <= int(i) {
		p.members = append(p.members, member{})
	}
	p.members[i] = member{round: p.round, weight: name.Weight}
	return i, nil
}

// takeBack undoes what prepare did.
func (p *publishing) takeBack() {
	p.table.free = append(p.table.free, p.added...)
	for n := range p.changes {
		p.changes[n].own.endpoints = p.changes[n].before
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
	err := p.replace()
	p.renamed, p.newNames = p.renamed[:0], p.newNames[:0] // from here on those that are removed
	for n := range p.changes {
		c := &p.changes[n]
		c.own.published = true
		if err != nil {
			// Which of them the kernel has is not known.
			c.own.set = nil
			c.inner.Close()
			continue
		}
		p.published(c)
	}
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

// replace builds the maps and puts them in place.
func (p *publishing) replace() error {
	longest := 0
	for n := range p.changes {
		longest = max(longest, p.changes[n].rows())
	}
	for i := len(p.keys); i < longest; i++ {
		p.keys = append(p.keys, uint32(i))
	}
	// The kernel's part of it takes the most time, on any processor.
	var builders sync.WaitGroup
	share := max(1, (len(p.changes)+runtime.GOMAXPROCS(0)-1)/runtime.GOMAXPROCS(0))
	for part := range slices.Chunk(p.changes, share) {
		builders.Go(func() { p.build(part) })
	}
	builders.Wait()
	if err := p.rename(); err != nil && p.changes[0].err == nil {
		p.changes[0].err = err
	}
	ids, fds := make([]uint32, len(p.changes)), make([]uint32, len(p.changes))
	for n := range p.changes {
		c := &p.changes[n]
		if c.err != nil {
			p.takeBack()
			// What is named is not used. If that fails too, it is named anew.
			_, _ = p.table.names.BatchUpdate(p.added, make([]bpf.EndpointName, len(p.added)), nil)
			return c.err
		}
		ids[n], fds[n] = c.own.id, uint32(c.inner.FD())
	}
	if err := p.put(ids, fds); err != nil {
		return fmt.Errorf("publish %d endpoint sets: %w", len(ids), err)
	}
	return nil
}

// build names the endpoints and makes the maps of some of the changes. It writes
// only to what is theirs.
func (p *publishing) build(part []change) {
	// Named before they are used: who takes over must find every count.
	err := p.name(part[0].from, part[len(part)-1].to)
	var rows []bpf.SetRow
	for n := range part {
		c := &part[n]
		if c.err = err; err != nil {
			continue
		}
		for i, e := range c.set.Endpoints {
			p.tellDown(c.ids[i], e.Down)
		}
		rows = setRows(slices.Grow(rows[:0], c.rows()), c.set, c.ids, c.own.turn())
		c.inner, c.err = p.make(rows)
	}
}

// name writes whose some of the new indices are.
func (p *publishing) name(from, to int) error {
	if from == to {
		return nil
	}
	if _, err := p.table.names.BatchUpdate(p.added[from:to], p.names[from:to], nil); err != nil {
		return fmt.Errorf("name %d endpoints: %w", to-from, err)
	}
	return nil
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

// published notes that the kernel has a set.
func (p *publishing) published(c *change) {
	own, now := c.own, time.Now()
	own.inner.Close()
	own.inner = nil
	if c.set.Policy == flow.PolicyRoundRobin || hasSpill(c.set) {
		own.inner = c.inner
	} else {
		c.inner.Close()
	}
	own.set, own.spill = c.set, c.set.Spill
	if len(c.before) == 0 {
		return // all that there are are in the set
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

// SetEndpoints replaces the sets of some services, all in one step of the kernel:
// a pick finds the old set of a service or its new one. A nil set takes a
// service's away. What is published already is not published again. Down of an
// endpoint is written where the set says otherwise than the last one, so that a set
// that was made before a SetDown takes nothing back. On [ErrNoService],
// [ErrBadSet], [ErrTooManySets] or [ErrTooManyEndpoints] nothing was changed.
func (d *Datapath) SetEndpoints(sets map[netip.AddrPort]*flow.Set) error {
	s := &d.sets
	s.mu.Lock()
	defer s.mu.Unlock()
	for service := range sets {
		if !s.services[unmapped(service)] {
			return fmt.Errorf("service %s: %w", service, ErrNoService)
		}
	}
	if err := s.publish(sets); err != nil {
		return err
	}
	var unused []*serviceSet
	for service, set := range sets {
		own := s.byAddr[unmapped(service)]
		switch {
		case own == nil || (set != nil) == own.gone.IsZero():
			// It points to its set, or to none, already.
		case set != nil:
			if err := d.pointTo(service, own.id); err != nil {
				return err
			}
			own.gone = time.Time{}
		default:
			if err := d.pointTo(service, noSet); err != nil {
				return err
			}
			unused = append(unused, own)
		}
	}
	return s.drop(unused)
}

// pointTo makes a service's entry name a set.
func (d *Datapath) pointTo(service netip.AddrPort, id uint32) error {
	d.servicesMu.Lock()
	defer d.servicesMu.Unlock()
	key := serviceKey(service)
	var v bpf.Service
	if err := d.maps.Services.Lookup(key, &v); err != nil {
		return fmt.Errorf("look up service %s: %w", service, err)
	}
	v.Id = id
	if err := d.maps.Services.Update(key, v, ebpf.UpdateExist); err != nil {
		return fmt.Errorf("write service %s: %w", service, err)
	}
	return nil
}
