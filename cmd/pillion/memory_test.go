package main

import (
	"testing"
	"time"
)

// TestLitter: memory is given back after much was put in force, when it is quiet
// again, and not all the time.
func TestLitter(t *testing.T) {
	t.Parallel()
	var l litter
	now := time.Now()
	after := func(d time.Duration, want bool) {
		t.Helper()
		now = now.Add(d)
		if got := l.due(now); got != want {
			t.Errorf("due: %v, want %v", got, want)
		}
	}
	after(time.Hour, false)
	l.add(litterLeast-1, now)
	after(litterQuiet, false)
	l.add(1, now)
	after(litterQuiet-1, false)
	after(1, true)
	after(litterLate-litterQuiet-1, false)
	after(1, true) // once more
	after(time.Hour, false)
	l.add(litterLeast, now)
	after(litterQuiet, true)
	l.add(litterLeast, now)
	after(litterEvery-1, false)
	after(1, true)
}
