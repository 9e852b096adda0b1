package main

import (
	"encoding/json"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/loader"
)

// TestNoteRemovals: what is to be ended is in the note until it is, and the note is the
// same for as long as that is.
func TestNoteRemovals(t *testing.T) {
	r := &removals{ends: newEnds(nil)} // nothing runs
	r.later(goneOf("late"), time.Hour)
	r.later(goneOf("soon"), 0)
	text := func() []byte {
		t.Helper()
		text, err := noteOf(nil, r.all(), map[string][]formerly{"a": {{"b", somewhere}}}).text()
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	first := text()
	time.Sleep(time.Millisecond)
	if diff := cmp.Diff(string(first), string(text())); diff != "" {
		t.Errorf("it is another one a moment later (-first +then):\n%s", diff)
	}
	r.endDue()
	var n note
	if err := json.Unmarshal(text(), &n); err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{} // whether the time is up
	for _, x := range n.Removals {
		got[x.Service] = x.left() == 0
	}
	if diff := cmp.Diff(map[string]bool{"soon": true, "late": false}, got); diff != "" {
		t.Errorf("noted (-want +got):\n%s", diff)
	}
	if len(n.Former) != 1 {
		t.Errorf("former places: %v", n.Former)
	}
	x := notedRemoval{At: monotonicNow() + int64(time.Hour), After: time.Minute}
	if x.left() != time.Minute {
		t.Errorf("by another clock it takes %s", x.left())
	}
}

// TestNoteTooLong: where there is no room for all, what is due first is noted, and what
// was found.
func TestNoteTooLong(t *testing.T) {
	n := &note{Found: []noted{{Name: "found", Addr: somewhere}}}
	for i := range 60000 {
		endpoint := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 80)
		n.Removals = append(n.Removals, notedRemoval{"service", somewhere, endpoint, int64(i), time.Hour})
	}
	text, err := n.text()
	if err != nil || len(text) > loader.NoteMax {
		t.Fatalf("%d bytes, %v", len(text), err)
	}
	var got note
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Found) != 1 || len(got.Removals) != 30000 || got.Removals[0] != n.Removals[0] {
		t.Errorf("%d found, %d removals", len(got.Found), len(got.Removals))
	}
}
