package l4_test

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"github.com/pillion-project/pillion/redirect/upstream"
	"golang.org/x/sys/unix"
)

// remove ends what goes to an endpoint of the cluster "test".
func (r *rig) remove(endpoint netip.AddrPort) int {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	n := r.relay.End(ctx, "test", endpoint)
	if ctx.Err() != nil {
		r.t.Error("ending connections took too long")
	}
	return n
}

// The connections to an endpoint that was removed are reset, on both sides; no
// other is touched.
func TestRemovedEndpoint(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		gone, goneConns := serveTo(t, loopback)
		stays, staysConns := serveTo(t, loopback)
		r := newRig(t, setup{loopback: loopback, workers: 2, perWorker: 2, endpoints: []netip.AddrPort{gone, stays}})
		const n = 20
		var conns []*net.TCPConn
		for range n {
			c := r.dial()
			mustWrite(t, c, []byte("hello"))
			conns = append(conns, c)
		}
		var servers []*net.TCPConn
		for range n / 2 {
			servers = append(servers, accept(t, goneConns), accept(t, staysConns))
		}
		for _, s := range servers {
			wantBytes(t, s, []byte("hello"))
		}
		// The endpoints. Two may have one port, at different listeners.
		to := make(map[[2]netip.AddrPort]netip.AddrPort)
		for _, rec := range r.live() {
			to[[2]netip.AddrPort{rec.Source, rec.OrigDst}] = rec.Endpoint
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if got := r.relay.End(ctx, "other", gone); got != 0 {
			t.Errorf("%d connections of another cluster ended", got)
		}
		if got := r.remove(gone); got != n/2 {
			t.Errorf("%d connections ended, want %d", got, n/2)
		}
		if got := r.remove(gone); got != 0 {
			t.Errorf("%d connections ended a second time", got)
		}
		for i, s := range servers {
			if i%2 == 0 {
				wantReset(t, s, nil)
			} else {
				mustWrite(t, s, []byte("still here"))
			}
		}
		for _, c := range conns {
			if to[[2]netip.AddrPort{c.LocalAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort()}] == gone {
				wantReset(t, c, nil)
				continue
			}
			wantBytes(t, c, []byte("still here"))
			c.Close()
		}
		for _, s := range servers {
			s.Close()
		}
		removed := 0
		for _, rec := range r.awaitEnded(n) {
			switch {
			case rec.End == flow.ReasonEndpointRemoved && rec.Endpoint == gone:
				removed++
			case rec.End == flow.ReasonEndpointRemoved || rec.Endpoint == gone:
				t.Errorf("record: %+v", rec)
			default:
			}
		}
		if removed != n/2 {
			t.Errorf("%d records of removal, want %d", removed, n/2)
		}
		r.close()
		if got := r.remove(stays); got != 0 {
			t.Errorf("%d connections of a relay that has ended", got)
		}
	})
}

// Who takes the order to end connections back in time has none ended, also where a
// worker hears of both later only.
func TestRemovedAndBack(t *testing.T) {
	endpoint := serve(t, loopback4, echo)
	r := newRig(t, setup{endpoints: []netip.AddrPort{endpoint}, workers: 2})
	c := r.dial()
	mustExchange(t, c, "hello")
	still, err := r.relay.Freeze(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan int)
	go func() { ended <- r.relay.End(ctx, "test", endpoint) }()
	time.Sleep(10 * time.Millisecond) // as a rule it waits by now
	cancel()
	n := <-ended
	still.Thaw()
	if n != 0 {
		t.Errorf("%d connections ended, by workers that stand still", n)
	}
	r.live() // by then the workers have done what they were told before
	mustExchange(t, c, "still here")
	if got := r.remove(endpoint); got != 1 {
		t.Errorf("%d connections ended, want 1", got)
	}
	wantReset(t, c, nil)
}

// toOther is a table in which the service has another cluster by now.
func toOther(r *rig, t *l4.Target) flow.Reason {
	t.Cluster = r.other
	return flow.ReasonNone
}

// endless lets dials take as long as they want.
func endless(o *l4.Options) { o.DialTimeout, o.DialBudget = time.Hour, time.Hour }

// A connection that is being dialed goes to an endpoint that is of the cluster by
// now, with what was said.
func TestRemovedWhileDialed(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		_, hangs := hanging(t, loopback)
		good := serve(t, loopback, echo)
		r := newRig(t, setup{
			loopback: loopback, endpoints: []netip.AddrPort{hangs}, others: []netip.AddrPort{good},
			options: endless, again: toOther,
		})
		c := r.dial()
		mustWrite(t, c, []byte("once and whole"))
		r.awaitStats("it is dialed", func(s l4.Stats) bool { return s.Dials == 1 })
		if got := r.remove(hangs); got != 1 {
			t.Errorf("%d connections were dialing, want 1", got)
		}
		wantBytes(t, c, []byte("once and whole"))
		c.Close()
		rec := r.awaitEnded(1)[0]
		if rec.End != flow.ReasonClosed || rec.Endpoint != good || rec.Cluster != "other" || rec.Attempts != 2 {
			t.Errorf("record: %+v", rec)
		}
		if s := r.cluster.Endpoints[0].State(); s.Ejected || s.LastReason != flow.ReasonEndpointRemoved {
			t.Errorf("the removed endpoint: %+v", s)
		}
	})
}

// When nothing is left to dial, the end says why.
func TestRemovedWithoutAnother(t *testing.T) {
	for name, c := range map[string]struct {
		again func(*rig, *l4.Target) flow.Reason
		want  flow.Reason
	}{
		"no cluster": {func(*rig, *l4.Target) flow.Reason { return flow.ReasonEndpointRemoved }, flow.ReasonEndpointRemoved},
		"empty":      {toOther, flow.ReasonNoEndpoint},
	} {
		t.Run(name, func(t *testing.T) {
			_, hangs := hanging(t, loopback4)
			r := newRig(t, setup{endpoints: []netip.AddrPort{hangs}, options: endless, again: c.again})
			for range 3 {
				mustWrite(t, r.dial(), []byte("for nobody"))
			}
			r.awaitStats("they are dialed", func(s l4.Stats) bool { return s.Dials == 3 })
			if got := r.remove(hangs); got != 3 {
				t.Errorf("%d connections were dialing, want 3", got)
			}
			for _, rec := range r.awaitEnded(3) {
				if rec.End != c.want || rec.Attempts != 1 || rec.Endpoint != hangs {
					t.Errorf("record: %+v, want the end %s", rec, c.want)
				}
			}
		})
	}
}

// An application that waits for the dial gets what the cluster of now says.
func TestRemovedWhileHeld(t *testing.T) {
	_, hangs := hanging(t, loopback4)
	s, err := upstream.Build(nil, []upstream.ClusterSpec{{Name: "empty", NoEndpoint: unix.EHOSTUNREACH}}, upstream.Options{})
	if err != nil {
		t.Fatal(err)
	}
	r, q := newHeldRig(t, setup{
		endpoints: []netip.AddrPort{hangs}, options: endless,
		again: func(_ *rig, t *l4.Target) flow.Reason {
			t.Cluster = s.Cluster("empty")
			return flow.ReasonNone
		},
	})
	a := q.connect(r.listeners[0])
	r.awaitStats("it is dialed", func(s l4.Stats) bool { return s.Dials == 1 })
	if got := r.remove(hangs); got != 1 {
		t.Errorf("%d connections were dialing, want 1", got)
	}
	a.wantRefusal(unix.EHOSTUNREACH)
	wantEnd(t, r.awaitEnded(1)[0], flow.ReasonNoEndpoint)
}

// With a policy that goes by a hash, the connections of one source stay together:
// where the hash of its address leads.
func TestMaglev(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		spec := upstream.ClusterSpec{Name: "test", Policy: flow.PolicyMaglev}
		for range 8 {
			spec.Endpoints = append(spec.Endpoints, upstream.EndpointSpec{Addr: serve(t, loopback, echo), Weight: 1})
		}
		s, err := upstream.Build(nil, []upstream.ClusterSpec{spec}, upstream.Options{})
		if err != nil {
			t.Fatal(err)
		}
		cluster := s.Cluster("test")
		r := newRig(t, setup{loopback: loopback, workers: 2, direct: func(r *rig, local, remote netip.AddrPort) (l4.Target, error) {
			target := r.target(local, remote)
			target.Cluster = cluster
			return target, nil
		}})
		want, err := cluster.Pick(flow.Hash(loopback, 0), nil)
		if err != nil {
			t.Fatal(err)
		}
		const n = 20
		for range n {
			c := r.dial()
			mustExchange(t, c, "hello")
			c.Close()
		}
		for _, rec := range r.awaitEnded(n) {
			if rec.Endpoint != want.Addr {
				t.Errorf("to %s, want %s", rec.Endpoint, want.Addr)
			}
		}
	})
}
