package fidelity

import "testing"

// TestEnds ends connections in every way and order there is.
func TestEnds(t *testing.T) {
	r := both(t, "ends.py", "", nil)
	r.compare(t, nil)
}

// TestSpeaks has either side speak first, as early as can be.
func TestSpeaks(t *testing.T) {
	r := both(t, "speaks.py", "", nil)
	r.compare(t, nil)
}
