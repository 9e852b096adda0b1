package events

import (
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

// What one collector has waiting, another joins: one record comes out of both.
func TestHalvesAreHandedOver(t *testing.T) {
	one, other := &sink{}, &sink{}
	told, src := &fakeHandler{}, &fakeRing{}
	old := newCollector(Options{Handler: told, Sinks: []Sink{one}}, src)
	told.end(flow.Record{Cookie: 1, Path: flow.PathRelay, Sent: 10}, flow.Record{Cookie: 2, Path: flow.PathRelay, Sent: 20})
	now := time.Now()
	old.joiner.add(fromKernel, &flow.Record{Cookie: 3, Path: flow.PathRelay}, now)
	old.joiner.add(fromKernel, &flow.Record{Cookie: 2, Path: flow.PathRelay}, now)

	f := old.Freeze()
	halves := f.Halves()
	first := one.taken()
	if len(halves) != 2 || len(first) != 1 || first[0].Cookie != 2 || first[0].Sent != 20 {
		t.Fatalf("%d halves, records %+v", len(halves), first)
	}
	// Taken back, nothing is lost.
	f.Thaw()
	if old.joiner.pending() != 2 {
		t.Errorf("%d wait after a thaw, want 2", old.joiner.pending())
	}

	f = old.Freeze()
	halves = f.Halves()
	if err := f.Leave(); err != nil {
		t.Fatal(err)
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	if more := one.taken(); len(more) != 0 || src.closed != 1 {
		t.Errorf("the first gave out %+v after all; its ring was closed %d times", more, src.closed)
	}

	next := newCollector(Options{Handler: &fakeHandler{}, Sinks: []Sink{other}}, &fakeRing{})
	next.Adopt(halves)
	next.joiner.add(fromKernel, &flow.Record{Cookie: 1, Path: flow.PathRelay}, now)
	next.joiner.add(fromHandler, &flow.Record{Cookie: 3, Path: flow.PathRelay, Sent: 30}, now)
	second := other.taken()
	if len(second) != 2 || second[0].Sent != 10 || second[1].Sent != 30 || next.joiner.pending() != 0 || next.joiner.unmatched.Load() != 0 {
		t.Errorf("the second gave out %+v, %d wait, %d unmatched", second, next.joiner.pending(), next.joiner.unmatched.Load())
	}
}

// Older records come before, as far as there is room.
func TestHistoryRemembers(t *testing.T) {
	h := history{max: 4}
	for n := range 2 {
		h.add(&flow.Record{Cookie: uint64(n + 10)})
	}
	h.remember([]flow.Record{{Cookie: 1}, {Cookie: 2}, {Cookie: 3}})
	h.add(&flow.Record{Cookie: 12})
	var got []uint64
	for _, r := range h.list() {
		got = append(got, r.Cookie)
	}
	want := [...]uint64{3, 10, 11, 12}
	if len(got) != len(want) || [4]uint64(got) != want {
		t.Errorf("history %v, want %v", got, want)
	}
}
