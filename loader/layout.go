package loader

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/pillion-project/pillion/bpf"
)

// layoutsPin is the pin of what a process of another build is told about the maps.
const layoutsPin = "layouts"

// layoutForm changes when an older build would read something else out of a
// description, or when maps come to mean something else whose names stay.
const (
	layoutForm = 2
	// Before, decisions on sockets were in socket storage alone: such a build would not
	// find the others.
	layoutFormStored = 1
)

// description describes the maps of an instance, so that a build of another ABI can move
// what they hold: by the names of fields, which mean the same in every build. A field
// that comes to mean something else gets another name; enums grow at their ends only.
type description struct {
	Form  int                         `json:"form"`
	ABI   uint32                      `json:"abi"`
	Maps  map[string]mapLayout        `json:"maps"`
	Enums map[string]map[string]int64 `json:"enums"`
}

// mapLayout describes one map. Of a ring, and of a map of maps, Value is what the
// records, and the values of the inner maps, consist of.
type mapLayout struct {
	Type       uint32  `json:"type"`
	Flags      uint32  `json:"flags"`
	MaxEntries uint32  `json:"max"`
	KeySize    uint32  `json:"key_size"`
	ValueSize  uint32  `json:"value_size"`
	Key        []field `json:"key,omitempty"`
	Value      []field `json:"value,omitempty"`
}

// field is a number, or a run of them, somewhere in a key or a value.
type field struct {
	Name string `json:"n"`
	At   uint32 `json:"a"`
	Size uint32 `json:"s"`
}

func (m *mapLayout) equal(o *mapLayout) bool {
	return m.Type == o.Type && m.Flags == o.Flags && m.MaxEntries == o.MaxEntries && m.KeySize == o.KeySize &&
		m.ValueSize == o.ValueSize && slices.Equal(m.Key, o.Key) && slices.Equal(m.Value, o.Value)
}

// contents are the types of what is not said by a map itself.
var contents = map[string][]string{
	"events": {"conn_event"},
	"held":   {"held"},
	"sets":   {"set_row", "set_tiers", "set_config", "set_state", "set_endpoint", "set_table"},
}

// ownLayouts describes the maps of this build.
func ownLayouts(specs []*ebpf.CollectionSpec) (*description, error) {
	types, err := bpf.Types()
	if err != nil {
		return nil, err
	}
	all := &description{Form: layoutForm, ABI: bpf.ABI, Maps: map[string]mapLayout{}, Enums: map[string]map[string]int64{}}
	for typ, err := range types.All() {
		if err != nil {
			return nil, fmt.Errorf("read types: %w", err)
		}
		e, ok := typ.(*btf.Enum)
		if !ok {
			continue
		}
		values := map[string]int64{}
		for _, v := range e.Values {
			if !strings.HasSuffix(v.Name, "__COUNT") {
				values[v.Name] = int64(v.Value)
			}
		}
		all.Enums[e.Name] = values
	}
	for name, m := range sharedMaps(specs) {
		l := mapLayout{
			Type: uint32(m.Type), Flags: m.Flags, MaxEntries: m.MaxEntries, KeySize: m.KeySize, ValueSize: m.ValueSize,
			Key: fieldsOf(nil, "", 0, m.Key), Value: fieldsOf(nil, "", 0, m.Value),
		}
		for _, content := range contents[name] {
			typ, err := types.AnyTypeByName(content)
			if err != nil {
				return nil, fmt.Errorf("describe map %s: %w", name, err)
			}
			l.Value = fieldsOf(l.Value, content, 0, typ)
		}
		all.Maps[name] = l
	}
	return all, nil
}

// fieldsOf appends the fields of a type that is at some place.
func fieldsOf(all []field, name string, at uint32, typ btf.Type) []field {
	if typ == nil {
		return all
	}
	switch t := btf.UnderlyingType(typ).(type) {
	case *btf.Struct:
		for _, m := range t.Members {
			inner := m.Name
			if name != "" {
				inner = name + "." + m.Name
			}
			all = fieldsOf(all, inner, at+m.Offset.Bytes(), m.Type)
		}
		return all
	case *btf.Array:
		if s, ok := btf.UnderlyingType(t.Type).(*btf.Struct); ok {
			for i := range t.Nelems {
				all = fieldsOf(all, fmt.Sprintf("%s[%d]", name, i), at+i*s.Size, s)
			}
			return all
		}
	default:
	}
	size, err := btf.Sizeof(typ)
	if err != nil {
		return all // of no size: it holds nothing
	}
	return append(all, field{Name: name, At: at, Size: uint32(size)})
}

// span is a part of a value that moves.
type span struct{ from, to, size uint32 }

// spansOf pairs the fields that both have. A number that got wider is filled up with
// zeros, since the first bytes are the low ones; a longer array too.
func spansOf(from, to []field) []span {
	var all []span
	for _, f := range to {
		n := slices.IndexFunc(from, func(o field) bool { return o.Name == f.Name })
		if n >= 0 && !strings.HasPrefix(f.Name, "zero") {
			all = append(all, span{from: from[n].At, to: f.At, size: min(from[n].Size, f.Size)})
		}
	}
	return all
}

// translate gives a value in the other layout.
func translate(spans []span, from []byte, size uint32) []byte {
	to := make([]byte, size)
	for _, s := range spans {
		copy(to[s.to:s.to+s.size], from[s.from:])
	}
	return to
}

// find returns a field by its name.
func find(fields []field, name string) (field, bool) {
	n := slices.IndexFunc(fields, func(f field) bool { return f.Name == name })
	if n < 0 {
		return field{}, false
	}
	return fields[n], true
}

// write makes the map that tells of the layouts, and pins it.
func (l *description) write(pin string) error {
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if err := errors.Join(json.NewEncoder(z).Encode(l), z.Close()); err != nil {
		return fmt.Errorf("describe the maps: %w", err)
	}
	const page = 4096
	value := binary.LittleEndian.AppendUint32(nil, uint32(packed.Len()))
	value = append(value, packed.Bytes()...)
	value = append(value, make([]byte, (page-len(value)%page)%page)...)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: layoutsPin, Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(value)), MaxEntries: 1})
	if err != nil {
		return fmt.Errorf("create map %s: %w", layoutsPin, err)
	}
	defer m.Close()
	if err := m.Put(uint32(0), value); err != nil {
		return fmt.Errorf("write map %s: %w", layoutsPin, err)
	}
	if err := m.Pin(pin); err != nil {
		return fmt.Errorf("pin map %s: %w", layoutsPin, err)
	}
	return nil
}

// mostLayouts bounds what a description may take, unpacked.
const mostLayouts = 1 << 20

// readLayouts reads what the pins of an instance tell of their layouts; nil: an older
// build made them, and told nothing.
func readLayouts(pin string) (*description, error) {
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open map %s: %w", layoutsPin, err)
	}
	defer m.Close()
	var value []byte
	if err := m.Lookup(uint32(0), &value); err != nil {
		return nil, fmt.Errorf("read map %s: %w", layoutsPin, err)
	}
	if len(value) < 4 || uint64(binary.LittleEndian.Uint32(value)) > uint64(len(value)-4) {
		return nil, fmt.Errorf("%w: they are not described", ErrABI)
	}
	l := &description{}
	z, err := gzip.NewReader(bytes.NewReader(value[4 : 4+binary.LittleEndian.Uint32(value)]))
	if err == nil {
		err = json.NewDecoder(io.LimitReader(z, mostLayouts)).Decode(l)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: their description is not understood: %w", ErrABI, err)
	}
	return l, nil
}

// agree fails when what moves as it is would mean something else.
func (l *description) agree(o *description) error {
	if l.Form != o.Form && (l.Form != layoutFormStored || o.Form != layoutForm) {
		return fmt.Errorf("%w: they are described in form %d, this build reads %d", ErrABI, l.Form, o.Form)
	}
	for _, name := range slices.Sorted(maps.Keys(l.Enums)) {
		for value, was := range l.Enums[name] {
			if is, ok := o.Enums[name][value]; ok && is != was {
				return fmt.Errorf("%w: %s of enum %s is %d there, and %d in this build", ErrABI, value, name, was, is)
			}
		}
	}
	return nil
}
