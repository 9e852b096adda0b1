package bpf

import "testing"

// TestClock: in the time namespace of the machine, the process's clock is the
// programs' own. Others are in tests/failure.
func TestClock(t *testing.T) {
	c, err := NewClock()
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Kernel(5) + c.ahead; got != 5 {
		t.Errorf("got %d, want 5", got)
	}
	if got := (Clock{ahead: 3}).Kernel(5); got != 2 {
		t.Errorf("got %d, want 2", got)
	}
}
