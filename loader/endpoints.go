package loader

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

// EndpointState is what the kernel side knows of an endpoint. It outlives sets and
// processes.
type EndpointState struct {
	Addr netip.AddrPort
	// InSet is false for an endpoint that was removed and has connections that count
	// still, or had some a moment ago.
	InSet bool
	// Live is how many connections are connecting, or open and not closed by their
	// application. On MPTCP they count to their end.
	Live int
	// Connects counts those that were answered, Failed those that were not,
	// Failures the latter in a row while it is not ejected.
	Connects, Failed uint64
	Failures         int
	// Ejections counts how often it was ejected. Ejected is how much longer it
	// is; Trial is true when that is over, and it has not proved itself yet.
	Ejections int
	Ejected   time.Duration
	Trial     bool
	// Down is what SetDown said.
	Down bool
	// Last is how the last failed connect ended; flow.ReasonNone: none has.
	Last flow.Reason
}

// nameOf is what endpoint_names has of an endpoint of that weight; of one that was
// removed it is 0.
func nameOf(set uint32, addr netip.AddrPort, weight uint16) bpf.EndpointName {
	return bpf.EndpointName{Addr: bpf.FromAddr(addr.Addr()), Set: set, Port: addr.Port(), Weight: weight}
}

// endpointTable is the maps endpoints and endpoint_names: who has which index, and
// the states in our memory. Hooks add to them all the time, so writing one whole
// would lose what they added.
type endpointTable struct {
	states, names *ebpf.Map
	// Mapped when an index in it is first used: what is mapped is resident.
	chunks [bpf.Endpoints / chunkEndpoints][]byte
	next   uint32 // never used below
	free   []uint32
}

// chunkEndpoints is how many endpoints are mapped at once: whole pages, also where
// one has 64 KiB.
const (
	chunkEndpoints = 4096
	endpointSize   = int(unsafe.Sizeof(bpf.Endpoint{}))
)

// at is the state of an endpoint whose index was given out.
func (t *endpointTable) at(i uint32) *endpoint {
	return (*endpoint)(unsafe.Pointer(&t.chunks[i/chunkEndpoints][int(i%chunkEndpoints)*endpointSize]))
}

// alloc gives indices out, as many as there is room for in to, or none. Their states
// are all zero.
func (t *endpointTable) alloc(to []uint32) error {
	used := max(0, len(t.free)-len(to)) // these of the free ones stay
	more := uint32(len(to) - (len(t.free) - used))
	if more > bpf.Endpoints-t.next {
		return fmt.Errorf("%w: want at most %d of all services, with those that were removed a moment ago or have connections",
			ErrTooManyEndpoints, bpf.Endpoints)
	}
	for i := t.next; i < t.next+more; i += chunkEndpoints - i%chunkEndpoints {
		if err := t.ensure(i); err != nil {
			return err
		}
	}
	n := copy(to, t.free[used:])
	t.free = t.free[:used]
	for ; n < len(to); n++ {
		to[n] = t.next
		t.next++
	}
	return nil
}

// ensure maps the chunk of an index.
func (t *endpointTable) ensure(i uint32) error {
	c := &t.chunks[i/chunkEndpoints]
	if *c != nil {
		return nil
	}
	offset := int64(i/chunkEndpoints) * chunkEndpoints * int64(endpointSize)
	page, err := unix.Mmap(t.states.FD(), offset, chunkEndpoints*endpointSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map endpoints: %w", err)
	}
	*c = page
	return nil
}

// release takes an index back, under which nobody is counted.
func (t *endpointTable) release(i uint32) error {
	if err := t.names.Put(i, bpf.EndpointName{}); err != nil {
		return fmt.Errorf("forget endpoint: %w", err)
	}
	*(*bpf.Endpoint)(t.at(i)) = bpf.Endpoint{}
	t.free = append(t.free, i)
	return nil
}

// recover reads who has which index, and calls f with each. What f does not want is
// nobody's.
func (t *endpointTable) recover(f func(name bpf.EndpointName, i uint32) bool) error {
	var cursor ebpf.MapBatchCursor
	keys, names := make([]uint32, chunkEndpoints), make([]bpf.EndpointName, chunkEndpoints)
	var nobodys []uint32
	for done := false; !done; {
		n, err := t.names.BatchLookup(&cursor, keys, names, nil)
		if done = errors.Is(err, ebpf.ErrKeyNotExist); err != nil && !done {
			return fmt.Errorf("read map endpoint_names: %w", err)
		}
		for k, i := range keys[:n] {
			if names[k].Port == 0 || !f(names[k], i) {
				nobodys = append(nobodys, i)
				continue
			}
			if err := t.ensure(i); err != nil {
				return err
			}
			t.next = i + 1 // they come in order
		}
	}
	for _, i := range nobodys {
		if i >= t.next {
			break
		}
		if err := t.ensure(i); err != nil {
			return err
		}
		// Whoever gave it back may have been killed before it was zero.
		*(*bpf.Endpoint)(t.at(i)) = bpf.Endpoint{}
		t.free = append(t.free, i)
	}
	return nil
}

func (t *endpointTable) close() error {
	var errs []error
	for _, c := range t.chunks {
		if c != nil {
			errs = append(errs, unix.Munmap(c))
		}
	}
	return errors.Join(errs...)
}

// endpoint is one entry of the map endpoints in our memory.
type endpoint bpf.Endpoint

// downShift is where down is in the word that round begins.
const downShift = 8 * (unsafe.Offsetof(bpf.Endpoint{}.Down) - unsafe.Offsetof(bpf.Endpoint{}.Round))

// setDown leaves what hooks write beside it as it is: a store to a byte of a word
// that others write to is not atomic everywhere.
func (e *endpoint) setDown(down bool) {
	word := (*uint32)(unsafe.Pointer(&e.Round))
	if (atomic.LoadUint32(word)>>downShift&0xff != 0) == down {
		return
	}
	if down {
		atomic.OrUint32(word, 1<<downShift)
	} else {
		atomic.AndUint32(word, ^uint32(0xff<<downShift))
	}
}

func (e *endpoint) live() *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&e.Live)) }

// load copies the state. Each word is whole; together they are of no one moment.
func (e *endpoint) load() bpf.Endpoint {
	var v bpf.Endpoint
	from := (*[endpointSize / 8]uint64)(unsafe.Pointer(e))
	to := (*[endpointSize / 8]uint64)(unsafe.Pointer(&v))
	for i := range from {
		to[i] = atomic.LoadUint64(&from[i])
	}
	return v
}

// openAt is how many connections are counted there: below zero, for a moment while
// layouts move, is none.
func openAt(v *bpf.Endpoint) int { return max(0, int(int32(v.Live))) }

// state says the same in Go.
func (e *endpoint) state(addr netip.AddrPort, inSet bool, now int64) EndpointState {
	v := e.load()
	s := EndpointState{
		Addr: addr, InSet: inSet, Live: openAt(&v), Connects: v.Connects, Failed: v.Failed,
		Failures: int(v.Failures), Ejections: int(v.Ejections), Down: v.Down != 0,
	}
	if v.Until != 0 {
		s.Ejected = max(0, time.Duration(int64(v.Until)-now))
		s.Trial = s.Ejected == 0
	}
	if v.Failed > 0 {
		s.Last = failureReason(v.Last)
	}
	return s
}

// failureReason names an enum ending of a connect that failed.
func failureReason(ending uint8) flow.Reason {
	switch ending {
	case bpf.EndingRefused:
		return flow.ReasonDialRefused
	case bpf.EndingTimeout:
		return flow.ReasonDialTimeout
	case bpf.EndingUnreachable:
		return flow.ReasonDialUnreachable
	case bpf.EndingAbandoned:
		return flow.ReasonAbandoned
	default:
		return flow.ReasonDialFailed
	}
}

// EndpointStates returns the endpoints of a service, sorted by address. It fails
// with [ErrNoService].
func (d *Datapath) EndpointStates(service netip.AddrPort) ([]EndpointState, error) {
	return d.AppendEndpointStates(nil, service)
}

// AppendEndpointStates is EndpointStates for who asks of many services: it appends to
// all.
func (d *Datapath) AppendEndpointStates(all []EndpointState, service netip.AddrPort) ([]EndpointState, error) {
	s := &d.sets
	s.mu.Lock()
	defer s.mu.Unlock()
	own, err := s.find(service)
	if err != nil || own == nil {
		return all, err
	}
	now := d.monotonic()
	all = slices.Grow(all, len(own.endpoints))
	for _, e := range own.endpoints {
		_, out := s.out[e.index]
		inSet := !out && s.members[e.index].weight > 0
		all = append(all, s.table.at(e.index).state(e.addr(), inSet, now))
	}
	return all, nil
}

// Used sums up how many connects to the endpoints of a service have ended in one way or
// the other, and how many connections are open. It fails with [ErrNoService].
func (d *Datapath) Used(service netip.AddrPort) (connects uint64, live int, err error) {
	s := &d.sets
	s.mu.Lock()
	defer s.mu.Unlock()
	own, err := s.find(service)
	if err != nil || own == nil {
		return 0, 0, err
	}
	for _, e := range own.endpoints {
		v := s.table.at(e.index).load()
		connects += v.Connects + v.Failed
		live += openAt(&v)
	}
	return connects, live, nil
}

// KeptEndpoint is an endpoint that an earlier process published.
type KeptEndpoint struct {
	Addr   netip.AddrPort
	Weight uint16
}

// Kept returns the endpoints of a service as an earlier process published them last,
// sorted by address, and whether they are what the kernel side goes by still: nothing
// was published for it since. Their zones are not known.
func (d *Datapath) Kept(service netip.AddrPort) ([]KeptEndpoint, bool) {
	s := &d.sets
	s.mu.Lock()
	defer s.mu.Unlock()
	own := s.byAddr[unmapped(service)]
	if own == nil || own.published || !own.gone.IsZero() {
		return nil, false
	}
	all := make([]KeptEndpoint, 0, len(own.endpoints))
	for _, e := range own.endpoints {
		if w := s.members[e.index].weight; w > 0 {
			all = append(all, KeptEndpoint{Addr: e.addr(), Weight: w})
		}
	}
	return all, true
}

// SetDown tells the connect hook whether a health check says that an endpoint is
// down. It fails with [ErrNoService] or [ErrNoSuchEndpoint].
func (d *Datapath) SetDown(service, endpoint netip.AddrPort, down bool) error {
	s := &d.sets
	s.mu.Lock()
	defer s.mu.Unlock()
	_, i, err := s.findEndpoint(service, endpoint)
	if err != nil {
		return err
	}
	s.table.at(i).setDown(down)
	return nil
}
