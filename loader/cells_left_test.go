package loader

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/tests/testutil"
)

func TestLongAgo(t *testing.T) {
	const s = uint64(time.Second)
	for _, tt := range []struct {
		then, now uint64
		want      bool
	}{
		{100 * s, 161 * s, true},
		{100 * s, 160 * s, false},
		{100 * s, 99 * s, false}, // a hook on another processor
		{2 * s, 3 * s, false},    // the machine has just started
		{0, 61 * s, true},
	} {
		if got := longAgo(tt.then, tt.now, time.Minute); got != tt.want {
			t.Errorf("from %d s to %d s: %t, want %t", tt.then/s, tt.now/s, got, tt.want)
		}
	}
}

// TestLeftCells: a cell and a row are taken from those that are gone, and from nobody that
// is open, is younger than a minute, or connects again while sockets are listed.
func TestLeftCells(t *testing.T) {
	p := newPlace(t)
	d, conns := p.direct(t, shop, netip.AddrPortFrom(testutil.WorldV4.Addr(), 8001))
	c, err := p.open(t, shop)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	defer (<-conns[0]).Close()
	var open uint64
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { open = cookieOf(t, int(fd)) })

	own, rows := mapped(t, d.openCells), mapped(t, d.openSent)
	now := uint64(d.monotonic())
	old := now - 2*uint64(time.Minute)
	own.openedAt(int(open % bpf.Cells)).Store(old)
	// Of no socket: cookies do not get there.
	nobody := func(n, opened uint64) (owner uint64) {
		owner = 1<<62 + open + n
		own.openedAt(int(owner % bpf.Cells)).Store(opened)
		own.ownerAt(int(owner % bpf.Cells)).Store(owner)
		rows.ownerAt(int(owner % bpf.Cells)).Store(owner)
		return owner
	}
	gone, young, again := nobody(1, old), nobody(2, now), nobody(3, old)

	all, err := d.leftCells()
	if err != nil {
		t.Fatal(err)
	}
	own.openedAt(int(again % bpf.Cells)).Store(now)
	all.mark()
	if err := all.close(); err != nil {
		t.Error(err)
	}
	type marks struct{ Cell, Row uint64 }
	got := map[string]marks{}
	for name, owner := range map[string]uint64{"open": open, "gone": gone, "young": young, "again": again} {
		n := int(owner % bpf.Cells)
		got[name] = marks{own.ownerAt(n).Load() - owner, rows.ownerAt(n).Load() - owner}
	}
	want := map[string]marks{"open": {}, "gone": {bpf.CellLeft, -gone}, "young": {}, "again": {}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("how much more than its owner is in a cell, and a row (-want +got):\n%s", diff)
	}
}
