package loader

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

// Queue is one worker's part in holding handshakes: what the kernel side holds
// for it, and the answers to that. It is used by one thread.
type Queue struct {
	ring   *ebpf.Map
	read   *ringReader
	inject int // descriptor of the program
	entry  func(bpf.LiveKey) (bpf.Live, bool)
	tag    uint64
	frame  frame
	// While hooks of another layout are at work, and after: their rings, and what is
	// readable when one of all is; -1: there are none. See move_held.go.
	former []*formerRing
	both   int
}

// Holds tells whether this kernel can hold handshakes back (tcx, Linux 6.6).
// Without it every connection is early.
func (d *Datapath) Holds() bool { return d.holds }

// Queues makes the rings of this many workers and hands them to the kernel side.
// It returns none where [Datapath.Holds] is false. Close closes them, after the
// workers have ended.
func (d *Datapath) Queues(workers int) ([]*Queue, error) {
	// An earlier process may have had more, or a kernel side that holds: nobody
	// reads those rings.
	for _, held := range append(d.formerHeld(), formerMap{m: d.maps.Held}) {
		for i := range held.m.MaxEntries() {
			if err := held.m.Delete(i); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return nil, fmt.Errorf("remove ring of worker %d: %w", i, err)
			}
		}
	}
	if !d.holds {
		return nil, nil
	}
	for i := range workers {
		q, err := d.newQueue()
		if err == nil {
			d.queues = append(d.queues, q)
			err = errors.Join(d.makeFormer(i, q), d.maps.Held.Put(uint32(i), uint32(q.ring.FD())))
		}
		if err != nil {
			return nil, fmt.Errorf("make ring of worker %d: %w", i, err)
		}
	}
	return d.queues, nil
}

func (d *Datapath) newQueue() (*Queue, error) {
	spec, err := d.heldSpec()
	if err != nil {
		return nil, err
	}
	ring, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, err
	}
	return d.queueOf(ring)
}

// queueOf reads a ring, which it takes over.
func (d *Datapath) queueOf(ring *ebpf.Map) (*Queue, error) {
	read, err := mapRing(ring)
	if err != nil {
		return nil, errors.Join(err, ring.Close())
	}
	return &Queue{
		ring: ring, read: read, entry: d.entry, tag: d.frameTag,
		inject: d.programs[bpf.ProgInject].FD(), both: -1,
	}, nil
}

func (q *Queue) close() error {
	errs := []error{q.read.close(), q.ring.Close()}
	for _, f := range q.former {
		errs = append(errs, f.close())
	}
	if q.both >= 0 {
		errs = append(errs, unix.Close(q.both))
	}
	return errors.Join(errs...)
}

// FD returns the descriptor that is readable when there is news.
func (q *Queue) FD() int {
	if q.both >= 0 {
		return q.both
	}
	return q.ring.FD()
}

// Next reads one piece of news, and returns false when there is none.
func (q *Queue) Next(h *flow.Held) bool {
	if q.nextFormer(h) {
		return true
	}
	for {
		raw, ok := q.read.peek()
		if !ok {
			return false
		}
		good := readHeld(raw, h)
		q.read.advance()
		if good {
			return true
		}
	}
}

// readHeld reads one record of a worker's ring, and returns false if it is none.
func readHeld(raw []byte, h *flow.Held) bool {
	if len(raw) != int(unsafe.Sizeof(bpf.Held{})) {
		return false
	}
	r := (*bpf.Held)(unsafe.Pointer(&raw[0]))
	h.Source = netip.AddrPortFrom(bpf.ToAddr(r.Key.Source), r.Key.SourcePort)
	h.Slot = netip.AddrPortFrom(bpf.ToAddr(r.Key.Slot), r.Key.SlotPort)
	h.Gone = r.Kind == bpf.HeldGone
	h.Mark, h.Frame, h.Size = r.Mark, r.Frame, int(r.Size)
	return h.Size <= len(h.Frame)
}

// Finish ends the handshake with our own listener in the application's name. The
// connection can then be accepted, and the application knows nothing yet.
func (q *Queue) Finish(h *flow.Held) error {
	a, ok := parseAnswer(h)
	if !ok {
		return errFrame
	}
	q.frame.thirdACK(&a, q.tag)
	return q.send(h.Mark)
}

// Release lets the application have the answer.
func (q *Queue) Release(h *flow.Held) error {
	a, ok := parseAnswer(h)
	if !ok {
		return errFrame
	}
	q.frame.synAck(&a, q.tag)
	return q.send(h.Mark)
}

// Refuse makes the application's connect fail with an error, as the network
// would: by an ICMP error where one means it, and else by a reset. An ICMP error
// that arrives while connect(2) is being called is forgotten by the kernel, so
// the caller asks [Queue.Waits] afterwards, and repeats it.
func (q *Queue) Refuse(h *flow.Held, e syscall.Errno) error {
	a, ok := parseAnswer(h)
	if !ok {
		return errFrame
	}
	kinds := icmp4
	if a.v6 {
		kinds = icmp6
	}
	if k, ok := kinds[e]; ok {
		q.frame.icmpError(&a, q.tag, k.kind, k.code)
	} else {
		q.frame.refusal(&a, q.tag)
	}
	return q.send(h.Mark)
}

// Forget ends the half-open connection at our own listener.
func (q *Queue) Forget(h *flow.Held) error {
	a, ok := parseAnswer(h)
	if !ok {
		return errFrame
	}
	q.frame.abandonment(&a, q.tag)
	return q.send(h.Mark)
}

// Waits tells whether the socket with this cookie is still connecting, or
// connected: its entry ends with it.
func (q *Queue) Waits(h *flow.Held, cookie uint64) bool {
	l, ok := q.entry(liveKey(h.Source, h.Slot))
	return ok && l.Cookie == cookie
}

var (
	errFrame    = errors.New("what is held is no answer")
	errInjected = errors.New("the frame did not get to the loopback interface")
)

// testRunAttr is the part of union bpf_attr that BPF_PROG_TEST_RUN reads
// (include/uapi/linux/bpf.h).
type testRunAttr struct {
	progFD, retval        uint32
	sizeIn, sizeOut       uint32
	in, out               unsafe.Pointer
	repeat, duration      uint32
	ctxSizeIn, ctxSizeOut uint32
	ctxIn, ctxOut         unsafe.Pointer
	flags, cpu, batch     uint32
	_                     uint32
}

// testRunContext is the beginning of struct __sk_buff.
type testRunContext struct{ len, packetType, mark uint32 }

// sendTries bounds how often a frame is sent again that found the loopback
// interface's queue (net.core.netdev_max_backlog) full.
const sendTries = 8

// send injects the frame. It raises the softirq itself, so as a rule the frame
// has arrived when it returns.
func (q *Queue) send(mark uint32) error {
	b := q.frame.bytes()
	attr := testRunAttr{progFD: uint32(q.inject), sizeIn: uint32(len(b)), in: unsafe.Pointer(&b[0])}
	context := testRunContext{mark: mark}
	if mark != 0 {
		attr.ctxIn, attr.ctxSizeIn = unsafe.Pointer(&context), uint32(unsafe.Sizeof(context))
	}
	for range sendTries {
		_, _, e := syscall.RawSyscall(unix.SYS_BPF, unix.BPF_PROG_TEST_RUN, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
		switch {
		case e == unix.EINTR:
		case e != 0:
			return fmt.Errorf("inject frame: %w", e)
		case attr.retval == 0:
			return nil
		}
	}
	return errInjected
}

// ringReader reads a ring buffer map without waiting. The library's reader was
// rejected here: it has an epoll instance of its own, and the worker has one.
type ringReader struct {
	consumer, producer []byte // mapped pages
	data               []byte
	mask               uint64
	next               uint64 // behind the record that peek returned
}

func mapRing(m *ebpf.Map) (*ringReader, error) {
	page, size := os.Getpagesize(), int(m.MaxEntries())
	consumer, err := unix.Mmap(m.FD(), 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map ring: %w", err)
	}
	// The producer's page, and the data with its first page once more, so that no
	// record breaks off at the end: none is longer. The kernel has all of it
	// twice, but what is mapped is resident.
	rest, err := unix.Mmap(m.FD(), int64(page), page+size+page, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("map ring: %w", err), unix.Munmap(consumer))
	}
	return &ringReader{consumer: consumer, producer: rest, data: rest[page:], mask: uint64(size - 1)}, nil
}

func (r *ringReader) close() error {
	return errors.Join(unix.Munmap(r.consumer), unix.Munmap(r.producer))
}

// peek returns the next record, which stays valid until advance. What the kernel
// discarded is skipped.
func (r *ringReader) peek() ([]byte, bool) {
	for {
		at := r.taken()
		raw, next, ok := r.after(at)
		r.next = next
		if ok || next == at {
			return raw, ok
		}
		// Then once more: whoever writes wakes only those who have read all before.
		r.advance()
	}
}

// after returns the record at a place, or the next one that is not discarded, and the
// place behind it.
func (r *ringReader) after(at uint64) (raw []byte, next uint64, ok bool) {
	producer := (*uint64)(unsafe.Pointer(&r.producer[0]))
	for at < atomic.LoadUint64(producer) {
		head := atomic.LoadUint32((*uint32)(unsafe.Pointer(&r.data[at&r.mask])))
		if head&unix.BPF_RINGBUF_BUSY_BIT != 0 {
			return nil, at, false // being written: its end wakes us
		}
		length := uint64(head &^ (unix.BPF_RINGBUF_BUSY_BIT | unix.BPF_RINGBUF_DISCARD_BIT))
		from := at&r.mask + unix.BPF_RINGBUF_HDR_SZ
		at += (length + unix.BPF_RINGBUF_HDR_SZ + 7) &^ 7
		if head&unix.BPF_RINGBUF_DISCARD_BIT == 0 {
			return r.data[from : from+length], at, true
		}
	}
	return nil, at, false
}

// advance gives the record's room back.
func (r *ringReader) advance() { r.take(r.next) }

// taken is the place up to which the ring was read, take says so.
func (r *ringReader) taken() uint64 {
	return atomic.LoadUint64((*uint64)(unsafe.Pointer(&r.consumer[0])))
}

func (r *ringReader) take(to uint64) {
	atomic.StoreUint64((*uint64)(unsafe.Pointer(&r.consumer[0])), to)
}

// count is how many records are in the ring.
func (r *ringReader) count() (n int) {
	for at := r.taken(); ; n++ {
		_, next, ok := r.after(at)
		if at = next; !ok {
			return n
		}
	}
}

// Answered tells the kernel side that a destination answered a dial, which
// counts for this long from now; 0 takes it back. See connect_mode in bpf/include/abi.h.
func (d *Datapath) Answered(dst netip.AddrPort, lasts time.Duration) {
	key := bpf.EndpointKey{Addr: bpf.FromAddr(dst.Addr()), Port: dst.Port()}
	attr := mapAttr{mapFD: uint32(d.maps.Answered.FD()), key: unsafe.Pointer(&key)}
	call := uintptr(unix.BPF_MAP_DELETE_ELEM)
	until := uint64(d.monotonic() + int64(lasts))
	if lasts > 0 {
		call, attr.value = unix.BPF_MAP_UPDATE_ELEM, unsafe.Pointer(&until)
	}
	// It fails when there is nothing to delete, or no memory: then the next
	// connection waits for its dial.
	_, _, _ = syscall.RawSyscall(unix.SYS_BPF, call, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
}
