package events

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

// patientRing notes how long it was waited for.
type patientRing struct {
	fakeRing
	waits []time.Duration
}

func (p *patientRing) wait(_ context.Context, d time.Duration) { p.waits = append(p.waits, d) }

// TestGather: what hooks tell elsewhere is in the same collection, and is asked for more
// often as long as there may be more.
func TestGather(t *testing.T) {
	ring, given, calls := &patientRing{}, &sink{}, 0
	c := newCollector(Options{Sinks: []Sink{given}, Gather: func() bool {
		calls++
		if calls < 3 {
			ring.put(raw(event(uint64(calls), flow.PathDirect, bpf.EndingClosed)))
		}
		return calls < 3
	}}, ring)
	for n := range 4 {
		if err := c.poll(); err != nil {
			t.Fatal(err)
		}
		c.wait(t.Context())
		want := []uint64{uint64(n + 1)}
		if n >= 2 {
			want = nil
		}
		var got []uint64
		for _, r := range given.taken() {
			got = append(got, r.Cookie)
		}
		if !slices.Equal(got, want) {
			t.Errorf("collection %d has %v, want %v", n, got, want)
		}
		if often := ring.waits[n] <= gatherEvery; often != (n < 2) {
			t.Errorf("collection %d: the next one comes after %v", n, ring.waits[n])
		}
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := c.poll(); err != nil || calls != 4 {
		t.Errorf("a closed collector: %d calls, %v", calls, err)
	}
}
