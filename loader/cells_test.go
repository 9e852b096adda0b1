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

// mapped maps cells until the test has ended.
func mapped(t testing.TB, open func() (*cells, error)) *cells {
	t.Helper()
	c, err := open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// decisionOn gives the decision on a socket, and tells whether that has a cell.
func decisionOn(t testing.TB, d *Datapath, fd int) (v bpf.Decision, cell bool) {
	t.Helper()
	if raw := mapped(t, d.openCells).of(cookieOf(t, fd)); raw != nil {
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
	mapped(t, d.openCells).ownerAt(int(cookie % bpf.Cells)).Store(0)
}
