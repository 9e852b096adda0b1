package bpf

import (
	"bytes"
	"fmt"
	"math/bits"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/redirect/flow"
)

// envCrowd says what is in cells and rows of sent before a test of the hooks begins:
//
//	cells  each cell is somebody else's
//	half   every second cell and its row are, and half of the buckets are full of those rows
//	dirt   all are free, but full of what somebody has left there, and so are the buckets
const envCrowd = "PILLION_TEST_CROWD"

// foreign is in the owner of what no socket of a test has.
const foreign = 1 << 62

// crowded is what a map of cells held before.
type crowded[T any] struct {
	all    []T
	before []T
	owner  func(*T) *uint64
}

// inMemory is a map of cells in the memory of the test.
func inMemory[T any](t *testing.T, m *ebpf.Map) []T {
	t.Helper()
	page := os.Getpagesize() - 1
	size := (int(m.ValueSize())*int(m.MaxEntries()) + page) &^ page
	raw, err := unix.Mmap(m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatalf("map %s: %v", m, err)
	}
	t.Cleanup(func() { unix.Munmap(raw) })
	return unsafe.Slice((*T)(unsafe.Pointer(&raw[0])), m.MaxEntries())
}

func asBytes[T any](v *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}

// crowd fills a map of cells with values like v: those of others where taken says so,
// and the others too if they are to be dirty.
func crowd[T any](all []T, owner func(*T) *uint64, v T, taken func(n int) bool, dirty bool) *crowded[T] {
	c := &crowded[T]{all, make([]T, len(all)), owner}
	for n := range all {
		*owner(&v) = 0
		if taken(n) {
			*owner(&v) = foreign + uint64(n)
		} else if !dirty {
			continue
		}
		all[n] = v
	}
	copy(c.before, all)
	return c
}

// owned returns which cells are of sockets, and whose.
func (c *crowded[T]) owned() map[int]uint64 {
	all := map[int]uint64{}
	for n := range c.all {
		if owner := atomic.LoadUint64(c.owner(&c.all[n])); owner != 0 && owner&foreign == 0 {
			all[n] = owner
		}
	}
	return all
}

// only returns the one that is a socket's.
func (c *crowded[T]) only(t *testing.T) *T {
	t.Helper()
	all := c.owned()
	for n := range all {
		if len(all) == 1 {
			return &c.all[n]
		}
	}
	t.Fatalf("%d are owned: %v", len(all), all)
	return nil
}

// untouched fails the test if anything of others has changed.
func (c *crowded[T]) untouched(t *testing.T, name string) {
	t.Helper()
	for n := range c.all {
		if *c.owner(&c.before[n])&foreign != 0 && !bytes.Equal(asBytes(&c.all[n]), asBytes(&c.before[n])) {
			t.Errorf("%s: number %d is another's, and changed:\n%+v\nwas %+v", name, n, c.all[n], c.before[n])
			return
		}
	}
}

// stale is what somebody has left in a cell, or has in it: what may be wrong there is.
// A look at it by accident is seen, for example at the count of endpoint 10.
func stale() Decision {
	v := Decision{
		Mark: 77, Orig: abiIpAddr{W: [4]uint32{1, 2, 3, 4}}, Bound: abiIpAddr{W: [4]uint32{5, 6, 7, 8}},
		Seen: abiIpAddr{W: [4]uint32{9, 10, 11, 12}}, Cgroup: 13, Group: 14, Opened: 15, Priority: 16, OrigPort: 17,
		Path: uint8(PathDirect), Reason: 1, Pending: 1, Own: 1, Open: 1, Followed: 1, Hold: 1, Counted: 1, Released: 1,
		Expired: 1, Set: 1, Endpoint: 10, Established: 18, Half: 19, ClosedFirst: 1,
	}
	v.Key.SourcePort, v.Key.SlotPort = 20, 21
	return v
}

// crowd prepares cells and rows as [envCrowd] says, and sees in the end that nobody
// has touched what is another's, and that what was free is free again.
func (h *hooks) crowd(t *testing.T) {
	t.Helper()
	how := os.Getenv(envCrowd)
	half := func(n int) bool { return how == "half" && n%2 == 0 }
	cell := func(n int) bool { return how == "cells" || half(n) }
	row := Sent{Asked: abiEndpointKey{Addr: abiIpAddr{W: [4]uint32{1, 2, 3, 4}}, Port: 5}}
	row.Key.SourcePort, row.Key.SlotPort = 6, 7
	h.cells = crowd(inMemory[Decision](t, h.maps["cells"]), func(d *Decision) *uint64 { return &d.Owner }, stale(), cell, how == "dirt")
	h.sent = crowd(inMemory[Sent](t, h.maps["sent_by_cell"]), func(s *Sent) *uint64 { return &s.Owner }, row, half, how == "dirt")
	switch how {
	case "half":
		h.fillBuckets(t)
	case "dirt":
		for b := range h.maps["sent_buckets"].MaxEntries() {
			h.put(t, "sent_buckets", b, bucketOfWays(1, 2, 3, 4))
		}
	}
	t.Cleanup(func() {
		if !t.Failed() {
			h.allFree(t)
		}
	})
}

// bucketOf is bucket_of in include/sent.h.
func (h *hooks) bucketOf(k LiveKey) uint32 {
	mixed := flow.Mix((uint32(k.SourcePort) | uint32(k.SlotPort)<<16) ^ k.Source.W[3] ^ bits.ReverseBytes32(k.Slot.W[3]))
	return uint32(uint64(mixed) * uint64(h.maps["sent_buckets"].MaxEntries()) >> 32)
}

// fillBuckets has each bucket, as far as they go, be full of others whose rows are those of
// every second cell.
func (h *hooks) fillBuckets(t *testing.T) {
	t.Helper()
	const step = 2
	buckets := map[uint32]uint64{}
	ports, full := uint32(0), uint32(len(h.sent.all)/step/sentWays)
	for n := 0; n < len(h.sent.all); ports++ {
		k := LiveKey{SourcePort: uint16(ports), SlotPort: uint16(ports >> 16)}
		b := h.bucketOf(k)
		if b >= full || buckets[b]>>(sentWayBits*(sentWays-1)) != 0 {
			continue
		}
		h.sent.all[n].Key = k
		buckets[b] = buckets[b]<<sentWayBits | uint64(n+1)
		n += step
	}
	copy(h.sent.before, h.sent.all)
	for b, ways := range buckets {
		h.put(t, "sent_buckets", b, ways)
	}
}

// WAYS and WAY_BITS in include/sent.h.
const (
	sentWays    = 4
	sentWayBits = 15
)

// bucketOfWays is a bucket of four.
func bucketOfWays(a, b, c, d uint64) uint64 {
	return a | b<<sentWayBits | c<<(2*sentWayBits) | d<<(3*sentWayBits)
}

// tallies are those that are not 0, without that of what is in storage since others are in
// the cells.
func (h *hooks) tallies(t *testing.T) map[uint32]uint64 {
	t.Helper()
	all := h.counts(t, "tallies")
	if os.Getenv(envCrowd) != "" {
		delete(all, TallyStored)
	}
	return all
}

// allFree waits until nobody has a cell or a row, but for foreign ones.
func (h *hooks) allFree(t *testing.T) {
	t.Helper()
	free := func() bool { return len(h.cells.owned())+len(h.sent.owned()) == 0 }
	for end := time.Now().Add(10 * time.Second); !free() && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	for n := range h.cells.owned() {
		t.Errorf("cell %d is not given back: %+v", n, h.cells.all[n])
	}
	for n := range h.sent.owned() {
		t.Errorf("row %d of what was sent is not given back: %+v", n, h.sent.all[n])
	}
	h.cells.untouched(t, "cells")
	h.sent.untouched(t, "sent_by_cell")
}

// crowds are the tests that each crowd is for.
var crowds = map[string][]string{
	"cells": {
		"TestHooks", "TestLiveEntry", "TestOwnNames", "TestDirectPeers", "TestDirectOutlived", "TestDirectEvents",
		"TestFailedConnects", "TestFallback", "TestTwoRewriters", "TestEndings", "TestNameAfterTheEnd", "TestHold",
	},
	"half": {"TestDirectPeers", "TestDirectOutlived", "TestEndings"},
	"dirt": {"TestHooks", "TestOwnNames", "TestDirectPeers", "TestFailedConnects", "TestEndings"},
}

// TestCrowds: whoever is in the cells, or was, applications and records see the same.
func TestCrowds(t *testing.T) {
	for how, tests := range crowds {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command("/proc/self/exe", "-test.v", "-test.run=^("+strings.Join(tests, "|")+")$")
			cmd.Env = append(os.Environ(), envCrowd+"="+how)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%v\n%s", err, out)
			}
			for _, name := range tests {
				// One that may be skipped says why by itself, without a crowd.
				if !bytes.Contains(out, fmt.Appendf(nil, "--- PASS: %s ", name)) && !bytes.Contains(out, fmt.Appendf(nil, "--- SKIP: %s ", name)) {
					t.Errorf("%s has not run", name)
				}
			}
		})
	}
}
