package loader

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

// change is the new set of one service.
type change struct {
	own    *serviceSet
	set    *flow.Set
	ids    []uint32 // of its endpoints
	before roster   // of the service
	// fresh are those that have an index now and had none, and places where each is
	// in the set.
	fresh  roster
	places []uint32
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

const (
	// setsMost is how many sets are put in place at once, at most: each has a
	// descriptor until then.
	setsMost = 1024
	// descriptors are what the process may have beside them before the table of all
	// grows.
	descriptors = 512
)

// setsTogether is how many sets are put in place at once.
func setsTogether() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return putTogether
	}
	return SetDescriptors(limit.Cur)
}

// SetDescriptors is how many descriptors endpoint sets may take for a moment, of so
// many that a process may have.
func SetDescriptors(limit uint64) int {
	return int(max(putTogether, min(limit/16, setsMost)))
}

// inParallel calls f with parts of all, on every processor, and waits for it.
func inParallel[T any](all []T, f func(part []T)) {
	var running sync.WaitGroup
	for part := range slices.Chunk(all, max(1, (len(all)+runtime.GOMAXPROCS(0)-1)/runtime.GOMAXPROCS(0))) {
		running.Go(func() { f(part) })
	}
	running.Wait()
}

// number gives the endpoints of all changes their indices: those that they have, or
// new ones.
func (p *publishing) number() error {
	var mu sync.Mutex // guards the table, and what was renamed
	inParallel(p.changes, func(part []change) {
		n := numbering{publishing: p, mu: &mu}
		for i := range part {
			part[i].err = n.index(&part[i])
		}
		mu.Lock()
		defer mu.Unlock()
		p.renamed, p.newNames = append(p.renamed, n.renamed...), append(p.newNames, n.names...)
	})
	var failed error
	p.changes = slices.DeleteFunc(p.changes, func(c change) bool {
		switch {
		case c.err == nil:
			return false
		case errors.Is(c.err, ErrTooManyEndpoints):
			p.lacking[c.own.addr] = fmt.Errorf("service %s: %w", c.own.addr, c.err)
		default:
			failed = c.err
		}
		p.untake(c.own)
		return true
	})
	if n := int(p.table.next) - len(p.members); n > 0 {
		p.members = append(p.members, make([]member, n)...)
	}
	return failed
}

// numbering is the part of number that one processor does. It writes only to what
// belongs to its services.
type numbering struct {
	*publishing
	mu *sync.Mutex
	// What index needs for a while, used again for the next set.
	list []enrolled
	same [][2]uint32
	// What has an index, and another name.
	renamed []uint32
	names   []bpf.EndpointName
}

// index gives the endpoints of a set their indices, or none of them.
func (b *numbering) index(c *change) error {
	c.ids = make([]uint32, len(c.set.Endpoints))
	// By address, as the service's own are: index is the place in the set.
	list, same := b.list[:0], b.same[:0]
	for n, e := range c.set.Endpoints {
		list = append(list, enroll(unmapped(e.Addr), uint32(n)))
	}
	if !slices.IsSortedFunc(list, enrolled.compare) {
		slices.SortFunc(list, enrolled.compare)
	}
	had, renamed := c.before, len(b.renamed)
	if len(had) == 0 {
		c.fresh = make(roster, 0, len(list))
	}
	for n, e := range list {
		if n > 0 && e.compare(list[n-1]) == 0 {
			list[n].index = list[n-1].index
			same = append(same, [2]uint32{e.index, list[n].index}) // the set has it twice
			continue
		}
		for len(had) > 0 && had[0].compare(e) < 0 {
			had = had[1:]
		}
		if len(had) == 0 || had[0].compare(e) != 0 {
			c.fresh = append(c.fresh, e)
			continue
		}
		i, weight := had[0].index, c.set.Endpoints[e.index].Weight
		c.ids[e.index] = i
		m := &b.members[i]
		if m.round = b.round; m.weight != weight {
			b.renamed, b.names = append(b.renamed, i), append(b.names, nameOf(c.own.id, e.addr(), weight))
		}
	}
	b.list, b.same = list, same
	if err := b.number(c); err != nil {
		b.renamed, b.names = b.renamed[:renamed], b.names[:renamed]
		return err
	}
	for _, s := range same {
		c.ids[s[0]] = c.ids[s[1]]
	}
	c.own.endpoints = c.before.with(c.fresh)
	return nil
}

// number gives indices to those endpoints of a set that have none.
func (b *numbering) number(c *change) error {
	indices := make([]uint32, len(c.fresh))
	b.mu.Lock()
	err := b.table.alloc(indices)
	b.mu.Unlock()
	if err != nil {
		return err
	}
	c.places = make([]uint32, len(c.fresh))
	for n, i := range indices {
		e := &c.fresh[n]
		c.places[n], c.ids[e.index] = e.index, i
		e.index = i
	}
	return nil
}

// takeBack undoes what number did for some changes. Nobody has used the indices yet.
func (p *publishing) takeBack(part []change) {
	for n := range part {
		c := &part[n]
		for _, e := range c.fresh {
			*(*bpf.Endpoint)(p.table.at(e.index)) = bpf.Endpoint{}
			p.table.free = append(p.table.free, e.index)
		}
		c.own.endpoints = c.before
	}
}

// foresee has the kernel wait for RCU beforehand, once, where it would later: each
// time that the table of descriptors is full, and to find out what put costs.
func (p *publishing) foresee(sets int) {
	if sets <= putTogether {
		return
	}
	// If there may not be so many, each is an error when it comes to that.
	if fd, err := unix.FcntlInt(uintptr(p.outer.FD()), unix.F_DUPFD_CLOEXEC, sets+descriptors); err == nil {
		unix.Close(fd)
	}
	p.measure()
}

// replace builds the maps of some changes and puts them in place. foreseen is over
// when they may be.
func (p *publishing) replace(part []change, foreseen *sync.WaitGroup) error {
	inParallel(part, p.build)
	foreseen.Wait()
	ids, fds := make([]uint32, len(part)), make([]uint32, len(part))
	var err error
	for n := range part {
		c := &part[n]
		if err = c.err; err != nil {
			p.unname(part)
			break
		}
		ids[n], fds[n] = c.own.id, uint32(c.inner.FD())
	}
	if err == nil {
		if err = p.put(ids, fds); err != nil {
			err = fmt.Errorf("publish %d endpoint sets: %w", len(ids), err)
		}
	}
	unused := make([]*ebpf.Map, 0, 2*len(part))
	for n := range part {
		c := &part[n]
		c.own.published = true
		if err != nil {
			// Which of them the kernel has is not known.
			c.own.set = nil
			unused = append(unused, c.inner)
			continue
		}
		unused = p.published(c, unused)
	}
	inParallel(unused, closeSets)
	return err
}

func closeSets(sets []*ebpf.Map) {
	for _, m := range sets {
		m.Close()
	}
}

// build names the endpoints and makes the maps of some of the changes. It writes
// only to what is theirs.
func (p *publishing) build(part []change) {
	// Named before they are used: who takes over must find every count.
	err := p.name(part)
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

// nameTogether is how many names are written at once, at least: all of them would
// be megabytes, each by itself a system call.
const nameTogether = 2048

// name writes whose the new indices of some changes are.
func (p *publishing) name(part []change) error {
	var indices []uint32
	var names []bpf.EndpointName
	for n := range part {
		c := &part[n]
		for k, e := range c.fresh {
			weight := c.set.Endpoints[c.places[k]].Weight
			// Its state is all zero, and so says that it is not down.
			p.members[e.index] = member{round: p.round, weight: weight, told: true}
			indices, names = append(indices, e.index), append(names, nameOf(c.own.id, e.addr(), weight))
		}
		if len(indices) == 0 || len(indices) < nameTogether && n < len(part)-1 {
			continue
		}
		if _, err := p.table.names.BatchUpdate(indices, names, nil); err != nil {
			return fmt.Errorf("name %d endpoints: %w", len(indices), err)
		}
		indices, names = indices[:0], names[:0]
	}
	return nil
}

// unname takes new indices back after they were named. If that fails too, they are
// named anew when they are used.
func (p *publishing) unname(part []change) {
	from := len(p.table.free)
	p.takeBack(part)
	indices := p.table.free[from:]
	_, _ = p.table.names.BatchUpdate(indices, make([]bpf.EndpointName, len(indices)), nil)
}
