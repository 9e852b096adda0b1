package l4_test

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
)

// manyCarried is what a relay of n connections gives.
func manyCarried(n int) *l4.Given {
	g := &l4.Given{Workers: 2}
	for i := range n {
		g.Conns = append(g.Conns, l4.Carried{
			Worker: i % 2,
			Down:   l4.CarriedSide{FD: 10 + 2*i, PipeRead: -1, PipeWrite: -1, Moved: 12345, Tuned: true},
			Up:     l4.CarriedSide{FD: 11 + 2*i, PipeRead: -1, PipeWrite: -1, Moved: 54321, Wrote: true, Rest: []byte("rest")},
			Downstream: flow.Downstream{
				Cookie: 77, Group: 5, Cgroup: 6, Source: netip.MustParseAddrPort("10.0.0.1:40000"),
				OrigDst: flow.OrigDst{AddrPort: netip.MustParseAddrPort("[2001:db8::1]:443")}, Reason: flow.ReasonService,
				Congestion: [16]byte{'c', 'u', 'b', 'i', 'c'},
			},
			Service: "shop", Cluster: "shop", Endpoint: netip.MustParseAddrPort("198.51.100.7:8080"),
			Tried:  []netip.AddrPort{netip.MustParseAddrPort("198.51.100.7:8080")},
			Opened: 1, Began: 2, Active: 3, Dialed: 4, Connected: 5, Attempts: 1, Round: 1, Mirrored: true,
		})
	}
	return g
}

var addresses = cmp.Options{
	cmpopts.IgnoreUnexported(l4.Carried{}, l4.Given{}), // which are of one process
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b flow.OrigDst) bool { return a == b }),
}

// What is encoded comes out as it was, with the reader's descriptors.
func TestCarriedEncoding(t *testing.T) {
	g := manyCarried(3)
	g.Conns[1].Held = &l4.CarriedHeld{Held: flow.Held{Source: netip.MustParseAddrPort("10.0.0.1:1"), Frame: [flow.FrameMax]byte{1, 2, 3}, Size: 3}, Silent: true}
	g.Conns[1].Down.FD = -1
	g.Conns[2].Up.PipeRead, g.Conns[2].Up.PipeWrite, g.Conns[2].Up.InPipe = 90, 91, 4096
	g.Refusals = []l4.CarriedRefusal{{Worker: 1, Cookie: 9, Errno: 111, Left: 3}}
	data, fds, err := g.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]int{10, 11, 13, 14, 15, 90, 91}, fds); diff != "" {
		t.Errorf("descriptors (-want +got)\n%s", diff)
	}
	theirs := []int{20, 21, 22, 23, 24, 25, 26}
	got, err := l4.DecodeGiven(data, theirs)
	if err != nil {
		t.Fatal(err)
	}
	want := *g
	want.Conns[0].Down.FD, want.Conns[0].Up.FD = 20, 21
	want.Conns[1].Up.FD = 22
	want.Conns[2].Down.FD, want.Conns[2].Up.FD = 23, 24
	want.Conns[2].Up.PipeRead, want.Conns[2].Up.PipeWrite = 25, 26
	if diff := cmp.Diff(&want, got, addresses); diff != "" {
		t.Errorf("decoded (-want +got)\n%s", diff)
	}
	for _, wrong := range [][]int{theirs[:6], append(theirs, 27), nil} {
		if _, err := l4.DecodeGiven(data, wrong); err == nil {
			t.Errorf("decoded with %d descriptors", len(wrong))
		}
	}
	if _, err := l4.DecodeGiven(data[:len(data)/2], theirs); err == nil {
		t.Error("decoded half of it")
	}
}

var update = flag.Bool("update", false, "write the golden files")

// What a build of this version wrote earlier is read still: whoever changes that has to
// change CarryVersion, which is in the file's name.
func TestCarriedGolden(t *testing.T) {
	file := fmt.Sprintf("testdata/carried-%d.gob", l4.CarryVersion)
	want := manyCarried(2)
	want.Conns[1].Held = &l4.CarriedHeld{Held: flow.Held{Source: netip.MustParseAddrPort("10.0.0.1:1"), Size: 3}, Silent: true, Reset: true}
	want.Conns[1].Released, want.Conns[1].Repeats = &flow.Held{Size: 2, Mark: 5}, 4
	want.Conns[1].Last, want.Conns[1].Errno, want.Conns[1].Dialing, want.Conns[1].Waiting = flow.ReasonDialRefused, 111, true, true
	want.Conns[1].Lingers, want.Conns[1].Kept = true, true
	want.Conns[1].Down.EOF, want.Conns[1].Down.Done, want.Conns[1].Down.FIN, want.Conns[1].Down.Urgent = true, true, true, true
	want.Conns[1].Down.RestUrgent, want.Conns[1].Down.Chosen = true, true
	want.Refusals = []l4.CarriedRefusal{{Worker: 1, Cookie: 9, Errno: 111, Left: 3}}
	data, fds, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(file, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if data, err = os.ReadFile(file); err != nil {
		t.Fatal(err)
	}
	got, err := l4.DecodeGiven(data, fds)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, addresses); diff != "" {
		t.Errorf("decoded (-want +got)\n%s", diff)
	}
}

func BenchmarkCarriedEncoding(b *testing.B) {
	g := manyCarried(1000)
	for b.Loop() {
		data, fds, err := g.Encode()
		if err != nil {
			b.Fatal(err)
		}
		if _, err := l4.DecodeGiven(data, fds); err != nil {
			b.Fatal(err)
		}
	}
}
