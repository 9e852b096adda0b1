package bpf

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/tests/testutil"
)

// TestNamesElsewhere: in another network namespace of the scope the same addresses are
// those of another connection, which was sent nowhere.
func TestNamesElsewhere(t *testing.T) {
	testutil.CheckLeaks(t)
	const asked, endpoint = "10.96.0.12:80", "127.0.0.1:8001"
	h := newHooks(t)
	h.serve(t)
	h.service(t, asked, Service{Id: 1, Path: uint8(PathDirect)})
	h.publish(t, 1, healthy, 0, 10, []endpointOf{{endpoint, 1}}, []uint32{0})
	there := *h
	there.ns = testutil.NewNS(t)
	listen := func(ns *testutil.NS) (l net.Listener) {
		ns.Do(t, func() (err error) {
			l, err = net.Listen("tcp", endpoint)
			return err
		})
		t.Cleanup(func() { l.Close() })
		return l
	}
	here := listen(h.ns)
	listen(there.ns)

	a := h.start(t, "mptcp="+asked, "wait", "peer")
	conn, err := here.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	step := "mptcp=" + conn.RemoteAddr().String() + "," + endpoint
	if diff := cmp.Diff([]string{step + " " + endpoint}, there.steps(t, step)); diff != "" {
		t.Errorf("the peer elsewhere (-want +got):\n%s", diff)
	}
	a.write("\n")
	want := []string{"mptcp=" + asked + " " + asked, "wait", "peer " + asked}
	if diff := cmp.Diff(want, a.said(t, len(want))); diff != "" {
		t.Errorf("peers (-want +got):\n%s", diff)
	}
}

// TestSentBuckets: in a bucket, a connection takes the place of who is gone, and of nobody
// else; where there is none it is found in storage.
func TestSentBuckets(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.services(t)
	h.put(t, "own_addrs", FromAddr(netip.MustParseAddr("127.0.0.1")), uint32(1))
	for i, tt := range []struct {
		name   string
		gone   func(s *Sent) // one of the four that are there
		stored uint64
	}{
		{"four others", nil, 1},
		{"one has ended", func(s *Sent) { s.Owner = 0 }, 0},
		{"one is of another bucket by now", func(s *Sent) { s.Key.SourcePort++ }, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			from := fmt.Sprint("127.0.0.1:", 4300+i)
			bucket := h.bucketOf(tuple(from, at4))
			before := h.counts(t, "tallies")[TallyStored]
			a := h.start(t, "pinned", "new=mptcp4", "from="+from, "cookie", "wait", "again="+asked4, "peer", "wait")
			_, cookie, _ := strings.Cut(a.said(t, 4)[3], " ")
			own, err := strconv.ParseUint(cookie, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			// Far from the row of the application's next sockets.
			row := (own + Cells/2) % (Cells - sentWays)
			var ways []uint64
			for port := uint16(0); len(ways) < sentWays; port++ {
				k := LiveKey{SourcePort: port, SlotPort: 1}
				if h.bucketOf(k) != bucket {
					continue
				}
				s := &h.sent.all[row]
				*s = Sent{Key: k, Owner: foreign + row}
				if len(ways) == 0 && tt.gone != nil {
					tt.gone(s)
				}
				h.sent.before[row] = *s
				row++
				ways = append(ways, row)
			}
			full := bucketOfWays(ways[0], ways[1], ways[2], ways[3])
			h.put(t, "sent_buckets", bucket, full)
			a.write("\n")
			if diff := cmp.Diff([]string{"wait", "again=" + asked4 + " " + asked4, "peer " + asked4}, a.said(t, 3)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if tt.gone == nil {
				if got := h.bucket(t, bucket); got != full {
					t.Errorf("the bucket is %#x, and was %#x", got, full)
				}
				if rows := h.sent.owned(); len(rows) != 0 {
					t.Errorf("rows %v", rows)
				}
			} else {
				ways[0] = h.cells.only(t).Owner%Cells + 1
				if got := waysOf(h.bucket(t, bucket)); !slices.Equal(got, slices.Sorted(slices.Values(ways))) {
					t.Errorf("the bucket has %d, want %d", got, ways)
				}
				h.sent.only(t)
			}
			if n := h.counts(t, "tallies")[TallyStored] - before; n != tt.stored {
				t.Errorf("%d are in storage, want %d", n, tt.stored)
			}
			a.write("\n")
			a.cmd.Wait()
			h.allFree(t)
			left := slices.Sorted(slices.Values(ways))
			if tt.gone != nil {
				left = slices.Sorted(slices.Values(ways[1:]))
			}
			testutil.Eventually(t, 10*time.Second, func() bool { return slices.Equal(waysOf(h.bucket(t, bucket)), left) }, "the others are left")
		})
	}
}

// bucket is what stands in a bucket.
func (h *hooks) bucket(t *testing.T, n uint32) (ways uint64) {
	t.Helper()
	if err := h.maps["sent_buckets"].Lookup(n, &ways); err != nil {
		t.Fatal(err)
	}
	return ways
}

// waysOf are those of a bucket, sorted.
func waysOf(bucket uint64) (all []uint64) {
	for range sentWays {
		if way := bucket & (1<<sentWayBits - 1); way != 0 {
			all = append(all, way)
		}
		bucket >>= sentWayBits
	}
	slices.Sort(all)
	return all
}
