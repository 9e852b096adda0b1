package fidelity

import (
	"fmt"
	"maps"
	"slices"
	"testing"
)

// TestPressure has readers stall: the writer stops, nothing is kept without
// bound, and all goes on when they read again.
func TestPressure(t *testing.T) {
	t.Parallel()
	r := both(t, "presses.py", "", nil)
	r.compare(t, nil)
}

// TestPressureMemory has many connections stall, and looks at what the handler
// needs for them.
func TestPressureMemory(t *testing.T) {
	t.Parallel()
	r := both(t, "presses.py", "", nil, "memory")
	r.compare(t, nil)
}

// rounds is how many round trips pingpong.py makes of a kind.
const rounds = 10

// TestLatency sends messages back and forth. A kind of message that meets an
// acknowledgement put off does so nearly every time; a machine that is busy is
// late now and then. So with Pillion at most half of a kind may be slow that are
// not without, and of all a twentieth.
func TestLatency(t *testing.T) {
	t.Parallel()
	r := both(t, "pingpong.py", "", nil)
	for n := range r.direct {
		d, p := &r.direct[n], &r.redirected[n]
		t.Run(d.name(), func(t *testing.T) {
			if d.Trouble != "" || p.Trouble != "" {
				t.Fatalf("directly: %s\nredirected: %s", d.Trouble, p.Trouble)
			}
			compareSlow(t, d, p)
		})
	}
}

func compareSlow(t *testing.T, d, p *seen) {
	t.Helper()
	direct, redirected := slowOf(t, d), slowOf(t, p)
	more := 0
	for _, kind := range slices.Sorted(maps.Keys(redirected)) {
		extra := redirected[kind] - direct[kind]
		more += max(extra, 0)
		if extra > rounds/2 {
			t.Errorf("%s: %d of %d are slow, %d without Pillion", kind, redirected[kind], rounds, direct[kind])
		}
	}
	t.Logf("slow: %d without Pillion, %d with it", sum(direct), sum(redirected))
	if all := len(redirected) * rounds; all == 0 || len(direct) != len(redirected) || more > all/20 {
		t.Errorf("%d of %d more are slow with Pillion", more, all)
	}
}

// slowOf returns how many round trips of each kind were slow.
func slowOf(t *testing.T, s *seen) map[string]int {
	t.Helper()
	kinds, ok := s.Saw.(map[string]any)
	if !ok {
		t.Fatalf("%s saw %v", s.name(), s.Saw)
	}
	counts := map[string]int{}
	for kind, n := range kinds {
		if _, err := fmt.Sscan(fmt.Sprint(n), new(int)); err != nil {
			t.Fatalf("%s: %v", kind, n)
		}
		counts[kind] = int(n.(float64))
	}
	return counts
}

func sum(counts map[string]int) (all int) {
	for _, n := range counts {
		all += n
	}
	return all
}
