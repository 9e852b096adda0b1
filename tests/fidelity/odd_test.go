package fidelity

import "testing"

// TestOdd has sockets that are used as hardly anybody does.
func TestOdd(t *testing.T) {
	t.Parallel()
	r := both(t, "odd.py", "", nil)
	r.compare(t, nil)
}

// TestRestored: a connection that is restored to where it would be captured, and that
// no handler has, hears at once that it is lost.
func TestRestored(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "redirected", "", nil)
	all, err := w.run("odd.py", "restored elsewhere")
	if err != nil {
		t.Fatal(err)
	}
	for i := range all {
		if got := all[i].text(); got != `"ECONNRESET"` {
			t.Errorf("%s: %s", all[i].name(), got)
		}
	}
	if len(all) == 0 {
		t.Error("nothing was tried")
	}
}
