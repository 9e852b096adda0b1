package pace

import (
	"math/rand/v2"
	"testing"
	"time"
)

// TestTogether: whatever the time and the process, what is done at different intervals
// is done at moments in common, and neither at once nor later than it may be.
func TestTogether(t *testing.T) {
	start := time.Date(2026, 11, 26, 8, 0, 0, 0, time.UTC)
	for range 10_000 {
		now, phase := start.Add(rand.N(time.Hour)), rand.N(beat)
		for _, d := range []time.Duration{beat, 2 * beat, 10 * beat} {
			left := next(now, d, phase)
			if left < d/early || left > d+d/early {
				t.Fatalf("every %v, at %v: %v from then", d, now, left)
			}
			if off := time.Duration(now.Add(left).UnixNano()) % d; off != phase {
				t.Fatalf("every %v, at %v: %v after a moment of all, want %v", d, now, off, phase)
			}
		}
	}
}

// TestEarly: a timer that ends a little before its moment does not end again at it.
func TestEarly(t *testing.T) {
	moment := time.Date(2026, 11, 26, 8, 0, 0, 0, time.UTC)
	if got, want := next(moment.Add(-time.Microsecond), beat, 0), beat+time.Microsecond; got != want {
		t.Errorf("%v, want %v", got, want)
	}
	if got := next(moment, beat, 0); got != beat {
		t.Errorf("%v at a moment, want %v", got, beat)
	}
}
