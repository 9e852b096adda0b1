package health

import (
	"math"
	"sync/atomic"
	"time"
)

// Ejector is the health of one endpoint. It outlives reloads. All methods are
// lock-free and safe for concurrent use; where two of them race, either order
// is a fair view of an endpoint that just failed and just answered.
type Ejector struct {
	monitor *Monitor
	// until is when the ejection is over, in nanoseconds of the monitor's
	// clock; 0 means not ejected. It stays set once the time has passed, until
	// a dial connects: the endpoint is then on trial.
	until     atomic.Int64
	failures  atomic.Uint32 // in a row, while not ejected
	round     atomic.Uint32 // of the present ejection, from 1
	ejections atomic.Uint64
	down      atomic.Bool // says an active check
}

// NewEjector returns the health of an endpoint that nothing is known about.
func NewEjector(m *Monitor) *Ejector { return &Ejector{monitor: m} }

// Ejected reports whether the endpoint is waiting. On trial it is not, until
// one dial has begun.
func (e *Ejector) Ejected() bool {
	until := e.until.Load()
	return until != 0 && int64(e.monitor.now()) < until
}

// SetDown says what an active check has found.
func (e *Ejector) SetDown(down bool) {
	if e.down.Swap(down) != down {
		e.monitor.changes.Add(1)
	}
}

// Down reports whether an active check says that the endpoint is down.
func (e *Ejector) Down() bool { return e.down.Load() }

// Ejections returns how many times the endpoint was ejected. Trials that failed
// prolong an ejection and do not count.
func (e *Ejector) Ejections() uint64 { return e.ejections.Load() }

// Resume adds ejections that another process counted. They are over.
func (e *Ejector) Resume(ejections uint64) { e.ejections.Add(ejections) }

// Dialing says that a dial begins. If the endpoint is on trial, this dial is
// the trial: the next, longer wait begins now and not when the dial fails, so
// that a dial that hangs does not draw others after it.
func (e *Ejector) Dialing(c *Config) {
	until := e.until.Load()
	if until == 0 || c.Failures == 0 {
		return
	}
	now := int64(e.monitor.now())
	if now < until {
		return // picked in panic, or another dial is the trial
	}
	round := e.round.Load()
	if round < math.MaxUint32 {
		round++
	}
	if e.until.CompareAndSwap(until, e.end(c, now, round)) {
		e.round.Store(round)
		e.monitor.changes.Add(1)
	}
}

// Connected says that a dial was answered: an ejection ends.
func (e *Ejector) Connected() {
	// Loads first: on a healthy endpoint nothing is written, and the cache
	// line stays shared.
	if e.failures.Load() != 0 {
		e.failures.Store(0)
	}
	if e.until.Load() != 0 && e.until.Swap(0) != 0 {
		e.monitor.changes.Add(1)
	}
}

// Failed says that a dial failed. While the endpoint is ejected that tells
// nothing new: the dial is an old one, or the trial, and Dialing has already
// prolonged the wait.
func (e *Ejector) Failed(c *Config) {
	if c.Failures == 0 || e.until.Load() != 0 {
		return
	}
	if int64(e.failures.Add(1)) < int64(c.Failures) {
		return
	}
	if e.until.CompareAndSwap(0, e.end(c, int64(e.monitor.now()), 1)) {
		e.failures.Store(0)
		e.round.Store(1)
		e.ejections.Add(1)
		e.monitor.changes.Add(1)
	}
}

// end returns the end of a wait that begins now. It is never 0, which would
// mean that there is none.
func (e *Ejector) end(c *Config, now int64, round uint32) int64 {
	wait := int64(c.wait(round, e.monitor.random()))
	if now > math.MaxInt64-wait {
		return math.MaxInt64
	}
	return max(now+wait, 1)
}

// left returns how much of the wait is left at now, and 0 when the endpoint may
// be picked.
func (e *Ejector) left(now time.Duration) time.Duration {
	return max(time.Duration(e.until.Load())-now, 0)
}
