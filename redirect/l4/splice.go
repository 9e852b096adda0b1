package l4

import (
	"golang.org/x/sys/unix"
)

// spliceMin is what a splice has to move to be worth its two calls.
const spliceMin = 16 << 10

// localCongestion is for legs that do not leave the machine: the system's default
// may be one that paces (BBR), which doubles what bulk costs on loopback.
const localCongestion = "reno"

// startSplicing borrows a pipe for side k, if there is one.
func (w *worker) startSplicing(c *conn, k int) {
	s, d := &c.sides[k], &c.sides[1-k]
	s.full = 0
	if s.pipe == noPipe {
		if s.pipe = w.pipes.get(); s.pipe == noPipe {
			return
		}
		fault(faultPipe)
		c.keepPipe(k, s.pipe)
	}
	s.splicing = true
	if !d.tuned {
		w.tune(d)
	}
}

// splice moves bytes through the pipe. It returns true when side k is to be
// copied again, and false when it cannot go on now.
//
// The pipe is filled only when it is empty, so EAGAIN of the filling splice
// always means an empty socket and never a full pipe.
func (w *worker) splice(c *conn, k int, budget *int) bool {
	s := &c.sides[k]
	for {
		if !w.emptyPipe(c, k) {
			return false
		}
		if s.eof || !s.readable {
			w.stopSplicing(c, k)
			return true
		}
		if *budget <= 0 {
			w.later(c, k)
			return false
		}
		n, e := sysSplice(s.fd, s.pipe[1], pipeSize)
		fault(faultFilled)
		switch {
		case e == unix.EAGAIN || e == 0 && n == 0:
			// A splice cannot pass an urgent mark, a read can: with one, only
			// the read says that the socket is empty. And behind one even the
			// end of file is not the end: it always takes a read to say so.
			s.readable = e == 0 || s.urgent
			w.stopSplicing(c, k)
			return true
		case e != 0:
			s.readable = false
			w.broken(c, k)
			return false
		}
		s.inPipe = n
		*budget -= n
		c.active = w.now
		if n < spliceMin {
			if w.emptyPipe(c, k) {
				w.stopSplicing(c, k)
				return true
			}
			return false
		}
	}
}

// emptyPipe writes what is in the pipe, and tells whether it is empty now.
func (w *worker) emptyPipe(c *conn, k int) bool {
	s, d := &c.sides[k], &c.sides[1-k]
	for s.inPipe > 0 {
		n, e := sysSplice(s.pipe[0], d.fd, s.inPipe)
		fault(faultEmptied)
		switch {
		case e == unix.EAGAIN:
			w.block(d)
			return false
		case e != 0 || n == 0:
			s.readable = false
			w.broken(c, 1-k)
			return false
		}
		s.inPipe -= n
		s.moved += uint64(n)
		c.active = w.now
	}
	return true
}

// stopSplicing gives the pipe back.
func (w *worker) stopSplicing(c *conn, k int) {
	s := &c.sides[k]
	s.splicing = false
	s.readable = s.readable && !s.drained() // a read would skip an urgent byte that comes just then
	c.keepPipe(k, noPipe)
	fault(faultReturned)
	w.pipes.put(s.pipe, s.inPipe)
	s.pipe, s.inPipe = noPipe, 0
}
