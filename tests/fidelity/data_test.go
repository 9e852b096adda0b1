package fidelity

import (
	"strings"
	"testing"
)

// TestWire looks at what the application's options make of the packets.
func TestWire(t *testing.T) {
	t.Parallel()
	r := both(t, "wire.py", "", nil)
	r.compare(t, nil)
}

// TestData writes and reads in every way.
func TestData(t *testing.T) {
	t.Parallel()
	r := both(t, "data.py", "", nil)
	r.compare(t, known{
		// The leg to the handler has loopback's sizes.
		"the way there": strings.NewReplacer("false", "true"),
	})
}
