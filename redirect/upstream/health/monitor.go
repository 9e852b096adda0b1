package health

import (
	"math/rand/v2"
	"sync/atomic"
	"time"
)

// Monitor is what all endpoints of a cluster share, over every reload: one clock,
// one source of randomness, and the count of changes that tells groups when to
// look again.
type Monitor struct {
	now     func() time.Duration
	random  func() uint64
	changes atomic.Uint64
}

// NewMonitor returns a monitor. now is a monotonic clock with any origin, and
// random gives uniform bits; nil means the process's own. Both are called from
// many goroutines at once.
func NewMonitor(now func() time.Duration, random func() uint64) *Monitor {
	if now == nil {
		start := time.Now()
		now = func() time.Duration { return time.Since(start) }
	}
	if random == nil {
		random = rand.Uint64
	}
	return &Monitor{now: now, random: random}
}

// Random returns 64 uniform bits.
func (m *Monitor) Random() uint64 { return m.random() }
