package l4

import (
	"time"

	"golang.org/x/sys/unix"
)

const (
	// askEvery is how often it is looked whether the applications of silent
	// connections are still there, askSoon while the relay only waits for them, and
	// silentFor how long one must be silent, in ns.
	askEvery  = keepSweep
	askSoon   = time.Second
	silentFor = int64(time.Second)
)

// askNow tells whether the time has come to look.
func (w *worker) askNow() bool {
	every := askEvery
	if w.stopping {
		every = askSoon
	}
	if w.relay.options.Present == nil || time.Duration(w.now-w.asked) < every {
		return false
	}
	w.asked = w.now
	return true
}

// ask has the kernel find out whether the application's socket is there, if the kernel
// side knows it no more: a reset, which TCP sends once, can be lost on the way (the
// route to the slots is gone for a moment, a firewall drops it). What answers a probe
// for a socket that is gone is another reset; one that is there says so, and nothing is
// lost. What has ended its half is left alone: it may well be gone, and wait for
// nothing, as without a relay.
func (w *worker) ask(c *conn) {
	s := &c.sides[down]
	if s.fd < 0 || s.eof || s.fin || c.closing || c.lingers || w.now-c.active < silentFor {
		return
	}
	if w.addr.local(s.fd) != 0 || w.peer.remote(s.fd) != 0 || w.relay.options.Present(w.addr.get(), w.peer.get()) {
		return
	}
	// Keep-alive is on: of a socket that was silent for longer than that, the timer
	// runs out at once.
	sysSetInt(s.fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(silentFor/int64(time.Second)))
}
