// Package pace has what a process does every so often happen at the same moments.
// Each wake-up of an idle Go process costs more than most of what it wakes up for:
// threads are woken, and the runtime's monitor stays awake for a while.
package pace

import (
	"os"
	"time"
)

const (
	// beat is what the moments are multiples of.
	beat = 100 * time.Millisecond
	// early is the part of an interval that a timer may be early: it goes by
	// another clock.
	early = 8
)

// Next returns how long it is from now until the next moment for something that is
// done every d, a multiple of 100 ms: more than nothing, and at most d and an eighth
// of that. The moments of two processes are others, or all on a machine would wake at
// once.
func Next(d time.Duration) time.Duration {
	return next(time.Now(), d, time.Duration(os.Getpid())*beat*618/1000%beat)
}

// next is Next at a time, for a process whose moments are so much later than others'.
func next(now time.Time, d, phase time.Duration) time.Duration {
	left := d - time.Duration((now.UnixNano()-int64(phase))%int64(d))
	if left < d/early {
		left += d
	}
	return left
}
