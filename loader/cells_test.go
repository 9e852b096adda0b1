package loader

import (
	"testing"

	"github.com/pillion-project/pillion/bpf"
	"golang.org/x/sys/unix"
)

func cookieOf(t testing.TB, fd int) uint64 {
	t.Helper()
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		t.Fatal(err)
	}
	return cookie
}

// decisionOn gives the decision on a socket, and tells whether that has a cell.
func decisionOn(t testing.TB, d *Datapath, fd int) (v bpf.Decision, cell bool) {
	t.Helper()
	if raw := d.cells.of(cookieOf(t, fd)); raw != nil {
		return valueAs[bpf.Decision](raw), true
	}
	if err := d.maps.Decisions.Lookup(uint32(fd), &v); err != nil {
		t.Fatal(err)
	}
	return v, false
}

// withoutCell moves the decision on a socket from its cell to socket storage.
func withoutCell(t testing.TB, d *Datapath, fd int) {
	t.Helper()
	cookie := cookieOf(t, fd)
	v, cell := decisionOn(t, d, fd)
	if !cell {
		t.Fatal("the socket has no cell")
	}
	v.Owner = 0
	if err := d.maps.Decisions.Put(uint32(fd), v); err != nil {
		t.Fatal(err)
	}
	d.cells.ownerAt(int(cookie % bpf.Cells)).Store(0)
}
