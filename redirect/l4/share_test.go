package l4_test

import (
	"net"
	"net/netip"
	"sync/atomic"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
)

// One container has a limit of its own: what is above it is reset, and another
// container does not notice. What the container has let go counts until the
// endpoint has, too.
func TestMaxPerGroup(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		const limit = 5
		var group atomic.Uint64
		addr, accepted := serveTo(t, loopback)
		r := newRig(t, setup{
			loopback: loopback, workers: 2, endpoints: []netip.AddrPort{addr},
			options: func(o *l4.Options) { o.MaxPerGroup = limit },
			direct: func(r *rig, local, remote netip.AddrPort) (l4.Target, error) {
				target := r.target(local, remote)
				target.Downstream.Group = group.Load()
				return target, nil
			},
		})
		var endpoints []*net.TCPConn
		for range limit {
			c := r.dial()
			endpoints = append(endpoints, accept(t, accepted))
			c.Close()
		}
		r.wantRefused(r.listeners[0])
		if rec := r.awaitEnded(1)[0]; rec.End != flow.ReasonConnQuota {
			t.Errorf("record: %+v", rec)
		}
		group.Store(1)
		r.dial()
		endpoints = append(endpoints, accept(t, accepted))
		group.Store(0)
		endpoints[0].Close()
		r.awaitEnded(2)
		r.dial()
		endpoints = append(endpoints, accept(t, accepted))
		for _, c := range endpoints {
			c.Close()
		}
	})
}
