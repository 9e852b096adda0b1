package l4

import (
	"net/netip"
	"syscall"
	"time"
	"unsafe"

	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

// crashesMost is how many workers may die by themselves while they look at a
// connection: it is ended then, lest it kill the next one too.
const crashesMost = 3

// Recover says what the connections of a registry were doing when the process before
// was killed, for [Relay.Adopt], which must be told before the relay runs. crashed
// says that the process died by its own fault. It may be killed and done again.
func (r *Registry) Recover(crashed bool) *Given {
	g := &Given{}
	for i := range r.marks {
		m := &r.marks[i]
		if crashed && m.at != 0 {
			r.slots[m.at-1].crashes++
		}
		m.at = 0
	}
	for i := range r.used {
		s := &r.slots[i]
		switch s.state {
		case slotOpen, slotReset:
			g.Conns = append(g.Conns, r.carried(s))
			if s.flags&keptLingers != 0 && !s.recorded {
				g.ended = append(g.ended, s)
			}
		case slotEnded:
			g.ended = append(g.ended, s)
		default:
		}
	}
	return g
}

func (r *Registry) carried(s *slot) Carried {
	now := monotonic()
	d := s.downstream.get()
	c := Carried{
		slot: s, Worker: int(s.worker), Downstream: d, Service: s.service.get(), Cluster: s.cluster.get(),
		Endpoint: s.endpoint.get(), Opened: s.opened, Began: now, Active: now, Dialed: now,
		Connected: time.Duration(s.connected), Attempts: s.attempts, Round: 1,
		Mirrored: s.flags&keptMirrored != 0, Lingers: s.flags&keptLingers != 0 || s.recorded, Kept: d.KeepAlive.Count != 0,
		Down: CarriedSide{FD: int(s.fds[down]), PipeRead: -1, PipeWrite: -1, Tuned: true},
		Up:   CarriedSide{FD: int(s.fds[up]), PipeRead: -1, PipeWrite: -1, Wrote: true, Chosen: s.flags&keptChosen != 0},
	}
	if c.Endpoint.IsValid() {
		c.Tried = []netip.AddrPort{c.Endpoint}
	}
	if c.End = flow.Reason(s.end); c.End != flow.ReasonNone {
		// It was being closed; a side may be already.
		c.Down.Moved, c.Up.Moved = s.moved[down], s.moved[up]
		c.Torn = s.state == slotReset // what could be passed on has been
		return c
	}
	c.Down.Urgent, c.Up.Urgent = s.flags&keptUrgent != 0, s.flags&(keptUrgent<<1) != 0
	if s.crashes >= crashesMost {
		c.End = flow.ReasonCrashed
		sockets := readSockets(s)
		c.Down.Moved, c.Up.Moved = sockets.written(s, up), sockets.written(s, down)
		return c
	}
	if s.flags&keptReleased != 0 {
		c.Released = &flow.Held{Source: d.Source, Slot: s.heldSlot.get(), Mark: s.heldMark, Frame: s.heldFrame, Size: int(s.heldSize)}
		c.Repeats = releases
	}
	r.recoverDial(s, &c)
	r.recoverBytes(s, &c)
	return c
}

// recoverDial finds out how far the dial is.
func (r *Registry) recoverDial(s *slot, c *Carried) {
	if s.fds[up] >= 0 {
		if u, ok := readSocket(s.fds[up], s.flags&(keptUrgent<<up) != 0); ok && (u.state != unix.BPF_TCP_CLOSE || u.acked > 0) {
			// Answered perhaps, and nobody was told: then the first event tells.
			c.Dialing = s.flags&keptDialed == 0
			return
		}
		// Not begun or refused, by an error that was taken perhaps.
		fd := s.fds[up]
		s.fds[up] = -1
		sysClose(fd)
	}
	c.Up = CarriedSide{FD: -1, PipeRead: -1, PipeWrite: -1}
	c.Waiting, c.Endpoint, c.Tried, c.Round = true, netip.AddrPort{}, nil, 0
}

// recoverBytes finds what was read and is not yet written.
func (r *Registry) recoverBytes(s *slot, c *Carried) {
	sockets := readSockets(s)
	for k, side := range []*CarriedSide{&c.Down, &c.Up} {
		if side.FD >= 0 || k == down {
			r.recoverSide(s, k, side, sockets, c)
		}
	}
	if c.Down.Done && c.Up.Done && !c.Lingers {
		// All is passed on. To say so once more ends it.
		c.Down.Done = false
	}
}

// recoverSide finds how much was read from side k, and what of it is not yet written
// to the other.
func (r *Registry) recoverSide(s *slot, k int, side *CarriedSide, sockets *bothSockets, c *Carried) {
	src, dst := &sockets[k], &sockets[1-k]
	written := sockets.written(s, 1-k)
	side.Moved = written
	if s.flags&(keptDone<<k) != 0 {
		side.EOF, side.Done = true, true
		sysShutdownWrite(s.fds[1-k]) // again, or at last
		r.dropRest(s, k)
		r.dropPipe(s, k)
		return
	}
	if dst.state == unix.BPF_TCP_CLOSE && s.fds[1-k] >= 0 {
		// Reset: nothing was passed on to it that could have closed it.
		if !dst.failed {
			c.broken(1 - k) // and somebody has taken the error
		}
		r.dropRest(s, k)
		return // what is in the pipe goes with the connection
	}
	limbo := src.received - src.unread - written
	switch src.state {
	case unix.BPF_TCP_CLOSE_WAIT, unix.BPF_TCP_LAST_ACK, unix.BPF_TCP_CLOSING:
		limbo-- // the FIN, which counts as a byte
	case unix.BPF_TCP_CLOSE:
		closed := s.flags&(keptDone<<(1-k)) != 0 && !src.failed
		if !closed || limbo == 0 {
			// A reset, not two FINs. Whether there was one FIN nobody knows, so not
			// which bytes in hand are whose: then the end comes at once. What the
			// socket has still must not be passed on without them.
			torn := r.keepPipeBytes(s, k, side) == 0 && limbo > 0
			c.Torn = c.Torn || torn
			if !src.failed || torn {
				c.broken(k)
			}
			r.dropRest(s, k)
			return
		}
		limbo--
	default:
	}
	if !r.findBytes(s, k, side, limbo, src) {
		c.End = flow.ReasonCrashed
	}
}

// broken says that a side was reset, where no event will.
func (c *Carried) broken(k int) {
	c.End = flow.ReasonDownstreamReset
	if k == up {
		c.End = flow.ReasonUpstreamReset
	}
}

// findBytes finds the bytes that were read and not written. It returns false if they
// are nowhere, which cannot be.
func (r *Registry) findBytes(s *slot, k int, side *CarriedSide, limbo uint64, src *socketState) bool {
	if n := r.keepPipeBytes(s, k, side); n > 0 {
		return n == limbo
	}
	if limbo == 0 {
		r.dropRest(s, k)
		return true
	}
	if word := s.rests[k]; word != 0 {
		rest := r.rest(word)
		if limbo > uint64(len(rest)) {
			return false
		}
		side.Rest, side.RestUrgent = rest[uint64(len(rest))-limbo:], s.flags&(keptRestUrgent<<k) != 0
		return true
	}
	m := &r.marks[s.worker]
	read := limbo + side.Moved - m.base
	if m.slot != uint32(r.index(s))+1 || m.side != uint32(k) || read > copySize || read < limbo {
		return false
	}
	if m.n >= 0 && read != uint64(m.n) {
		return false // a read skipped an urgent byte of which nobody was told
	}
	side.Rest = r.save(r.buffer(int(s.worker))[read-limbo : read])
	if side.Rest == nil {
		return false
	}
	side.RestUrgent = m.urgent != 0
	s.flags &^= keptRestUrgent << k
	if side.RestUrgent {
		s.flags |= keptRestUrgent << k
	}
	s.rests[k] = r.word(side.Rest)
	return true
}

// keepPipeBytes gives side a pipe that holds bytes, and returns how many.
func (r *Registry) keepPipeBytes(s *slot, k int, side *CarriedSide) uint64 {
	p := s.pipes[k]
	if p == 0 {
		return 0
	}
	n, err := unix.IoctlGetInt(int(p>>32), unix.TIOCINQ)
	if err != nil || n <= 0 {
		r.dropPipe(s, k)
		return 0
	}
	side.PipeRead, side.PipeWrite, side.InPipe = int(p>>32), int(uint32(p)), n
	return uint64(n)
}

func (r *Registry) dropPipe(s *slot, k int) {
	if p := s.pipes[k]; p != 0 {
		s.pipes[k] = 0
		sysClose(int32(p >> 32))
		sysClose(int32(uint32(p)))
	}
}

func (r *Registry) dropRest(s *slot, k int) {
	if word := s.rests[k]; word != 0 {
		s.rests[k] = 0
		r.release(r.rest(word))
	}
}

// socketState is what the kernel says of a socket.
type socketState struct {
	state           uint8
	failed          bool // there is an error to be told
	received, acked uint64
	unread, unacked uint64
}

// readSocket reads until the picture holds still: the counters come by several calls.
// urgent says that urgent bytes are read in their places.
func readSocket(fd int32, urgent bool) (s socketState, ok bool) {
	if !urgent {
		// Else SIOCINQ ends at an urgent byte that nobody has seen yet.
		sysInline(fd, 1)
		defer sysInline(fd, 0)
	}
	for range 1000 {
		a, e := sysTCPInfo(fd)
		if e != 0 {
			return s, false
		}
		poll := []unix.PollFd{{Fd: fd}}
		_, _ = unix.Poll(poll, 0)
		s = socketState{
			state: a.State, failed: poll[0].Revents&unix.POLLERR != 0, received: a.Bytes_received, acked: a.Bytes_acked,
			unread: sysQueued(fd, unix.SIOCINQ), unacked: sysQueued(fd, unix.SIOCOUTQ),
		}
		b, e := sysTCPInfo(fd)
		if e != 0 {
			return s, false
		}
		if a.State == b.State && a.Bytes_received == b.Bytes_received && a.Bytes_acked == b.Bytes_acked {
			return s, true
		}
	}
	return s, true
}

// bothSockets are those of a connection, by side.
type bothSockets [2]socketState

func readSockets(s *slot) *bothSockets {
	var both bothSockets
	for k, fd := range s.fds {
		if fd >= 0 {
			both[k], _ = readSocket(fd, s.flags&(keptUrgent<<k) != 0)
		}
	}
	return &both
}

// written is how many bytes were written to side k.
func (b *bothSockets) written(s *slot, k int) uint64 {
	return b[k].written(k == up, s.flags&(keptDone<<(1-k)) != 0)
}

func sysQueued(fd int32, which uintptr) uint64 {
	var n int32
	_, _, _ = syscall.RawSyscall(unix.SYS_IOCTL, uintptr(fd), which, uintptr(unsafe.Pointer(&n)))
	return uint64(max(n, 0))
}

// written is how many bytes were written to a socket. active says that it was ours
// to connect, and shut that it was shut down.
func (s *socketState) written(active, shut bool) uint64 {
	n := int64(s.acked + s.unacked)
	if active {
		n-- // the SYN counts as a byte, where it was acknowledged as one
	}
	switch s.state {
	case unix.BPF_TCP_FIN_WAIT1, unix.BPF_TCP_FIN_WAIT2, unix.BPF_TCP_CLOSING, unix.BPF_TCP_LAST_ACK:
		n--
	case unix.BPF_TCP_CLOSE:
		if shut {
			n--
		}
	default:
	}
	return uint64(max(n, 0))
}

// Untouched tells whether a descriptor is a TCP connection that somebody opened to us
// and nobody has read from or written to: one that was accepted, and then nothing.
func Untouched(fd int) bool {
	s, ok := readSocket(int32(fd), false)
	if !ok || s.state != unix.BPF_TCP_ESTABLISHED && s.state != unix.BPF_TCP_CLOSE_WAIT {
		return false
	}
	if s.state == unix.BPF_TCP_CLOSE_WAIT {
		s.received--
	}
	if s.received != s.unread || s.acked+s.unacked != 0 {
		return false
	}
	// What is about to be closed is marked by markTouched.
	low, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVLOWAT)
	return err == nil && low == 1
}

// markTouched tells a socket that is about to be closed from one that was just
// accepted, where no byte does.
func markTouched(fd int32) { sysSetInt(fd, unix.SOL_SOCKET, unix.SO_RCVLOWAT, 2) }

// Begin has connections begin that an earlier process accepted, and then nothing.
func (r *Relay) Begin(fds []int) {
	for i, fd := range fds {
		w := r.workers[i%len(r.workers)]
		w.post(func() {
			if w.peer.remote(int32(fd)) != 0 {
				w.refuse(int32(fd))
				return
			}
			w.begin(int32(fd))
		})
	}
}

// discard closes a socket without a word to its peer.
func discard(fd int32) {
	// Without CAP_NET_ADMIN it is closed as any.
	sysSetInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 1)
	sysClose(fd)
}
