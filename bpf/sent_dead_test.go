package bpf

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
)

// tuple is the key of a connection.
func tuple(source, to string) LiveKey {
	s, d := netip.MustParseAddrPort(source), netip.MustParseAddrPort(to)
	return LiveKey{
		Source: abiIpAddr(FromAddr(s.Addr().Unmap())), SourcePort: s.Port(),
		Slot: abiIpAddr(FromAddr(d.Addr().Unmap())), SlotPort: d.Port(),
	}
}

// sentBefore has every row, and the bucket too, say that somebody who is gone had these
// addresses, and asked for 192.0.2.9:9.
func (h *hooks) sentBefore(t *testing.T, source, to string) {
	t.Helper()
	k := tuple(source, to)
	for n := range h.sent.all {
		h.sent.all[n] = Sent{
			Key: k, Owner: foreign + uint64(n),
			Asked: abiEndpointKey{Addr: abiIpAddr(FromAddr(netip.MustParseAddr("192.0.2.9"))), Port: 9},
		}
	}
	copy(h.sent.before, h.sent.all)
	h.put(t, "sent_buckets", h.bucketOf(k), bucketOfWays(1, 2, 3, Cells))
}

// TestSentOfTheDead: whoever had the addresses of an MPTCP socket before, and however
// it is connected now, its peer is what it asked for itself.
func TestSentOfTheDead(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.services(t)
	h.put(t, "own_addrs", FromAddr(netip.MustParseAddr("127.0.0.1")), uint32(1))
	h.put(t, "own_addrs", FromAddr(netip.MustParseAddr("::1")), uint32(1))
	port := 4100
	for _, tt := range []struct {
		name, family, from, to, at string
		path                       flow.Path
		crowded                    bool
	}{
		{"direct", "4", "127.0.0.1", asked4, at4, flow.PathDirect, false},
		{"direct", "6", "[::1]", asked6, at6, flow.PathDirect, false},
		{"direct, mapped", "6", "[::ffff:127.0.0.1]", mapped4, at4, flow.PathDirect, false},
		{"direct without a cell", "4", "127.0.0.1", asked4, at4, flow.PathDirect, true},
		{"direct without a cell", "6", "[::1]", asked6, at6, flow.PathDirect, true},
		{"pass", "4", "127.0.0.1", at4, at4, flow.PathPass, false},
		{"pass", "6", "[::1]", at6, at6, flow.PathPass, false},
		{"pass without a cell", "4", "127.0.0.1", at4, at4, flow.PathPass, true},
	} {
		for _, kind := range []string{"", "mptcp"} {
			t.Run(tt.name+" "+kind+tt.family, func(t *testing.T) {
				port++
				from := fmt.Sprint(tt.from, ":", port)
				h.sentBefore(t, from, tt.at)
				if tt.crowded {
					h.cells = crowd(h.cells.all, h.cells.owner, stale(), func(int) bool { return true }, false)
				}
				a := h.start(t, "new="+kind+tt.family, "from="+from, "again="+tt.to, "peer", "wait")
				if diff := cmp.Diff([]string{"from=" + from + " ok", "again=" + tt.to + " " + tt.to, "peer " + tt.to}, a.said(t, 4)[1:]); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
				// What the bucket told of the dead is over, whoever else writes there.
				for _, n := range []int{0, 1, 2, Cells - 1} {
					if owner := h.sent.all[n].Owner; owner&foreign != 0 {
						t.Errorf("row %d is still that of %d", n, owner-foreign)
					}
				}
				// Who has a cell is noted; other rows of the dead are left to the process.
				if tt.path == flow.PathDirect && !tt.crowded {
					d, s := h.cells.only(t), h.sent.only(t)
					to := netip.MustParseAddrPort(tt.to)
					if s.Owner != d.Owner || s.Key != tuple(from, tt.at) || ToAddr(IPAddr(s.Asked.Addr)) != to.Addr().Unmap() || s.Asked.Port != to.Port() {
						t.Errorf("the row %+v of the cell %+v", s, d)
					}
				} else if owned := h.sent.owned(); len(owned) != 0 {
					t.Errorf("rows %v", owned)
				}
				a.write("\n")
				a.cmd.Wait()
				testutil.Eventually(t, 10*time.Second, func() bool { return len(h.cells.owned()) == 0 }, "the cell is free")
				if tt.crowded {
					h.cells.untouched(t, "cells")
					h.cells = crowd(h.cells.all, h.cells.owner, Decision{}, func(int) bool { return false }, true)
				}
				clear(h.sent.all)
				clear(h.sent.before)
			})
		}
	}
	h.balanced(t)
}
