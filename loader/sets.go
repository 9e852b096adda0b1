package loader

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

var (
	// ErrTooManySets means that more services have sets than the map has room for.
	// What was removed needs its room for some seconds more.
	ErrTooManySets = errors.New("too many services have endpoints")
	// ErrTooManyEndpoints means that a set, or all of them together, have more
	// endpoints than there is room for. What was removed needs its room for some
	// seconds more, and as long as it has connections.
	ErrTooManyEndpoints = errors.New("too many endpoints")
	// ErrBadSet means that a set's parts do not fit each other, or not the
	// family of its service's address.
	ErrBadSet = errors.New("the endpoint set is not valid")
	// ErrNoService means that [Datapath.SetRules] was not told of a service.
	ErrNoService = errors.New("no such service")
	// ErrNoSuchEndpoint means that a service never had an endpoint, or it is
	// forgotten.
	ErrNoSuchEndpoint = errors.New("no such endpoint")
)

const (
	// noSet is the id of a service that has no set: none of the map.
	noSet = ^uint32(0)
	// forgetAfter is how long an endpoint or an id is kept that nobody uses. A
	// hook that picked from the old set is done long before.
	forgetAfter = 10 * time.Second
)

// serviceSet is a service that has, or had, an endpoint set.
type serviceSet struct {
	id   uint32
	addr netip.AddrPort // not valid: an earlier process removed it
	// set is what was published last, and spill what was written since. nil:
	// nothing, or an earlier process has, or it is not known what.
	set   *flow.Set
	spill uint32
	// published: this process has, or has tried to.
	published bool
	// inner is open only where something is written in place, or handed on to the
	// next set: a descriptor for each would be too many.
	inner *ebpf.Map
	// endpoints are the indices of all that are in the set, or were.
	endpoints roster
	// gone is when it was removed, and zero while it is in use.
	gone time.Time
}

// member is what is remembered of an endpoint.
type member struct {
	round      uint32 // of publishing, in which it was in a set the last time
	told, down bool   // what that set said of it
	released   bool   // the index is nobody's
	weight     uint16 // as endpoint_names has it; 0: it was removed
}

// removedEndpoint is one that is in no set.
type removedEndpoint struct {
	of   *serviceSet
	idle time.Time // since when it had no connection, as far as was seen
}

// setTable is the maps sets, endpoints and endpoint_names.
type setTable struct {
	mu                  sync.Mutex // orders changes of sets; taken after Datapath.mu, before servicesMu
	outer               *ebpf.Map
	spec                innerSpec // of a set
	measured, waitsEach bool      // see put

	empty *ebpf.Map // stands where a set was that nobody is to pick from
	keys  []uint32  // 0, 1, 2 ... as many as the longest set has rows
	table endpointTable

	services map[netip.AddrPort]bool // of the rules, with a set or without
	byAddr   map[netip.AddrPort]*serviceSet
	byID     map[uint32]*serviceSet
	nextID   uint32 // never used below
	freeIDs  []uint32
	out      map[uint32]removedEndpoint // by index
	members  []member                   // by index
	round    uint32                     // of publishing
	grace    time.Duration              // forgetAfter
}

// open starts with the maps of the datapath.
func (s *setTable) open(maps *bpf.Maps, spec innerSpec) {
	s.outer, s.spec = maps.Sets, spec
	s.table.states, s.table.names = maps.Endpoints, maps.EndpointNames
	s.services = map[netip.AddrPort]bool{}
	s.byAddr, s.byID = map[netip.AddrPort]*serviceSet{}, map[uint32]*serviceSet{}
	s.out = map[uint32]removedEndpoint{}
	s.grace, s.keys = forgetAfter, []uint32{0, 1, 2}
}

func (s *setTable) close() error {
	var errs []error
	for _, own := range s.byID {
		errs = append(errs, own.inner.Close())
	}
	return errors.Join(append(errs, s.empty.Close(), s.table.close())...)
}

// recover learns what an earlier process left. The sets themselves cannot be read
// without CAP_SYS_ADMIN: they stay until they are published again.
func (s *setTable) recover(services *ebpf.Map) error {
	var k bpf.EndpointKey
	var v bpf.Service
	it := services.Iterate()
	for it.Next(&k, &v) {
		addr := netip.AddrPortFrom(bpf.ToAddr(k.Addr), k.Port)
		s.services[addr] = true
		if v.Id < bpf.Sets && s.byID[v.Id] == nil {
			s.byAddr[addr] = s.add(v.Id, addr)
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read map services: %w", err)
	}
	// What no service points to is dropped when the first rules come. A set without
	// endpoints is not seen here; but to look into sets waits for RCU, each time,
	// before Linux 6.8.
	known := func(id uint32) *serviceSet {
		if own := s.byID[id]; own != nil {
			return own
		}
		return s.add(id, netip.AddrPort{})
	}
	seen := map[bpf.EndpointName]bool{}
	weights := map[uint32]uint16{}
	err := s.table.recover(func(name bpf.EndpointName, i uint32) bool {
		weight := name.Weight
		name.Weight = 0
		if name.Set >= bpf.Sets || seen[name] {
			return false // to name it failed half-way
		}
		seen[name], weights[i] = true, weight
		own := known(name.Set)
		own.endpoints = append(own.endpoints, enroll(netip.AddrPortFrom(bpf.ToAddr(name.Addr), name.Port), i))
		return true
	})
	if err != nil {
		return err
	}
	for _, own := range s.byID {
		slices.SortFunc(own.endpoints, enrolled.compare)
	}
	for id := range s.nextID {
		if s.byID[id] == nil {
			s.freeIDs = append(s.freeIDs, id)
		}
	}
	s.members = make([]member, s.table.next)
	for i, w := range weights {
		s.members[i].weight = w
	}
	return nil
}

func (s *setTable) add(id uint32, addr netip.AddrPort) *serviceSet {
	own := &serviceSet{id: id, addr: addr}
	s.byID[id] = own
	s.nextID = max(s.nextID, id+1)
	return own
}

// find returns what is known of a service; nil if it has no endpoints.
func (s *setTable) find(service netip.AddrPort) (*serviceSet, error) {
	service = unmapped(service)
	own := s.byAddr[service]
	if own == nil && !s.services[service] {
		return nil, fmt.Errorf("service %s: %w", service, ErrNoService)
	}
	return own, nil
}

func (s *setTable) findEndpoint(service, addr netip.AddrPort) (*serviceSet, uint32, error) {
	own, err := s.find(service)
	if err != nil {
		return nil, 0, err
	}
	if own != nil {
		if i, ok := own.endpoints.find(unmapped(addr)); ok {
			return own, i, nil
		}
	}
	return nil, 0, fmt.Errorf("endpoint %s of service %s: %w", addr, service, ErrNoSuchEndpoint)
}

func unmapped(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// take gives a service an id, which is the one it had if that is still kept.
func (s *setTable) take(addr netip.AddrPort) (*serviceSet, error) {
	if own := s.byAddr[addr]; own != nil {
		return own, nil
	}
	id := s.nextID
	if n := len(s.freeIDs); n > 0 {
		id, s.freeIDs = s.freeIDs[n-1], s.freeIDs[:n-1]
	} else if id == bpf.Sets {
		return nil, fmt.Errorf("%w: want at most %d", ErrTooManySets, bpf.Sets)
	}
	own := s.add(id, addr)
	own.gone = time.Now() // until its service points to it
	s.byAddr[addr] = own
	return own, nil
}

// untake gives back the id of a service that never had a set.
func (s *setTable) untake(own *serviceSet) {
	if own.published || own.gone.IsZero() || len(own.endpoints) > 0 || s.byAddr[own.addr] != own {
		return
	}
	delete(s.byAddr, own.addr)
	delete(s.byID, own.id)
	s.freeIDs = append(s.freeIDs, own.id)
}

// use notes which services there are, and which of them point to a set. What none
// points to is dropped.
func (s *setTable) use(services []Service) error {
	pointed := map[*serviceSet]bool{}
	s.services = make(map[netip.AddrPort]bool, len(services))
	for n := range services {
		v := &services[n]
		addr := unmapped(v.Addr)
		s.services[addr] = true
		if own := s.byAddr[addr]; own != nil && (v.Set != nil || v.keeps(own)) {
			pointed[own] = true
		}
	}
	var unused []*serviceSet
	for _, own := range s.byID {
		if own.gone.IsZero() && !pointed[own] {
			unused = append(unused, own)
		}
	}
	return s.drop(unused)
}

// drop takes the sets of services away that do not point to them any more. Their
// ids and endpoints are forgotten later.
func (s *setTable) drop(all []*serviceSet) error {
	if len(all) == 0 {
		return nil
	}
	if err := s.makeEmpty(); err != nil {
		return err
	}
	ids, fds := make([]uint32, len(all)), make([]uint32, len(all))
	for n, own := range all {
		ids[n], fds[n] = own.id, uint32(s.empty.FD())
	}
	// Not deleted: that takes as long, each.
	if err := s.put(ids, fds); err != nil {
		return fmt.Errorf("take %d endpoint sets away: %w", len(all), err)
	}
	now := time.Now()
	for _, own := range all {
		own.gone, own.set = now, nil
		own.inner.Close()
		own.inner = nil
		for _, e := range own.endpoints {
			s.remove(own, e, now)
		}
	}
	return nil
}

// makeEmpty makes the set that stands where one was.
func (s *setTable) makeEmpty() (err error) {
	if s.empty == nil {
		s.empty, err = s.make(make([]bpf.SetRow, bpf.SetHead))
	}
	return err
}

func (s *setTable) remove(own *serviceSet, e enrolled, now time.Time) {
	s.members[e.index].told = false
	if _, ok := s.out[e.index]; !ok {
		s.out[e.index] = removedEndpoint{of: own, idle: now}
	}
}

// forget frees the indices of endpoints that nobody needs any more, and then the
// ids of services.
func (s *setTable) forget() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if err := s.forgetEndpoints(now); err != nil {
		return err
	}
	for id, own := range s.byID {
		if own.gone.IsZero() || len(own.endpoints) > 0 || now.Sub(own.gone) < s.grace {
			continue
		}
		delete(s.byID, id)
		if s.byAddr[own.addr] == own {
			delete(s.byAddr, own.addr)
		}
		s.freeIDs = append(s.freeIDs, id)
	}
	return nil
}

func (s *setTable) forgetEndpoints(now time.Time) error {
	fewer := map[*serviceSet]bool{}
	defer func() { // also of those before one that could not be released
		for own := range fewer {
			own.endpoints = slices.DeleteFunc(own.endpoints, func(e enrolled) bool { return s.members[e.index].released })
		}
	}()
	for i, e := range s.out {
		if s.table.at(i).live().Load() != 0 {
			e.idle = now
			s.out[i] = e
			continue
		}
		if now.Sub(e.idle) < s.grace {
			continue
		}
		if err := s.table.release(i); err != nil {
			return err
		}
		delete(s.out, i)
		s.members[i].released = true
		fewer[e.of] = true
	}
	return nil
}

const (
	// putTogether is how many sets are put in place to find out what it costs, and
	// putTime is what it takes at most where the kernel waits once.
	putTogether = 16
	putTime     = 60 * time.Millisecond
	// putWorkers is how many threads wait at once where it waits each time.
	putWorkers = 32
)

// measure finds out what it costs to put sets in place, with ids that nobody has. If
// it cannot, put does.
func (s *setTable) measure() {
	if s.measured || s.nextID > bpf.Sets-putTogether || s.makeEmpty() != nil {
		return
	}
	ids, fds := make([]uint32, putTogether), make([]uint32, putTogether)
	for n := range ids {
		ids[n], fds[n] = uint32(bpf.Sets-putTogether+n), uint32(s.empty.FD())
	}
	_ = s.putFirst(ids, fds)
}

// putFirst is put, and finds out what it costs.
func (s *setTable) putFirst(ids, fds []uint32) error {
	start := time.Now()
	if _, err := s.outer.BatchUpdate(ids, fds, nil); err != nil {
		return err
	}
	s.measured, s.waitsEach = true, time.Since(start) > putTime
	return nil
}

// put makes maps the sets of services. The kernel waits for RCU, so that no hook
// has the old ones any more: once for all, or before Linux 6.8 for each. There many
// threads wait at the same time.
func (s *setTable) put(ids, fds []uint32) error {
	if len(ids) > putTogether && !s.measured {
		if err := s.putFirst(ids[:putTogether], fds[:putTogether]); err != nil {
			return err
		}
		ids, fds = ids[putTogether:], fds[putTogether:]
	}
	share := len(ids)
	if s.waitsEach {
		share = (len(ids) + putWorkers - 1) / putWorkers
	}
	errs := make([]error, 0, putWorkers)
	var waiting sync.WaitGroup
	for from := 0; from < len(ids); from += share {
		to := min(from+share, len(ids))
		errs = append(errs, nil)
		failed := &errs[len(errs)-1]
		waiting.Go(func() { _, *failed = s.outer.BatchUpdate(ids[from:to], fds[from:to], nil) })
	}
	waiting.Wait()
	return errors.Join(errs...)
}

// make creates the map of one set, of no more rows than there are keys.
func (s *setTable) make(rows []bpf.SetRow) (*ebpf.Map, error) {
	of, err := s.spec()
	if err != nil {
		return nil, err
	}
	spec := *of
	spec.MaxEntries = uint32(len(rows))
	m, err := ebpf.NewMap(&spec)
	if err != nil {
		return nil, fmt.Errorf("create endpoint set: %w", err)
	}
	if _, err := m.BatchUpdate(s.keys[:len(rows)], rows, nil); err != nil {
		m.Close()
		return nil, fmt.Errorf("fill endpoint set: %w", err)
	}
	return m, nil
}
