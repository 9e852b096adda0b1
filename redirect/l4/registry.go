package l4

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"unsafe"

	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

const (
	// registryMost is how many connections a registry has room for.
	registryMost = 1 << 17
	// registryWorkers is how many workers.
	registryWorkers = 64
	// registryForeign is how many descriptors it remembers that are nobody's
	// business.
	registryForeign = 64
	// chunksKept is how many free chunks keep their memory.
	chunksKept = 64
	// nameMost is what is kept of the names of a service and of a cluster: as long as one
	// may be (maxName of cmd/pillion/config).
	nameMost = 253
)

// Registry is what a relay writes down, in memory that outlives its process, so that
// another process with the same descriptors can go on with its connections after a
// kill at any moment.
//
// It says which descriptors belong together, and where the bytes are that were read
// and not yet written. How many these are it does not say: the kernel knows how much
// was read from one socket and written to the other, at every moment, and recovery
// asks it (recover.go). So a byte costs no store, a read and its write three, and
// nothing costs a system call. All stores are plain, in an order in which every
// beginning is a valid state. On arm64 the compiler joins the stores to two neighbours
// at the place of the later one, past others to the same slot: two that have to stay in
// order are no neighbours, or have a call or a branch between them.
//
// Rejected: to move everything by splice(2), so that no byte is ever in a process's
// memory. It costs a third more per round trip of small messages.
type Registry struct {
	head  *registryHead
	marks []mark // one per worker
	copy  []byte // copySize per worker: what it reads into
	slots []slot
	area  []byte // chunks of copySize

	mu     sync.Mutex // guards what follows; workers hold it for some instructions
	free   []int32    // slots
	used   int        // slots that ever were
	chunks []int32    // free ones; all but the first chunksKept hold no memory
	high   int        // chunks that ever were
	ended  map[ending]*slot
}

// ending is what a record of an ended connection is known by.
type ending struct {
	cookie uint64
	port   uint16
}

// registryHead is written once by the first process, and its listeners.
type registryHead struct {
	began     uint32
	nForeign  uint32
	foreign   [registryForeign]int32
	listeners [2][registryWorkers]int32 // IPv4 and IPv6; a descriptor + 1
	used      uint32                    // as in Registry, so that recovery need not look at all
	tag       uint64
	charged   uint32
	copied    uint32 // as Frozen.Copied
	giving    uint32 // a Giving
	givingFD  int32
	taking    uint32 // a Taking
	takingFD  int32
	handles   handles
	sockets   [socketsMost]handle
}

// mark is what a worker is doing.
type mark struct {
	// slot+1 and side of the read that the worker's copy buffer holds, and how many
	// bytes the side had moved before.
	slot uint32
	side uint32
	base uint64
	// at is the slot+1 of the connection that it looks at; 0: none.
	at uint32
	// urgent is 1 if what is read is an urgent byte.
	urgent uint32
	// n is how many bytes the read has returned; -1: it has not yet.
	n int32
	_ [36]byte
}

// The states of a slot.
const (
	slotFree  = iota
	slotOpen  // its connection is open, or, with an end, being closed
	slotReset // it is being ended with resets, for the reason end
	slotEnded // it has ended, and nobody has written the record yet
)

// Flags of a slot.
const (
	keptDone       = 1 << 0 // and 1<<1 for up: the end was passed on, or is just now
	keptUrgent     = 1 << 2 // and 1<<3: there was an urgent mark
	keptChosen     = 1 << 4 // of up: the application chose its congestion control
	keptDialed     = 1 << 5 // the dial was answered
	keptMirrored   = 1 << 6
	keptLingers    = 1 << 7
	keptRestUrgent = 1 << 9 // and 1<<10: the rest is an urgent byte
	keptReleased   = 1 << 8 // held is an answer that the application may have missed
)

// slot is a connection. Go's pointers have no place in it.
type slot struct {
	state uint32
	flags uint32
	fds   [2]int32  // -1: none
	pipes [2]uint64 // of what is read from a side: read end << 32 | write end; 0: none
	rests [2]uint64 // likewise: chunk+1 << 32 | offset+length in it; 0: none

	worker   uint32
	crashes  uint32 // workers that died by themselves while they looked at it
	end      uint8  // a flow.Reason: it is being closed for that
	why      uint8  // one too: what the record says
	attempts uint8
	recorded bool // and somebody has written it

	opened, connected, ended int64 // opened, ended: CLOCK_MONOTONIC
	moved                    [2]uint64
	endpoint                 address

	downstream downstream
	heldMark   uint32 // of an answer, as in flow.Held
	heldSize   uint32
	heldFrame  [flow.FrameMax]byte
	heldSlot   address

	service, cluster name
}

// address is a netip.AddrPort, which has a pointer in it.
type address struct {
	ip    [16]byte
	port  uint16
	kind  uint8 // 0: not valid, 4 or 6
	_     uint8
	_zone uint32 // slots and endpoints have no zone
}

func (a *address) set(p netip.AddrPort) {
	*a = address{port: p.Port()}
	if p.Addr().IsValid() {
		a.ip, a.kind = p.Addr().As16(), 6
		if p.Addr().Is4() {
			a.kind = 4
		}
	}
}

func (a *address) get() netip.AddrPort {
	ip := netip.AddrFrom16(a.ip)
	switch a.kind {
	case 4:
		ip = ip.Unmap()
	case 6:
	default:
		ip = netip.Addr{}
	}
	return netip.AddrPortFrom(ip, a.port)
}

// name is a string, cut if it is long.
type name struct {
	size uint8
	text [nameMost]byte
}

func (n *name) set(s string) { n.size = uint8(copy(n.text[:], s)) }
func (n *name) get() string  { return string(n.text[:n.size]) }

// downstream is a flow.Downstream.
type downstream struct {
	cookie, group, cgroup  uint64
	source, orig, bound    address
	reason, tos            uint8
	count                  uint8
	idle, interval         uint16
	mark, priority, userMs uint32
	congestion             [16]byte
}

func (k *downstream) set(d *flow.Downstream) {
	*k = downstream{
		cookie: d.Cookie, group: d.Group, cgroup: d.Cgroup, reason: uint8(d.Reason), tos: d.TOS,
		count: d.KeepAlive.Count, idle: d.KeepAlive.Idle, interval: d.KeepAlive.Interval,
		mark: d.Mark, priority: d.Priority, userMs: d.UserTimeout, congestion: d.Congestion,
	}
	k.source.set(d.Source)
	k.orig.set(d.OrigDst.AddrPort)
	k.bound.set(netip.AddrPortFrom(d.BoundSource, 0))
}

func (k *downstream) get() flow.Downstream {
	return flow.Downstream{
		Cookie: k.cookie, Group: k.group, Cgroup: k.cgroup, Source: k.source.get(),
		OrigDst: flow.OrigDst{AddrPort: k.orig.get()}, Reason: flow.Reason(k.reason), TOS: k.tos,
		Mark: k.mark, Priority: k.priority, UserTimeout: k.userMs, Congestion: k.congestion,
		KeepAlive:   flow.KeepAlive{Count: k.count, Idle: k.idle, Interval: k.interval},
		BoundSource: k.bound.get().Addr(),
	}
}

// pageMost is the largest page of any kernel: arm64 has 4, 16 or 64 KiB.
const pageMost = 64 << 10

// The layout, from the beginning of what OpenRegistry is given. Every part begins on a
// page; what is not written takes no memory.
const (
	headSize   = pageMost
	marksSize  = (registryWorkers*unsafe.Sizeof(mark{}) + pageMost - 1) &^ (pageMost - 1)
	copyAll    = registryWorkers * copySize
	slotsSize  = (registryMost*unsafe.Sizeof(slot{}) + pageMost - 1) &^ (pageMost - 1)
	areaSize   = 2 * registryMost * copySize
	registryOf = headSize + marksSize + copyAll + slotsSize + areaSize
)

// Its head fits, and a chunk is whole pages.
const (
	_ = uint(headSize - unsafe.Sizeof(registryHead{}))
	_ = -uint(copySize % pageMost)
)

// OpenRegistry maps the registry that is in a memfd from offset on, and makes it if
// there is none. The memory that it takes is that of what is written: its size is
// address space. It stays mapped for the life of the process.
func OpenRegistry(memfd int, offset int64) (*Registry, error) {
	if err := unix.Ftruncate(memfd, offset+int64(registryOf)); err != nil {
		return nil, fmt.Errorf("open registry: %w", err)
	}
	m, err := unix.Mmap(memfd, offset, int(registryOf), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map registry: %w", err)
	}
	// Data of applications has no place in a core file; an old kernel dumps it.
	_ = unix.Madvise(m, unix.MADV_DONTDUMP)
	r := &Registry{head: (*registryHead)(unsafe.Pointer(&m[0])), ended: map[ending]*slot{}}
	m = m[headSize:]
	r.marks = unsafe.Slice((*mark)(unsafe.Pointer(&m[0])), registryWorkers)
	m = m[marksSize:]
	r.copy, m = m[:copyAll], m[copyAll:]
	r.slots = unsafe.Slice((*slot)(unsafe.Pointer(&m[0])), registryMost)
	r.area = m[slotsSize:]
	r.count()
	return r, nil
}

// count finds out what is free.
func (r *Registry) count() {
	r.used = int(r.head.used)
	taken := map[int32]bool{}
	for i := range r.used {
		s := &r.slots[i]
		if s.state == slotFree {
			r.free = append(r.free, int32(i))
			continue
		}
		for _, rest := range s.rests {
			if rest != 0 {
				n := int32(rest>>32) - 1
				taken[n] = true
				r.high = max(r.high, int(n)+1)
			}
		}
	}
	for n := range int32(r.high) {
		if !taken[n] {
			r.putChunk(n)
		}
	}
}

// Room is how many connections it can hold.
func (r *Registry) Room() int { return registryMost }

// Began tells whether an earlier process has used it. If not, others are descriptors
// that were open before, and are not the relay's: it remembers them.
func (r *Registry) Began(others []int) bool {
	if r.head.began != 0 {
		return true
	}
	n := copy(r.head.foreign[:], int32s(others))
	r.head.nForeign = uint32(n)
	r.head.began = 1
	return false
}

func int32s(all []int) []int32 {
	out := make([]int32, 0, len(all))
	for _, v := range all {
		out = append(out, int32(v))
	}
	return out
}

// Names returns the descriptors that it knows: those that have to stay open.
func (r *Registry) Names() map[int]bool {
	all := map[int]bool{}
	for _, fd := range r.head.foreign[:r.head.nForeign] {
		all[int(fd)] = true
	}
	for _, family := range r.Listeners() {
		for _, fd := range family {
			all[fd] = true
		}
	}
	for i := range r.used {
		s := &r.slots[i]
		if s.state != slotOpen && s.state != slotReset {
			continue
		}
		for k := range s.fds {
			if s.fds[k] >= 0 {
				all[int(s.fds[k])] = true
			}
			if p := s.pipes[k]; p != 0 {
				all[int(p>>32)], all[int(uint32(p))] = true, true
			}
		}
	}
	return all
}

// SetListeners writes down the listeners of both families, one per worker.
func (r *Registry) SetListeners(all [2][]int) {
	for family, fds := range all {
		for i, fd := range fds {
			r.head.listeners[family][i] = int32(fd) + 1
		}
	}
}

// SetTag writes down a number for the next process, which Tag returns; 0: there is none.
func (r *Registry) SetTag(tag uint64) { r.head.tag = tag }

// Tag returns what SetTag wrote.
func (r *Registry) Tag() uint64 { return r.head.tag }

// SetCharged writes down that what the process runs is its own, and no other one's any
// more; Charged returns whether an earlier process has.
func (r *Registry) SetCharged() {
	r.head.charged = 1
	fault(faultCharged)
}

// Charged is the second part of [Registry.SetCharged].
func (r *Registry) Charged() bool { return r.head.charged != 0 }

// Listeners returns what SetListeners wrote.
func (r *Registry) Listeners() (all [2][]int) {
	for family := range all {
		for _, fd := range r.head.listeners[family] {
			if fd != 0 {
				all[family] = append(all[family], int(fd)-1)
			}
		}
	}
	return all
}

// forgetListener must be called before one is closed.
func (r *Registry) forgetListener(fd int32) {
	for family := range r.head.listeners {
		if i := slices.Index(r.head.listeners[family][:], fd+1); i >= 0 {
			r.head.listeners[family][i] = 0
		}
	}
}

// take returns a free slot, blank but for its state, or nil if there is none.
func (r *Registry) take() *slot {
	r.mu.Lock()
	defer r.mu.Unlock()
	var s *slot
	switch n := len(r.free); {
	case n > 0:
		s = &r.slots[r.free[n-1]]
		r.free = r.free[:n-1]
	case r.used < registryMost:
		s = &r.slots[r.used]
		r.used++
		r.head.used = uint32(r.used)
	default:
		return nil
	}
	*s = slot{fds: [2]int32{-1, -1}}
	return s
}

// give makes a slot free. The caller has mu.
func (r *Registry) give(s *slot) {
	s.state = slotFree
	r.free = append(r.free, r.index(s))
}

// await notes that the record of a connection is under way to who writes it.
func (r *Registry) await(s *slot) {
	e := ending{s.downstream.cookie, s.downstream.source.port}
	r.mu.Lock()
	defer r.mu.Unlock()
	if before := r.ended[e]; before != nil {
		r.written(before) // of a port that was used again at once
	}
	if len(r.ended) >= ledgerSize {
		r.written(s) // nobody writes, or too slowly
		return
	}
	r.ended[e] = s
}

// closed makes the slot of a connection free, when its record is written too.
func (r *Registry) closed(s *slot) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.state = slotEnded
	if s.recorded {
		r.give(s)
	}
}

func (r *Registry) written(s *slot) {
	s.recorded = true
	if s.state == slotEnded {
		r.give(s)
	}
}

// Recorded says that the record of a connection is written, so that the next process
// need not.
func (r *Registry) Recorded(rec *flow.Record) {
	e := ending{rec.Cookie, rec.Source.Port()}
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := r.ended[e]; s != nil {
		delete(r.ended, e)
		r.written(s)
	}
}

func (r *Registry) index(s *slot) int32 {
	return int32((uintptr(unsafe.Pointer(s)) - uintptr(unsafe.Pointer(&r.slots[0]))) / unsafe.Sizeof(slot{}))
}

// buffer is what worker i reads into.
func (r *Registry) buffer(i int) []byte { return r.copy[i*copySize : (i+1)*copySize : (i+1)*copySize] }

// save copies b into a chunk. It returns nil if there is none left.
func (r *Registry) save(b []byte) []byte {
	r.mu.Lock()
	var n int32
	switch free := len(r.chunks); {
	case free > 0:
		n = r.chunks[free-1]
		r.chunks = r.chunks[:free-1]
	case r.high < 2*registryMost:
		n = int32(r.high)
		r.high++
	default:
		r.mu.Unlock()
		return nil
	}
	r.mu.Unlock()
	c := r.chunk(n)[:len(b)]
	copy(c, b)
	return c
}

func (r *Registry) chunk(n int32) []byte {
	return r.area[int(n)*copySize : (int(n)+1)*copySize : (int(n)+1)*copySize]
}

// release takes back what save returned, or a part of it.
func (r *Registry) release(b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.putChunk(r.chunkOf(b))
}

func (r *Registry) putChunk(n int32) {
	if len(r.chunks) >= chunksKept {
		// An error keeps the memory, which is no reason for another.
		_ = unix.Madvise(r.chunk(n), unix.MADV_REMOVE)
	}
	r.chunks = append(r.chunks, n)
}

func (r *Registry) chunkOf(b []byte) int32 {
	return int32((uintptr(unsafe.Pointer(unsafe.SliceData(b))) - uintptr(unsafe.Pointer(&r.area[0]))) / copySize)
}

// word is what a slot says of a rest: the chunk, and where in it b ends.
func (r *Registry) word(b []byte) uint64 {
	n := r.chunkOf(b)
	end := int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))-uintptr(unsafe.Pointer(&r.area[int(n)*copySize]))) + len(b)
	return uint64(n+1)<<32 | uint64(end)
}

// rest is the reverse of word.
func (r *Registry) rest(word uint64) []byte {
	return r.chunk(int32(word>>32) - 1)[:uint32(word)]
}
