package bpf

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/tests/testutil"
)

// formerBudget is as budget.
var formerBudget = map[string]uint32{ProgRows: 150, ProgTell: 150}

// loadFormerAll loads the object that is for moves, over maps whose rows are of a size.
func loadFormerAll(t *testing.T, rowSize uint32) *ebpf.Collection {
	t.Helper()
	testutil.RequireRoot(t)
	spec, err := Former()
	if err != nil {
		t.Fatal(err)
	}
	spec.Maps[FormerSets].InnerMap.ValueSize = rowSize
	spec.Maps[FormerRows].Value, spec.Maps[FormerRows].ValueSize = nil, rowSize
	c, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatalf("load: %+v", err)
	}
	t.Cleanup(c.Close)
	return c
}

// question is a packet with some values behind the Ethernet header.
func question[T any](all ...T) []byte {
	b := make([]byte, 14)
	for n := range all {
		b = append(b, unsafe.Slice((*byte)(unsafe.Pointer(&all[n])), unsafe.Sizeof(all[n]))...)
	}
	return b
}

func runWith(t *testing.T, p *ebpf.Program, data []byte) uint32 {
	t.Helper()
	got, err := p.Run(&ebpf.RunOptions{Data: data})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// TestRows reads a set of rows that are of another size than this build's, in parts.
func TestRows(t *testing.T) {
	testutil.CheckLeaks(t)
	const size, rows = 40, 4096 + 10
	c := loadFormerAll(t, size)
	inner := c.Maps[FormerSets]
	spec := &ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: size, MaxEntries: rows, Flags: 1 << 12 /* BPF_F_INNER_MAP */}
	set, err := ebpf.NewMap(spec)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	row := func(n uint32) []byte { return binary.NativeEndian.AppendUint32(make([]byte, size-4), n) }
	for n := range uint32(rows) {
		if err := set.Put(n, row(n+1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := inner.Put(uint32(5), set); err != nil {
		t.Fatal(err)
	}
	for _, q := range []struct {
		set, first uint32
		want       uint32
	}{{5, 0, 4096}, {5, 4096, 10}, {5, rows, 0}, {6, 0, 0}, {Sets, 0, 0}} {
		got := runWith(t, c.Programs[ProgRows], question(SetQuery{Set: q.set, First: q.first}))
		if got != q.want {
			t.Errorf("rows of set %d from %d: %d, want %d", q.set, q.first, got, q.want)
		}
		for n := range got {
			var raw []byte
			if err := c.Maps[FormerRows].Lookup(n, &raw); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(raw, row(q.first+n+1)) {
				t.Fatalf("row %d of set %d from %d is %v", n, q.set, q.first, raw)
			}
		}
	}
	if got := int32(runWith(t, c.Programs[ProgRows], make([]byte, 15))); got != -1 {
		t.Errorf("half a question: %d", got)
	}
}

// TestTell puts records into the ring; what there is no room for is not told.
func TestTell(t *testing.T) {
	testutil.CheckLeaks(t)
	c := loadFormerAll(t, 32)
	events := c.Maps["events"]
	reader, err := ringbuf.NewReader(events)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	reader.SetDeadline(time.Now().Add(-time.Second)) // it is there, or never comes
	var want []ConnEvent
	for n := range uint64(3) {
		want = append(want, ConnEvent{Cookie: n + 1, Ended: 1 << n, Ending: EndingReset})
	}
	if got := runWith(t, c.Programs[ProgTell], question(want...)); got != 3 {
		t.Errorf("%d records told", got)
	}
	for n := range want {
		raw, err := reader.Read()
		if err != nil {
			t.Fatal(err)
		}
		got, ok := ParseEvent(raw.RawSample)
		if diff := cmp.Diff(want[n], got); !ok || diff != "" {
			t.Errorf("record %d (-want +got):\n%s", n, diff)
		}
	}
	most := int(events.MaxEntries()) / int(unsafe.Sizeof(ConnEvent{})+8)
	told := 0
	for {
		n := int(runWith(t, c.Programs[ProgTell], question(want...)))
		told += n
		if n < len(want) {
			break
		}
	}
	if told < most-1 || told > most {
		t.Errorf("%d records told until the ring was full, want %d", told, most)
	}
}

func TestFormerBudget(t *testing.T) {
	testutil.CheckLeaks(t)
	c := loadFormerAll(t, 32)
	for name, most := range formerBudget {
		n := verified(t, c.Programs[name])
		t.Logf("%s: %d of %d verified instructions", name, n, most)
		if n > most {
			t.Errorf("%s: the verifier walks %d instructions, the budget is %d", name, n, most)
		}
	}
}
