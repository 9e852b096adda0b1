package l4

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

const (
	// copySize is what one read asks for. A read that fills it twice in a row
	// is bulk.
	copySize = 64 << 10
	// turnBytes is how much one direction moves before the others get a turn.
	turnBytes = 1 << 20
	// eventsPerWait bounds one batch, and with it the age of worker.now.
	eventsPerWait = 256
	// idleGap is the time between two waits, in ns, that makes a worker idle.
	idleGap = 2e6
	// acceptsPerTurn lets open connections have their turn in a flood of new.
	acceptsPerTurn = 64
)

// worker is an event loop on a thread of its own. What it has no lock for,
// only that thread touches.
type worker struct {
	relay     *Relay
	index     int // in relay.workers
	registry  *Registry
	mark      *mark // in the registry; nil: there is none
	ep        int32
	wake      int32 // an eventfd
	listeners []int32
	paused    bool // not accepting, for want of descriptors
	waitsYet  bool // not accepting, and not dialing, before Relay.Accept
	stopping  bool // no new connections,
	stopped   bool // and not accepting any more
	now       int64
	gap       int64 // ns between the last two waits
	gen       uint32

	conns   []*conn // the open ones, in no order
	byFD    []*conn
	again   []*conn // have more to do, and gave others a turn
	spare   []*conn // again's other slice
	dialing int     // dials under way, and those of them without a time limit
	endless int
	// expiring is how many of conns time alone may end.
	expiring int
	owing    owing
	// accepts is how many connections are taken at a time, accepted the turn in
	// which that was done last.
	accepts  int
	accepted uint64
	swept    int64
	asked    int64 // when ask was last called

	// Connections of which it is not known yet where they go; see undecided.go.
	waiters []*conn
	decided int64 // when they were last asked about

	// Connections whose handshakes wait; see hold.go.
	queue     Queue // nil: there are none
	queueFD   int32
	held      map[heldKey]*conn
	spareHeld []*held
	news      flow.Held
	unheard   []refusal
	released  []release                // oldest first
	repeated  int64                    // when they were last
	told      map[netip.AddrPort]int64 // when it was last told

	slab    slab
	buffers buffers
	pipes   pipes
	buf     []byte
	events  [eventsPerWait]unix.EpollEvent
	// congestion is the default of new sockets, as congestionRead knew it.
	congestion     [16]byte
	congestionRead int64
	peer           sockaddr
	addr           sockaddr

	ledger   ledger
	counters counters
	turn     atomic.Uint64
	seen     uint64 // turn at the last call of Moved, which alone uses it
	waiting  atomic.Bool

	mu       sync.Mutex // guards commands and closed
	commands []func()
	closed   bool // nobody will run a command any more
}

func newWorker(r *Relay, index int, listeners []int) *worker {
	w := &worker{
		relay: r, index: index, ep: -1, wake: -1, queueFD: -1, buf: make([]byte, copySize), accepts: 1,
		held: map[heldKey]*conn{}, told: map[netip.AddrPort]int64{},
	}
	w.waitsYet = r.options.AcceptLater
	w.pipes.open = &r.pipes
	if w.registry = r.options.Registry; w.registry != nil {
		w.mark, w.buf = &w.registry.marks[index], w.registry.buffer(index)
	}
	for _, fd := range listeners {
		w.listeners = append(w.listeners, int32(fd))
	}
	return w
}

func (w *worker) open() error {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("create epoll instance: %w", err)
	}
	w.ep = int32(ep)
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("create eventfd: %w", err)
	}
	w.wake = int32(wake)
	watch := []int32{w.wake}
	if !w.waitsYet {
		watch = append(watch, w.listeners...)
	}
	if w.queue != nil {
		w.queueFD = int32(w.queue.FD())
		watch = append(watch, w.queueFD)
	}
	for _, fd := range watch {
		if e := w.control(unix.EPOLL_CTL_ADD, fd, unix.EPOLLIN, 0); e != 0 {
			return fmt.Errorf("watch descriptor: %w", e)
		}
	}
	return nil
}

// close frees what open made, and the listeners.
func (w *worker) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.closeListeners()
	w.pipes.closeAll()
	for _, fd := range []int32{w.ep, w.wake} {
		if fd >= 0 {
			sysClose(fd)
		}
	}
}

func (w *worker) closeListeners() {
	for _, fd := range w.listeners {
		if w.registry != nil {
			w.registry.forgetListener(fd)
		}
		sysClose(fd)
	}
	w.listeners = nil
}

// post has f run on the worker's thread. It returns false when the worker has
// ended, and f then never runs.
func (w *worker) post(f func()) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	w.commands = append(w.commands, f)
	one := [8]byte{1}
	// EAGAIN means that the counter is full, so the worker wakes anyway.
	_, _ = unix.Write(int(w.wake), one[:])
	return true
}

func (w *worker) runCommands() {
	var counter [8]byte
	_, _ = sysRead(w.wake, counter[:])
	w.mu.Lock()
	commands := w.commands
	w.commands = nil
	w.mu.Unlock()
	for _, f := range commands {
		f()
	}
}

// stopAccepting serves what is in the accept queues and closes the listeners, when
// nobody's handshake waits any more.
func (w *worker) stopAccepting() {
	for _, fd := range w.listeners {
		for range backlog {
			if !w.acceptFrom(fd) {
				break
			}
		}
	}
	w.stopping = true
	for _, c := range w.held {
		if c.held.silent {
			w.end(c, flow.ReasonDrained, true) // it may wait for minutes
		}
	}
	w.stopIfIdle()
}

// accept begins what [Options.AcceptLater] put off.
func (w *worker) accept() {
	if !w.waitsYet {
		return
	}
	w.waitsYet = false
	if !w.stopped {
		w.paused = true
		w.resume()
	}
}

func (w *worker) stopIfIdle() {
	if w.stopping && !w.stopped && len(w.held) == 0 {
		w.closeListeners()
		w.stopped, w.paused = true, false
	}
}

func (w *worker) resetAll() {
	for len(w.conns) > 0 {
		w.end(w.conns[len(w.conns)-1], flow.ReasonDrained, true)
	}
}

// run carries connections until the worker was stopped and nothing is open.
func (w *worker) run() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := w.loop()
	// Not deferred: after a panic the descriptors are the keeper's.
	w.waiting.Store(true) // for good: it does not hang
	w.lastCommands()
	w.close()
	return err
}

func (w *worker) loop() error {
	w.tick()
	w.runCommands() // what is adopted comes before what is accepted
	for !w.stopped || len(w.conns) > 0 {
		before := w.now
		n, e := w.wait()
		w.tick()
		w.gap = w.now - before
		if e != 0 && e != unix.EINTR {
			w.resetAll()
			return fmt.Errorf("wait for events: %w", e)
		}
		for i := range n {
			w.handle(&w.events[i])
		}
		w.goOn()
		w.decide()
		w.acknowledge()
		w.sweep()
		w.refuseAgain()
		w.releaseAgain()
		w.stopIfIdle()
	}
	return nil
}

// lastCommands runs what was posted in the last moment: who posted it waits.
func (w *worker) lastCommands() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.runCommands()
}

// tick reads the clock, once per batch: a read per use would cost more than
// what it is used for.
func (w *worker) tick() { w.now = int64(time.Since(w.relay.start)) }

// wait fills w.events.
//
// A busy worker waits without telling Go's scheduler: told every time, its
// monitor takes and returns the processor all the time, which ate a fifth of the
// engine's own time. When the runtime wants the processor back (after 10 ms, or
// for a garbage collection) its signal interrupts the wait, and the worker waits
// again in the open. So does one that waited long the last time: for an idle
// process the signals would cost more than all it does.
func (w *worker) wait() (int, syscall.Errno) {
	timeout := w.timeout()
	w.lookAway()
	w.waiting.Store(true)
	var n int
	e := unix.EINTR
	if w.gap < idleGap || timeout == 0 {
		n, e = w.epollWait(syscall.RawSyscall6, timeout)
	}
	if e == unix.EINTR {
		n, e = w.epollWait(syscall.Syscall6, timeout)
	}
	w.turn.Add(1)
	w.waiting.Store(false)
	if e != 0 {
		return 0, e
	}
	return n, 0
}

type syscall6 func(trap, a1, a2, a3, a4, a5, a6 uintptr) (r1, r2 uintptr, err syscall.Errno)

func (w *worker) epollWait(call syscall6, timeout int) (int, syscall.Errno) {
	n, _, e := call(unix.SYS_EPOLL_PWAIT, uintptr(w.ep), uintptr(unsafe.Pointer(&w.events[0])),
		eventsPerWait, uintptr(timeout), 0, 0)
	return int(n), e
}

// control adds a descriptor to the loop, takes it out, or changes what it is
// watched for. Closing it takes it out too.
func (w *worker) control(operation int, fd int32, events, gen uint32) syscall.Errno {
	ev := unix.EpollEvent{Events: events, Fd: fd, Pad: int32(gen)}
	_, _, e := syscall.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(w.ep), uintptr(operation), uintptr(fd),
		uintptr(unsafe.Pointer(&ev)), 0, 0)
	return e
}

func (w *worker) handle(ev *unix.EpollEvent) {
	fd := ev.Fd
	if int(fd) < len(w.byFD) {
		if c := w.byFD[fd]; c != nil {
			k := c.sideOf(fd)
			// An earlier socket of the same number, closed in this batch.
			if c.sides[k].gen == uint32(ev.Pad) {
				w.lookAt(c)
				w.ready(c, k, ev.Events)
			}
			return
		}
	}
	switch {
	case ev.Pad != 0: // a socket that was closed in this batch
	case fd == w.wake:
		w.runCommands()
	case fd == w.queueFD:
		w.takeNews()
	case w.stopped: // a listener that was: its number may be another's by now
	default:
		w.acceptSome(fd)
	}
}

// acceptSome takes as many connections as seem to wait. Taking one more to see
// that there is none costs as much as taking it: the loop comes back at once if
// there is, and then for more.
func (w *worker) acceptSome(listener int32) {
	turn := w.turn.Load()
	if turn == w.accepted+1 {
		w.accepts = min(2*w.accepts, acceptsPerTurn)
	}
	w.accepted = turn
	for n := range w.accepts {
		if !w.acceptFrom(listener) {
			w.accepts = max(n, 1)
			return
		}
	}
}

// goOn gives those another turn that had more to do.
func (w *worker) goOn() {
	if len(w.again) == 0 {
		return
	}
	turn := w.again
	w.again, w.spare = w.spare[:0], nil
	for _, c := range turn {
		// Both first: a side that is put off again must find c in no list.
		more := [2]bool{c.sides[down].queued, c.sides[up].queued}
		c.sides[down].queued, c.sides[up].queued = false, false
		for k := range c.sides {
			if more[k] && !c.dead {
				w.lookAt(c)
				w.pump(c, k)
			}
		}
		w.reclaim(c)
	}
	clear(turn)
	w.spare = turn
}

// later has side k pumped again when the others had their turn.
func (w *worker) later(c *conn, k int) {
	if !c.sides[k].queued {
		if !c.sides[1-k].queued {
			w.again = append(w.again, c)
		}
		c.sides[k].queued = true
	}
}

// full tells whether no more connections may be open. Those whose handshakes wait
// count already, and are to be accepted still.
func (w *worker) full() bool {
	return int(w.relay.live.Load())-len(w.held) >= w.relay.options.MaxConns
}

// acceptFrom takes one connection, and tells whether there may be another.
func (w *worker) acceptFrom(listener int32) bool {
	if w.full() {
		w.pause()
		return false
	}
	fd, e := w.peer.accept(listener)
	switch {
	case e == 0:
		fault(faultAccepted)
		w.begin(fd)
		return !w.paused
	case e == unix.EAGAIN || e == unix.EBADF:
		return false
	case errors.Is(e, unix.EMFILE), errors.Is(e, unix.ENFILE), errors.Is(e, unix.ENOBUFS), errors.Is(e, unix.ENOMEM):
		w.pause()
		return false
	default:
		// ECONNABORTED and the like are of that one connection.
		return true
	}
}

// pause stops accepting until a descriptor is free. The queue fills, and the
// heartbeat tells the connect hook, which then goes by on_failure.
func (w *worker) pause() {
	if w.paused || w.stopped || w.waitsYet {
		return
	}
	w.paused = true
	w.counters.pauses.Add(1)
	for _, fd := range w.listeners {
		w.control(unix.EPOLL_CTL_DEL, fd, 0, 0)
	}
}

func (w *worker) resume() {
	if !w.paused || w.stopped || w.waitsYet {
		return
	}
	w.paused = false
	for _, fd := range w.listeners {
		w.control(unix.EPOLL_CTL_ADD, fd, unix.EPOLLIN, 0)
	}
}

// setFD notes whose socket a descriptor is.
func (w *worker) setFD(fd int32, c *conn) {
	for int(fd) >= len(w.byFD) {
		w.byFD = append(w.byFD, make([]*conn, max(256, len(w.byFD)))...)
	}
	w.byFD[fd] = c
}

func (w *worker) nextGen() uint32 {
	w.gen++
	if w.gen == 0 {
		w.gen = 1 // 0 is that of listeners
	}
	return w.gen
}
