package l4_test

import (
	"net/netip"
	"sync/atomic"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"github.com/pillion-project/pillion/tests/testutil"
)

// A connection of which it is not known yet where it goes waits for that, with what
// the application says meanwhile; one that the application gives up meanwhile ends.
func TestUndecided(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server, conns := serveTo(t, loopback)
		var asked, known atomic.Int64
		var r *rig
		r = newRig(t, setup{
			loopback: loopback, endpoints: []netip.AddrPort{server},
			direct: func(r *rig, local, remote netip.AddrPort) (l4.Target, error) {
				target := r.target(local, remote)
				target.Cluster, target.Terms = nil, nil
				return target, nil
			},
			options: func(o *l4.Options) {
				o.Undecided = func(target *l4.Target) bool {
					asked.Add(1)
					if known.Load() == 0 {
						return true
					}
					target.Cluster, target.Terms = r.cluster, r.terms
					return false
				}
			},
		})
		stays, gone := r.dial(), r.dial()
		mustWrite(t, stays, []byte("hello"))
		for asked.Load() < 20 { // both, and again
			mustWrite(t, stays, []byte("."))
			if len(conns) > 0 {
				t.Fatal("it was dialed before it was known where to")
			}
		}
		if err := gone.SetLinger(0); err != nil {
			t.Fatal(err)
		}
		gone.Close()
		testutil.Eventually(t, patience, func() bool { return r.relay.Stats().Live == 1 }, "the other one ends")
		known.Store(1)
		peer := accept(t, conns)
		wantBytes(t, peer, []byte("hello."))
		stays.Close()
		peer.Close()
		r.close()
		for _, rec := range r.records {
			if rec.End == flow.ReasonDownstreamReset {
				continue // it was given up
			}
			if rec.Endpoint != server || rec.Service != "web" || rec.Attempts != 1 {
				t.Errorf("%+v", rec)
			}
		}
	})
}
