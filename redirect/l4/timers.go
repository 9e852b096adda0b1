package l4

import (
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

// The loop wakes for time only when something is open that time may end.
// Looking at all connections now and then was preferred to a heap or a wheel:
// it costs nothing per connection and, at these intervals, nothing to speak of.
const (
	// dialSweep is how late a dial may time out.
	dialSweep = 20 * time.Millisecond
	// retrySweep is how soon accepting is tried again at the limit.
	retrySweep = 50 * time.Millisecond
	// idleSweep is how late other ends may be.
	idleSweep = 500 * time.Millisecond
	// keepSweep is how often new connections get their keep-alive.
	keepSweep = 10 * time.Second
)

// Keep-alive probes a silent peer after keepIdle, and gives it up after
// keepCount probes keepInterval apart: two and a half minutes in all, which is
// within what connection tracking of the usual kind allows.
const (
	keepIdle     = 60
	keepInterval = 15
	keepCount    = 6
)

// interval is how long the loop may sleep, or 0 for ever.
func (w *worker) interval() time.Duration {
	switch {
	case w.paused:
		return retrySweep
	case w.dialing > w.endless:
		return dialSweep
	case len(w.conns) == 0:
		return 0
	case len(w.held) > 0:
		return idleSweep
	case w.expiring > 0, w.stopping:
		return idleSweep
	default:
		return keepSweep
	}
}

// timeout is epoll's, in ms: 0 when there is work, -1 when only events count.
func (w *worker) timeout() int {
	if len(w.again) > 0 {
		return 0
	}
	if len(w.unheard) > 0 || len(w.waiters) > 0 || w.firstOwed() != nil {
		return 1
	}
	d := w.interval()
	if d == 0 {
		return -1
	}
	left := d - time.Duration(w.now-w.swept)
	if len(w.released) > 0 {
		left = min(left, time.Duration(w.released[0].at+releaseEvery-w.now))
	}
	return int(max(left, 0)/time.Millisecond) + 1
}

// sweep does what time brings.
func (w *worker) sweep() {
	d := w.interval()
	if d == 0 || time.Duration(w.now-w.swept) < d {
		return
	}
	w.swept = w.now
	if w.paused && !w.full() {
		w.resume()
	}
	ask := w.askNow()
	// From the end: end moves the last conn into the place of the ended one.
	for i := len(w.conns) - 1; i >= 0; i-- {
		if i < len(w.conns) {
			c := w.conns[i]
			if ask {
				w.ask(c)
			}
			w.expire(c)
		}
	}
}

func (w *worker) expire(c *conn) {
	l := c.target.Terms
	if c.held != nil && w.now-c.held.checked >= int64(waitsEvery) && !w.waits(c) {
		w.end(c, flow.ReasonAbandoned, true)
		return
	}
	switch {
	case l.MaxLifetime > 0 && w.now-c.opened >= int64(l.MaxLifetime):
		w.end(c, flow.ReasonMaxLifetime, true)
	case c.waiting:
	case c.dialing:
		if w.now >= w.dialDeadline(c) {
			w.dialFailed(c, flow.ReasonDialTimeout)
		}
	case c.held != nil:
	case l.IdleTimeout > 0 && w.now-c.active >= int64(l.IdleTimeout):
		w.end(c, flow.ReasonIdleTimeout, true)
	case !c.kept && w.now-c.opened >= int64(keepSweep):
		// Late on purpose: most connections are gone by now, and four calls
		// each are a tenth of what a short one costs.
		c.kept = true
		KeepAlive(int(c.sides[up].fd))
	}
}

// KeepAlive makes the kernel probe a silent peer. Errors are ignored: the
// connection works without.
func KeepAlive(fd int) {
	setKeepAlive(int32(fd), flow.KeepAlive{Count: keepCount, Idle: keepIdle, Interval: keepInterval})
}
