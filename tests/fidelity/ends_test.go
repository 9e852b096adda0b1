package fidelity

import "testing"

// modes are the ways to connect after which a connection has to be the same.
var modes = []string{"connect: adaptive", "connect: early"}

// TestEnds ends connections in every way and order there is.
func TestEnds(t *testing.T) {
	t.Parallel()
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			r := both(t, "ends.py", mode, nil)
			r.compare(t, nil)
		})
	}
}

// TestSpeaks has either side speak first, as early as can be.
func TestSpeaks(t *testing.T) {
	t.Parallel()
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			r := both(t, "speaks.py", mode, nil)
			r.compare(t, nil)
		})
	}
}
