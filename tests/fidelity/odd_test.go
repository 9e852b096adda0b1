package fidelity

import "testing"

// TestOdd has sockets that are used as hardly anybody does.
func TestOdd(t *testing.T) {
	t.Parallel()
	r := both(t, "odd.py", "", nil)
	r.compare(t, nil)
}
