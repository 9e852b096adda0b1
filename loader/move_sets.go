package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"golang.org/x/sys/unix"
)

// Endpoint sets are arrays in an array, and only hooks may look into them: to open one
// takes CAP_SYS_ADMIN. So a program of the process's (bpf/former.bpf.c) copies the rows of
// one to where the process reads them. It writes the set anew in its own layout, with the
// turns and the verdict, and puts all of them in place at once, before the first hook is
// swapped. Nobody publishes meanwhile: the process before is gone.

// rowsTogether is how many rows the program copies at once, at most.
const rowsTogether = 4096

// formerSets reads endpoint sets of another layout.
type formerSets struct {
	program *ebpf.Program
	rows    []byte // the map former_rows in our memory
	rowSize int
	// How each kind of row moves.
	tiers, config, state, endpoint []span
	table                          field // the entries of tables in a row
}

// rowSpans pairs the fields of one kind of row.
func (m *move) rowSpans(kind string) []span {
	from, to := m.from.Maps["sets"], m.to.Maps["sets"]
	return spansOf(withPrefix(from.Value, kind), withPrefix(to.Value, kind))
}

func withPrefix(fields []field, kind string) (all []field) {
	for _, f := range fields {
		if strings.HasPrefix(f.Name, kind+".") {
			all = append(all, f)
		}
	}
	return all
}

// rowOf returns the size of a row, and where the entries of a table are in one.
func rowOf(l *mapLayout) (row int, table field) {
	for _, f := range withPrefix(l.Value, "set_row") {
		row = max(row, int(f.At+f.Size))
	}
	table, _ = find(l.Value, "set_table.entry")
	return row, table
}

// checkSets tells whether endpoint sets can be moved.
func (m *move) checkSets() error {
	was := m.from.Maps["sets"]
	row, table := rowOf(&was)
	if row == 0 || row%8 != 0 || table.Size == 0 || table.Size%4 != 0 {
		return fmt.Errorf("%w: rows of endpoint sets have %d bytes, and %d of tables", ErrABI, row, table.Size)
	}
	for _, kind := range []string{"set_tiers", "set_config", "set_state", "set_endpoint"} {
		if len(m.rowSpans(kind)) == 0 {
			return fmt.Errorf("%w: endpoint sets have no %s", ErrABI, kind)
		}
	}
	return nil
}

// loadRows loads the program that copies rows.
func (m *move) loadRows() (_ *formerSets, err error) {
	spec, err := bpf.Former()
	if err != nil {
		return nil, err
	}
	was := m.from.Maps["sets"]
	f := &formerSets{
		tiers: m.rowSpans("set_tiers"), config: m.rowSpans("set_config"),
		state: m.rowSpans("set_state"), endpoint: m.rowSpans("set_endpoint"),
	}
	f.rowSize, f.table = rowOf(&was)
	delete(spec.Programs, bpf.ProgTell)
	delete(spec.Maps, "events")
	spec.Maps[bpf.FormerSets].MaxEntries = was.MaxEntries
	spec.Maps[bpf.FormerRows].Value, spec.Maps[bpf.FormerRows].ValueSize = nil, uint32(f.rowSize)
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
		MapReplacements: map[string]*ebpf.Map{bpf.FormerSets: m.bulk["sets"]},
	})
	if err != nil {
		return nil, fmt.Errorf("load the program that reads endpoint sets: %w", err)
	}
	defer c.Close()
	f.rows, err = unix.Mmap(c.Maps[bpf.FormerRows].FD(), 0, rowsTogether*f.rowSize, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map rows of endpoint sets: %w", err)
	}
	f.program = c.DetachProgram(bpf.ProgRows)
	return f, nil
}

func (f *formerSets) close() error {
	if f == nil {
		return nil
	}
	return errors.Join(f.program.Close(), unix.Munmap(f.rows))
}

// read appends all rows of a set to b.
func (f *formerSets) read(b []byte, id uint32) ([]byte, error) {
	for first := uint32(0); ; first += rowsTogether {
		q := bpf.SetQuery{Set: id, First: first}
		const size = unsafe.Sizeof(q)
		frame := make([]byte, dryRunAt+size)
		copy(frame[dryRunAt:], (*[size]byte)(unsafe.Pointer(&q))[:])
		n, err := f.program.Run(&ebpf.RunOptions{Data: frame})
		if err != nil {
			return nil, err
		}
		if n > rowsTogether {
			return nil, fmt.Errorf("%d rows were copied", int32(n))
		}
		b = append(b, f.rows[:int(n)*f.rowSize]...)
		if n < rowsTogether {
			return b, nil
		}
	}
}

// rowAs gives one row in this build's layout.
func rowAs[R setRow](raw []byte, spans []span) (r R) {
	b := unsafe.Slice((*byte)(unsafe.Pointer(&r)), unsafe.Sizeof(r))
	for _, s := range spans {
		copy(b[s.to:s.to+s.size], raw[s.from:])
	}
	return r
}

// translate appends a set in this build's layout to all.
func (f *formerSets) translate(all []bpf.SetRow, raw []byte) ([]bpf.SetRow, error) {
	count := len(raw) / f.rowSize
	row := func(n int) []byte { return raw[n*f.rowSize:][:f.rowSize] }
	if count < bpf.SetHead {
		return nil, fmt.Errorf("a set of %d rows", count)
	}
	tiers := rowAs[bpf.SetTiers](row(rowTiers), f.tiers)
	endpoints := 0
	for i := range tiers.Tier {
		endpoints = max(endpoints, int(tiers.Tier[i].First)+int(tiers.Tier[i].Count))
	}
	if bpf.SetHead+endpoints > count {
		return nil, fmt.Errorf("%d endpoints in a set of %d rows", endpoints, count)
	}
	perRow := int(f.table.Size / 4)
	var tables [len(tiers.Tier)][]uint32
	next := uint32(bpf.SetHead + endpoints)
	for i := range tiers.Tier {
		t := &tiers.Tier[i]
		from, rows := int(t.Table), (int(t.Entries)+perRow-1)/perRow
		if rows > 0 && (from < bpf.SetHead+endpoints || from+rows > count) {
			return nil, fmt.Errorf("a table of %d rows at %d in a set of %d", rows, from, count)
		}
		for n := range int(t.Entries) {
			tables[i] = append(tables[i], binary.NativeEndian.Uint32(row(from + n/perRow)[int(f.table.At)+4*(n%perRow):]))
		}
		t.Table = next
		next += tableRows(len(tables[i]))
	}
	all = append(all, toRow(tiers), toRow(rowAs[bpf.SetConfig](row(rowConfig), f.config)),
		toRow(rowAs[bpf.SetState](row(rowState), f.state)))
	for n := range endpoints {
		all = append(all, toRow(rowAs[bpf.SetEndpoint](row(bpf.SetHead+n), f.endpoint)))
	}
	return appendTables(all, tables[:]...), nil
}

// setsInUse are those that services point to. It fails with [ErrABI] where there is no
// place for one here.
func setsInUse(services *ebpf.Map, id field, ids uint32) ([]uint32, error) {
	var all []uint32
	var key, value []byte
	it := services.Iterate()
	for it.Next(&key, &value) {
		n := binary.NativeEndian.Uint32(value[id.At:])
		if n == noSet {
			continue
		}
		if n >= ids {
			return nil, fmt.Errorf("%w: a service has endpoint set %d, and this build has room for %d", ErrABI, n, ids)
		}
		all = append(all, n)
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read map services: %w", err)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// moveSets writes the sets of all services in this build's layout, where no hook sees
// them yet. services are in that layout already.
func (d *Datapath) moveSets(m *move) error {
	s := &d.sets
	s.mu.Lock()
	defer s.mu.Unlock()
	ids, err := setsInUse(d.maps.Services, field{At: uint32(unsafe.Offsetof(bpf.Service{}.Id))}, bpf.Sets)
	if err != nil {
		return err
	}
	var raw []byte
	for part := range slices.Chunk(ids, setsTogether()) {
		all := make([]movedSet, 0, len(part))
		for _, id := range part {
			if raw, err = m.sets.read(raw[:0], id); err != nil {
				return fmt.Errorf("read endpoint set %d: %w", id, err)
			}
			if len(raw) == 0 {
				continue // its service was never published
			}
			rows, err := m.sets.translate(nil, raw)
			if err != nil {
				return fmt.Errorf("%w: endpoint set %d: %w", ErrABI, id, err)
			}
			for i := len(s.keys); i < len(rows); i++ {
				s.keys = append(s.keys, uint32(i))
			}
			all = append(all, movedSet{id: id, rows: rows})
		}
		if err := s.putMoved(all); err != nil {
			return err
		}
	}
	return nil
}

// movedSet is a set in this build's layout.
type movedSet struct {
	id   uint32
	rows []bpf.SetRow
	made *ebpf.Map
	err  error
}

// putMoved makes the maps of sets and puts them in place.
func (s *setTable) putMoved(all []movedSet) error {
	inParallel(all, func(part []movedSet) {
		for n := range part {
			part[n].made, part[n].err = s.make(part[n].rows)
		}
	})
	ids, fds := make([]uint32, 0, len(all)), make([]uint32, 0, len(all))
	var errs []error
	for n := range all {
		if all[n].made == nil {
			errs = append(errs, all[n].err)
			continue
		}
		defer all[n].made.Close() // the outer map has it then
		ids, fds = append(ids, all[n].id), append(fds, uint32(all[n].made.FD()))
	}
	if err := errors.Join(errs...); err != nil || len(ids) == 0 {
		return err
	}
	if err := s.put(ids, fds); err != nil {
		return fmt.Errorf("publish %d endpoint sets: %w", len(ids), err)
	}
	return nil
}
