package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
)

// notePin is what a process leaves beside the maps for the next one. It is a map since
// a bpf file system holds nothing else, and it is there only if somebody noted
// something.
const notePin = "note"

const (
	noteRow = 4096
	// NoteMax is how many bytes can be noted.
	NoteMax = 4 << 20
)

type noteRows [][noteRow]byte

// Note keeps text for whoever takes the instance over, in place of what was kept
// before, in one step.
func (d *Datapath) Note(text []byte) error {
	if len(text) > NoteMax {
		return fmt.Errorf("note %d bytes: want at most %d", len(text), NoteMax)
	}
	// Its length, and then the text itself.
	rows := make(noteRows, (8+len(text)+noteRow-1)/noteRow)
	binary.NativeEndian.PutUint64(rows[0][:], uint64(len(text)))
	n := copy(rows[0][8:], text)
	keys := []uint32{0}
	for i := 1; i < len(rows); i++ {
		n += copy(rows[i][:], text[n:])
		keys = append(keys, uint32(i))
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: notePin, Type: ebpf.Array, KeySize: 4, ValueSize: noteRow, MaxEntries: uint32(len(rows))})
	if err != nil {
		return fmt.Errorf("create map %s: %w", notePin, err)
	}
	defer m.Close()
	if err := putAll(m, keys, rows); err != nil {
		return err
	}
	fresh := d.dir.pin(notePin + "_new") // a pin cannot be replaced, but renamed
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove an old pin: %w", err)
	}
	if err := m.Pin(fresh); err != nil {
		return fmt.Errorf("pin map %s: %w", notePin, err)
	}
	if err := os.Rename(fresh, d.dir.pin(notePin)); err != nil {
		return fmt.Errorf("pin map %s: %w", notePin, err)
	}
	return nil
}

// Noted returns what was kept with [Datapath.Note] last; nil: nothing was.
func (d *Datapath) Noted() ([]byte, error) {
	m, err := ebpf.LoadPinnedMap(d.dir.pin(notePin), nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open map %s: %w", notePin, err)
	}
	defer m.Close()
	if m.Type() != ebpf.Array || m.ValueSize() != noteRow || m.MaxEntries() > NoteMax/noteRow+1 {
		return nil, fmt.Errorf("map %s: %s of %d values of %d bytes, which is no note", notePin, m.Type(), m.MaxEntries(), m.ValueSize())
	}
	text := make([]byte, 0, int(m.MaxEntries())*noteRow)
	for i := range m.MaxEntries() {
		var row [noteRow]byte
		if err := m.Lookup(i, &row); err != nil {
			return nil, fmt.Errorf("read map %s: %w", notePin, err)
		}
		text = append(text, row[:]...)
	}
	n := binary.NativeEndian.Uint64(text)
	if text = text[8:]; n > uint64(len(text)) {
		return nil, fmt.Errorf("map %s: %d bytes, of which there are %d", notePin, n, len(text))
	}
	return text[:n], nil
}
