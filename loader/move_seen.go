package loader

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// seenSuffix marks the pins of what was seen of counts.
const seenSuffix = "_seen"

// seen is how much of each count of the one layout the other one has too. A count is the
// sum of both less what was seen, whoever adds to which of them: so the process after one
// that was killed on the way goes on adding, from either side. It is pinned beside the maps
// that are to come, in the layout that the instance has.
type seen struct {
	maps map[string]*ebpf.Map
	// Mapped:
	state, endpoints []byte
	endpointSize     int
	counts           map[string][]uint64
	usage            map[uint64][]byte // what the map has
}

// open makes what is to be written down, or opens what a process that was killed has
// written down.
func (s *seen) open(m *move, dir *dir) error {
	s.maps, s.counts, s.usage = map[string]*ebpf.Map{}, map[string][]uint64{}, map[uint64][]byte{}
	for _, name := range m.moved {
		if how := manners[name]; how != mannerSums && how != mannerCount {
			continue
		}
		var err error
		if m.again != 0 {
			s.maps[name], err = ebpf.LoadPinnedMap(dir.pin(name+seenSuffix), nil)
		} else {
			s.maps[name], err = ebpf.NewMap(seenSpec(m, name))
		}
		if err != nil {
			return fmt.Errorf("map %s%s: %w", name, seenSuffix, err)
		}
		if err := s.load(name); err != nil {
			return err
		}
	}
	return nil
}

// layoutOf is that in which it is written down.
func (m *move) layoutOf(name string) mapLayout {
	if m.again == goesBack {
		return m.to.Maps[name]
	}
	return m.from.Maps[name]
}

func seenSpec(m *move, name string) *ebpf.MapSpec {
	l := m.layoutOf(name)
	spec := &ebpf.MapSpec{Type: ebpf.Array, Flags: unix.BPF_F_MMAPABLE, KeySize: 4, ValueSize: l.ValueSize, MaxEntries: l.MaxEntries}
	switch {
	case manners[name] == mannerCount:
		spec.ValueSize = 8
	case l.Type == uint32(ebpf.Hash):
		spec.Type, spec.Flags, spec.KeySize = ebpf.Hash, unix.BPF_F_NO_PREALLOC, l.KeySize
	default:
	}
	return spec
}

func (s *seen) load(name string) (err error) {
	n := s.maps[name]
	if n.Type() == ebpf.Hash {
		var id uint64
		var raw []byte
		it := n.Iterate()
		for it.Next(&id, &raw) {
			s.usage[id] = append([]byte(nil), raw...)
		}
		return it.Err()
	}
	b, err := mapArray(n, n.ValueSize(), n.MaxEntries())
	switch {
	case err != nil:
		return err
	case manners[name] == mannerCount:
		s.counts[name] = unsafe.Slice((*uint64)(unsafe.Pointer(&b[0])), n.MaxEntries())
	case name == "state":
		s.state = b
	default:
		s.endpoints, s.endpointSize = b, elementSize(n.ValueSize())
	}
	return nil
}

func (s *seen) pin(dir *dir) error {
	for name, n := range s.maps {
		if err := n.Pin(dir.pin(name + seenSuffix)); err != nil {
			return fmt.Errorf("pin map %s%s: %w", name, seenSuffix, err)
		}
	}
	return nil
}

// pinned tells whether everything that open wants to find is there.
func (s *seen) pinned(m *move, dir *dir) bool {
	for _, name := range m.moved {
		if how := manners[name]; how != mannerSums && how != mannerCount {
			continue
		}
		if _, err := os.Stat(dir.pin(name + seenSuffix)); err != nil {
			return false
		}
	}
	return true
}

// setUsage notes what was seen of a container's account, and keeps it.
func (s *seen) setUsage(id uint64, raw []byte) error {
	s.usage[id] = raw
	if err := s.maps["usage_by_group"].Put(id, raw); err != nil {
		return fmt.Errorf("note what was seen: %w", err)
	}
	return nil
}

// ours gives a value that was seen in this build's layout, theirs one of the other
// layout as it is written down.
func (*seen) ours(m *move, name string, raw []byte) []byte {
	if m.again == goesBack {
		return raw
	}
	return m.value(name, raw)
}

func (*seen) theirs(m *move, name string, raw []byte) []byte {
	if m.again == goesBack {
		return m.value(name, raw)
	}
	return raw
}

func (s *seen) close() error {
	var errs []error
	unmap := func(b []byte) {
		if b != nil {
			errs = append(errs, unix.Munmap(b))
		}
	}
	unmap(s.state)
	unmap(s.endpoints)
	for _, c := range s.counts {
		size := elementSize(8) * len(c)
		unmap(unsafe.Slice((*byte)(unsafe.Pointer(&c[0])), size))
	}
	for _, n := range s.maps {
		errs = append(errs, n.Close())
	}
	*s = seen{}
	return errors.Join(errs...)
}
