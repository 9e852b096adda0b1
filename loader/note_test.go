package loader

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
)

// TestNote: what was noted last is there for the next process, and goes with the
// instance.
func TestNote(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	noted := func(want []byte) {
		t.Helper()
		got, err := d.Noted()
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("noted %d bytes, want %d; %v", len(got), len(want), err)
		}
	}
	noted(nil)
	if slices.Contains(p.pins("one"), notePin) {
		t.Error("nobody noted anything, and there is a pin")
	}
	for _, n := range []int{0, 1, noteRow - 8, noteRow - 7, 3 * noteRow, NoteMax, 5} {
		text := bytes.Repeat([]byte{byte(n), 7, 9}, n/3+1)[:n]
		if err := d.Note(text); err != nil {
			t.Fatal(err)
		}
		noted(text)
	}
	d = p.restart(t, d)
	noted([]byte{5, 7, 9, 5, 7})
	if err := d.Note(make([]byte, NoteMax+1)); err == nil {
		t.Error("it is too long, and was noted")
	}
	noted([]byte{5, 7, 9, 5, 7})
	if slices.ContainsFunc(p.pins("one"), func(name string) bool { return strings.HasSuffix(name, "_new") }) {
		t.Errorf("pins %v", p.pins("one"))
	}
	// What is no note is not read as one.
	bad, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer bad.Close()
	other := p.create(t, "two")
	if err := bad.Pin(other.dir.pin(notePin)); err != nil {
		t.Fatal(err)
	}
	if text, err := other.Noted(); err == nil {
		t.Errorf("read %q", text)
	}
	for _, d := range []*Datapath{d, other} {
		p.unload(t, d)
	}
	if all := append(p.pins("one"), p.pins("two")...); len(all) > 0 {
		t.Errorf("pins are left: %v", all)
	}
}
