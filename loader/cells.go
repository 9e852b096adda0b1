package loader

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"golang.org/x/sys/unix"
)

// cellMinAge protects a cell whose socket is only just being made.
const cellMinAge = time.Minute

// cells is a map, in our memory, of what belongs to sockets: each value says whose it is
// (bpf/include/decision.h, bpf/include/sent.h).
type cells struct {
	page  []byte
	size  int // of a value
	count int
	owner int // where in a value the socket's cookie is
}

func mapCells(m *ebpf.Map, owner uint32) (*cells, error) {
	c := &cells{size: int(m.ValueSize()+7) &^ 7, count: int(m.MaxEntries()), owner: int(owner)}
	whole := os.Getpagesize() - 1
	var err error
	c.page, err = unix.Mmap(m.FD(), 0, (c.size*c.count+whole)&^whole, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map cells: %w", err)
	}
	return c, nil
}

func (c *cells) close() error {
	if c == nil {
		return nil
	}
	if err := unix.Munmap(c.page); err != nil {
		return fmt.Errorf("unmap cells: %w", err)
	}
	return nil
}

func (c *cells) at(n int) []byte { return c.page[n*c.size:][:c.size] }

// ownerAt is whose a value is. Hooks write it too.
func (c *cells) ownerAt(n int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&c.at(n)[c.owner]))
}

// of returns a copy of what is in a socket's own cell; nil: it has none.
func (c *cells) of(cookie uint64) []byte {
	if c == nil {
		return nil
	}
	n := int(cookie % uint64(c.count))
	if c.ownerAt(n).Load()&^bpf.CellLeft != cookie {
		return nil
	}
	value := bytes.Clone(c.at(n))
	if c.ownerAt(n).Load()&^bpf.CellLeft != cookie {
		return nil // it has ended meanwhile
	}
	return value
}

// openCells and openSent map what hooks have there. They are for the caller to close, and
// for as short as can be: all of it counts as the process's memory meanwhile.
func (d *Datapath) openCells() (*cells, error) {
	return mapCells(d.maps.Cells, uint32(unsafe.Offsetof(bpf.Decision{}.Owner)))
}

func (d *Datapath) openSent() (*cells, error) {
	return mapCells(d.maps.SentByCell, uint32(unsafe.Offsetof(bpf.Sent{}.Owner)))
}

// openCells maps those of hooks of the other layout; nil: they have none.
func (m *move) openCells() (*cells, error) {
	if !m.hasCells() {
		return nil, nil
	}
	return mapCells(m.old["cells"], uint32(at(m.between("cells").from, "owner")))
}

// leaveCells has others take the cells of sockets that are gone. Hooks give them back, but
// for those of whose end no hook hears: where another agent has cleared the flags of
// sockops, or the kernel itself refused an MPTCP socket's connect. Who is not gone after
// all has its cell until somebody takes it. Called with d.mu.
func (d *Datapath) leaveCells() error {
	all, err := d.leftCells()
	if err == nil {
		all.mark()
	}
	return errors.Join(err, all.close())
}

// leftCells are cells, and rows of what was sent, whose sockets no dump shows.
type leftCells struct {
	cells, rows *cells
	gone        map[uint64]oldCell // by whose they are
}

func (l *leftCells) close() error { return errors.Join(l.cells.close(), l.rows.close()) }

type oldCell struct {
	n      int
	opened uint64
}

// leftCells is for the caller to close, also when it fails.
func (d *Datapath) leftCells() (*leftCells, error) {
	now := uint64(d.monotonic())
	all := &leftCells{gone: map[uint64]oldCell{}}
	var err error
	if all.cells, err = d.openCells(); err != nil {
		return all, err
	}
	if all.rows, err = d.openSent(); err != nil {
		return all, err
	}
	for n := range all.cells.count {
		opened := all.cells.openedAt(n).Load()
		if !longAgo(opened, now, cellMinAge) {
			continue
		}
		for _, owner := range []uint64{all.cells.ownerAt(n).Load(), all.rows.ownerAt(n).Load()} {
			if owner != 0 && owner&bpf.CellLeft == 0 {
				all.gone[owner] = oldCell{n, opened}
			}
		}
	}
	// Twice, as in reconcile: a dump is no snapshot.
	for range 2 {
		if len(all.gone) == 0 {
			break
		}
		err := d.network.sockets(func(s *socket) { delete(all.gone, s.cookie()) })
		if err != nil {
			return all, err
		}
	}
	return all, nil
}

// mark has others take them. A socket that had been refused is in no dump: it may have
// connected again meanwhile, which is a new decision.
func (l *leftCells) mark() {
	for owner, c := range l.gone {
		if l.cells.openedAt(c.n).Load() == c.opened {
			l.cells.ownerAt(c.n).CompareAndSwap(owner, owner|bpf.CellLeft)
			l.rows.ownerAt(c.n).CompareAndSwap(owner, 0)
		}
	}
}

// openedAt is when the decision in one of this build's cells was taken, by the hooks' clock;
// a cell that is just being taken has that of who had it before.
func (c *cells) openedAt(n int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&c.at(n)[unsafe.Offsetof(bpf.Decision{}.Opened)]))
}

// hasCells tells whether hooks of the other layout have cells, which is another one.
func (m *move) hasCells() bool {
	_, known := m.from.Maps["cells"]
	return known && m.has("cells")
}

// checkCells fails with [ErrABI] when hooks could not find what others have in cells.
func (m *move) checkCells() error {
	if !m.hasCells() {
		return nil
	}
	from, to, stored := m.from.Maps["cells"], m.to.Maps["cells"], m.from.Maps["decisions"]
	owner, ok := find(from.Value, "owner")
	if !ok || owner.Size != 8 || from.MaxEntries != to.MaxEntries || from.Flags != to.Flags || !slices.Equal(from.Value, stored.Value) {
		return fmt.Errorf("%w: map cells differs from ABI %d to %d in more than its fields, and cannot be moved while hooks use it",
			ErrABI, m.from.ABI, m.to.ABI)
	}
	return nil
}
