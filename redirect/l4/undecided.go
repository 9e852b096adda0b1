package l4

import (
	"slices"
	"time"
)

// undecidedEvery is how often it is asked again where a connection goes. It is
// bound to be known within some 100 ms, of few connections.
const undecidedEvery = time.Millisecond

// undecided tells whether it is not known yet where c goes. Then c waits as if it
// were being dialed, and decide goes on with it.
func (w *worker) undecided(c *conn) bool {
	if w.relay.options.Undecided == nil || c.target.Cluster != nil || !w.asksAgain(c) {
		return false
	}
	c.dialing, c.waiting, c.dialed = true, true, w.now
	w.dialing++
	w.waiters = append(w.waiters, c)
	return true
}

// asksAgain asks where c goes, and tells whether nobody knows yet.
func (w *worker) asksAgain(c *conn) bool {
	if w.relay.options.Undecided == nil {
		return false // nobody is asked, and it waits for something else
	}
	expires := c.expires()
	wait := w.relay.options.Undecided(&c.target)
	switch now := c.expires(); { // the terms may be others
	case now && !expires:
		w.expiring++
	case !now && expires:
		w.expiring--
	default:
	}
	return wait
}

// named tells whether a service names by now what is being dialed as nobody's. That
// dial is given up then: nobody has answered it.
func (w *worker) named(c *conn) bool {
	if w.relay.options.Undecided == nil || w.asksAgain(c) || c.target.Cluster == nil {
		return false
	}
	w.dialed(c)
	w.dropSide(c, up)
	c.sides[up] = side{fd: -1, pipe: noPipe}
	return true
}

// decide dials those of which it is known by now where they go.
func (w *worker) decide() {
	if len(w.waiters) == 0 || w.waitsYet || w.now-w.decided < int64(undecidedEvery) {
		return
	}
	w.decided = w.now
	kept := w.waiters[:0]
	for _, c := range w.waiters {
		if w.asksAgain(c) {
			kept = append(kept, c)
			continue
		}
		// Its end, which may come at once, must not look for it in the list.
		w.lookAt(c)
		w.decideOn(c)
		c.began = w.now
		w.dialNow(c)
	}
	clear(w.waiters[len(kept):])
	w.waiters = kept
}

// decideOn takes c out of those that wait.
func (w *worker) decideOn(c *conn) {
	c.dialing, c.waiting = false, false
	w.dialing--
}

// forgetUndecided is decideOn for a connection that ends meanwhile.
func (w *worker) forgetUndecided(c *conn) {
	w.decideOn(c)
	if i := slices.Index(w.waiters, c); i >= 0 {
		w.waiters = slices.Delete(w.waiters, i, i+1)
	}
}
