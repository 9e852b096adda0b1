package l4

import (
	"syscall"

	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

// ready acts on the events of side k.
func (w *worker) ready(c *conn, k int, events uint32) {
	s := &c.sides[k]
	if c.lingers && events&unix.EPOLLERR == 0 {
		w.lingered(c)
		return
	}
	// A reset looks like a FIN too, and must not be passed on as one.
	if events&unix.EPOLLRDHUP != 0 && events&unix.EPOLLERR == 0 {
		s.fin = true
	}
	if events&unix.EPOLLPRI != 0 {
		w.sawUrgent(c, k)
	}
	if k == up && c.dialing {
		if !w.answered(c, events) {
			return
		}
	}
	if c.held != nil {
		// The application comes first; then this is looked at.
		s.readable = true
		c.held.reset = c.held.reset || events&unix.EPOLLERR != 0
		return
	}
	if events&unix.EPOLLERR != 0 && k == down && c.dialing {
		w.end(c, flow.ReasonDownstreamReset, true)
		return
	}
	if events&unix.EPOLLOUT != 0 && s.blocked {
		s.blocked = false
		w.pump(c, 1-k)
		if c.dead {
			return
		}
	}
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR|unix.EPOLLPRI) != 0 && !s.eof {
		s.readable = true
		w.pump(c, k)
		if c.dead {
			return
		}
	}
	if events&unix.EPOLLERR != 0 {
		// Everything that came before the reset was passed on, as far as the
		// other side has room.
		w.broken(c, k)
	}
}

// answered looks at what became of a dial. It returns false when there is
// nothing more to do for these events.
func (w *worker) answered(c *conn, events uint32) bool {
	if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		switch e := sysSocketError(c.sides[up].fd); e {
		case 0:
		case unix.ECONNRESET, unix.EPIPE:
			// It connected, spoke perhaps, and was reset, all before we
			// looked: a reset of a dial is ECONNREFUSED, and EPIPE a reset
			// behind a FIN.
			c.sides[up].fin = e == unix.EPIPE
			w.established(c)
			if c.held != nil {
				c.held.reset = true
			} else {
				w.broken(c, up)
			}
			return false
		default:
			c.errno = uint16(e)
			w.dialFailed(c, answerOf(e))
			return false
		}
	}
	if events&(unix.EPOLLOUT|unix.EPOLLIN) == 0 {
		return false
	}
	w.established(c)
	// The first bytes, or the first end of file.
	w.pump(c, down)
	return !c.dead
}

// pump moves bytes from side k to the other until there is nothing to read, no
// room to write, or the turn is over.
func (w *worker) pump(c *conn, k int) {
	s, d := &c.sides[k], &c.sides[1-k]
	if d.blocked || c.dialing || c.held != nil {
		return
	}
	if s.rest != nil && !w.writeRest(c, k) {
		return
	}
	budget := turnBytes
	for {
		if s.splicing {
			if w.splice(c, k, &budget) {
				continue // back to copying
			}
			return
		}
		if s.eof || !s.readable {
			break
		}
		if budget <= 0 {
			w.later(c, k)
			return
		}
		if !w.copyOnce(c, k, &budget) {
			return
		}
	}
	if s.eof {
		w.finish(c, k)
	}
}

// tune prepares the upstream socket for more than one write: the second must not
// wait for the answer to the first (Nagle), and on a leg that does not leave the
// machine nothing is to be paced. The downstream socket has both from its
// listener.
func (w *worker) tune(d *side) {
	d.tuned = true
	sysSetInt(d.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	// Towards an address of this machine the kernel takes that address as the
	// source too.
	if !d.chosen && w.addr.local(d.fd) == 0 && w.peer.remote(d.fd) == 0 && w.addr.get().Addr() == w.peer.get().Addr() {
		sysSetString(d.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, []byte(localCongestion))
	}
}

// writeRest writes what an earlier write had no room for, and tells whether all
// of it is gone.
func (w *worker) writeRest(c *conn, k int) bool {
	s, d := &c.sides[k], &c.sides[1-k]
	for len(s.pending()) > 0 {
		var n int
		var e syscall.Errno
		if s.restUrgent {
			n, e = w.writeUrgent(d, s.pending())
		} else {
			n, e = w.write(d, s.pending())
		}
		switch {
		case e == unix.EAGAIN:
			w.block(d)
			return false
		case e != 0:
			s.readable = false // nobody is left to read it for
			w.broken(c, 1-k)
			return false
		}
		w.took(c, k, n)
	}
	return true
}

// took notes that n bytes of side k's rest are written.
func (w *worker) took(c *conn, k, n int) {
	s := &c.sides[k]
	s.from += n
	s.moved += uint64(n)
	c.active = w.now
	if s.from == len(s.rest) {
		w.releaseRest(c, k)
	}
}

// copyOnce does one read and its write. It returns false when side k cannot go
// on now.
func (w *worker) copyOnce(c *conn, k int, budget *int) bool {
	s, d := &c.sides[k], &c.sides[1-k]
	if s.urgent && !w.passUrgent(c, k) {
		return false
	}
	// Read before the call: a FIN seen by then is behind all the data.
	fin := s.fin
	w.reading(c, k)
	n, e := sysRead(s.fd, w.buf)
	w.hasRead(n)
	switch {
	case e == unix.EAGAIN:
		s.readable = false
		return true
	case e != 0:
		s.readable = false
		w.broken(c, k)
		return false
	case n == 0:
		s.eof, s.readable = true, false
		return true
	case n == len(w.buf):
		s.full = min(s.full+1, 2)
	default:
		s.full = 0
		if !s.urgent {
			s.readable = false // a short read has drained the queue
			s.eof = fin
		}
		if k == down {
			w.owe(c)
		}
	}
	fault(faultRead)
	*budget -= n
	c.active = w.now
	for b := w.buf[:n]; len(b) > 0; {
		m, e := w.write(d, b)
		switch {
		case e == unix.EAGAIN:
			w.saveRest(c, k, b)
			w.block(d)
			return false
		case e != 0:
			s.readable = false
			w.broken(c, 1-k)
			return false
		}
		s.moved += uint64(m)
		fault(faultWritten)
		b = b[m:]
	}
	if k == up {
		c.owed = 0
	}
	if s.full == 2 {
		w.startSplicing(c, k)
	}
	return true
}

// block notes that a write to d found no room.
func (w *worker) block(d *side) {
	d.blocked = true
	if d.watched && !d.armed {
		d.armed = true
		// An edge is reported also if there is room by now. It cannot fail:
		// nothing is allocated for it.
		w.control(unix.EPOLL_CTL_MOD, d.fd, epollIn|unix.EPOLLOUT, d.gen)
	}
}

// write sends to d. A connection of one request saves what tune costs: a first
// write does not wait for anything.
func (w *worker) write(d *side, b []byte) (int, syscall.Errno) {
	if d.wrote && !d.tuned {
		w.tune(d)
	}
	n, e := sysSend(d.fd, b)
	if e == 0 {
		d.wrote = true
	}
	return n, e
}
