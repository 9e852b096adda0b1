package l4_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"golang.org/x/sys/unix"
)

// A refused dial costs the application nothing: what it has said arrives at the
// next endpoint, once.
func TestRefusedDialGoesToTheNext(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		good := serve(t, loopback, echo)
		r := newRig(t, setup{
			loopback:  loopback,
			endpoints: []netip.AddrPort{refusing(t, loopback), refusing(t, loopback), good},
		})
		const n = 30
		for i := range n {
			c := r.dial()
			b := randomBytes(i * 9000)
			sent := make(chan error, 1)
			go writeAll(c, b, sent)
			wantBytes(t, c, b)
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			wantEOF(t, c)
		}
		for _, rec := range r.awaitEnded(n) {
			if rec.End != flow.ReasonClosed || rec.Endpoint != good || rec.Attempts < 1 || rec.Attempts > 3 || rec.Sent != rec.Received {
				t.Errorf("record: %+v", rec)
			}
		}
		if s := r.relay.Stats(); s.Retries == 0 || s.DialFailures != s.Retries || s.Dials != n+s.Retries {
			t.Errorf("dials: %+v", s)
		}
		var connects, failures uint64
		for _, e := range r.cluster.Endpoints {
			connects += e.State().Connects
			failures += e.State().Failures
		}
		if connects != n || failures != r.relay.Stats().DialFailures {
			t.Errorf("endpoints: %d connects and %d failures", connects, failures)
		}
	})
}

func TestAllRefused(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		var endpoints []netip.AddrPort
		for range 6 {
			endpoints = append(endpoints, refusing(t, loopback))
		}
		r := newRig(t, setup{loopback: loopback, endpoints: endpoints})
		for range 5 {
			r.wantRefused(r.listeners[0])
		}
		for _, rec := range r.awaitEnded(5) {
			if rec.End != flow.ReasonDialRefused || rec.Attempts != 3 || rec.Sent+rec.Received != 0 || rec.Connect != 0 {
				t.Errorf("record: %+v", rec)
			}
		}
		if s := r.relay.Stats(); s.Dials != 15 || s.DialFailures != 15 || s.Retries != 10 {
			t.Errorf("dials: %+v", s)
		}
	})
}

func TestNoEndpoint(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		r := newRig(t, setup{loopback: loopback})
		r.wantRefused(r.listeners[0])
		if rec := r.awaitEnded(1)[0]; rec.End != flow.ReasonNoEndpoint || rec.Attempts != 0 || rec.Endpoint.IsValid() {
			t.Errorf("record: %+v", rec)
		}
	})
}

// Without a cluster the original destination is dialed, once.
func TestOriginalDestination(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		good, bad := serve(t, loopback, echo), refusing(t, loopback)
		r := newRig(t, setup{loopback: loopback, perWorker: 2, direct: func(r *rig, local, remote netip.AddrPort) (l4.Target, error) {
			target := r.target(local, remote)
			target.Cluster = nil
			target.Downstream.OrigDst = flow.OrigDst{AddrPort: good}
			if local == r.listeners[1] {
				target.Downstream.OrigDst = flow.OrigDst{AddrPort: bad}
			}
			return target, nil
		}})
		c := mustDial(t, r.listeners[0])
		mustExchange(t, c, "hello")
		c.Close()
		r.awaitEnded(1)
		r.wantRefused(r.listeners[1])
		records := r.awaitEnded(2)
		if rec := records[0]; rec.End != flow.ReasonClosed || rec.Endpoint != good || rec.Cluster != "" {
			t.Errorf("record: %+v", rec)
		}
		if rec := records[1]; rec.End != flow.ReasonDialRefused || rec.Endpoint != bad || rec.Attempts != 1 {
			t.Errorf("record: %+v", rec)
		}
	})
}

// What no route leads to is not the endpoint's refusal.
func TestUnreachable(t *testing.T) {
	for to, want := range map[string]flow.Reason{
		"224.0.0.1:80": flow.ReasonDialUnreachable, // no connection to a group
		"[fe80::1]:80": flow.ReasonDialFailed,      // on which link is not said
	} {
		r := newRig(t, setup{endpoints: []netip.AddrPort{netip.MustParseAddrPort(to)}})
		r.wantRefused(r.listeners[0])
		if rec := r.awaitEnded(1)[0]; rec.End != want || rec.Attempts != 3 {
			t.Errorf("%s: record: %+v", to, rec)
		}
	}
}

func TestDialTimeout(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		_, hangs := hanging(t, loopback)
		r := newRig(t, setup{
			loopback: loopback, endpoints: []netip.AddrPort{hangs},
			options: func(o *l4.Options) { o.DialTimeout, o.Attempts = 200*time.Millisecond, 2 },
		})
		c := r.dial()
		mustWrite(t, c, []byte("for nobody"))
		wantReset(t, c, nil)
		rec := r.awaitEnded(1)[0]
		if rec.End != flow.ReasonDialTimeout || rec.Attempts != 2 || rec.Sent != 0 {
			t.Errorf("record: %+v", rec)
		}
		if rec.Duration < 400*time.Millisecond || rec.Duration > patience {
			t.Errorf("two dials of 200ms took %v", rec.Duration)
		}
	})
}

// The budget ends the last dial early.
func TestDialBudget(t *testing.T) {
	const budget = 3500 * time.Millisecond
	families(t, func(t *testing.T, loopback netip.Addr) {
		var endpoints []netip.AddrPort
		for range 4 {
			_, addr := hanging(t, loopback)
			endpoints = append(endpoints, addr)
		}
		r := newRig(t, setup{
			loopback: loopback, endpoints: endpoints,
			options: func(o *l4.Options) {
				// Far apart: a busy machine is late for either.
				o.DialTimeout, o.DialBudget, o.Attempts = budget*4/7, budget, 8
			},
		})
		r.wantRefused(r.listeners[0])
		rec := r.awaitEnded(1)[0]
		if rec.End != flow.ReasonDialTimeout || rec.Attempts != 2 {
			t.Errorf("record: %+v", rec)
		}
		if rec.Duration < budget || rec.Duration > patience {
			t.Errorf("a budget of %v took %v", budget, rec.Duration)
		}
	})
}

func TestDialTimeoutGoesToTheNext(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		_, hangs := hanging(t, loopback)
		good := serve(t, loopback, echo)
		r := newRig(t, setup{
			loopback: loopback, endpoints: []netip.AddrPort{hangs, good},
			options: func(o *l4.Options) { o.DialTimeout = 100 * time.Millisecond },
		})
		c := r.dial()
		mustExchange(t, c, "once and whole")
		c.Close()
		if rec := r.awaitEnded(1)[0]; rec.Endpoint != good || rec.Attempts != 2 || rec.Connect > rec.Duration-100*time.Millisecond {
			t.Errorf("record: %+v", rec)
		}
	})
}

// 200 dials that hang hold up no other connection of the same worker.
func TestHangingDialsHoldUpNobody(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		_, hangs := hanging(t, loopback)
		r := newRig(t, setup{
			loopback: loopback, perWorker: 2, endpoints: []netip.AddrPort{hangs},
			options: func(o *l4.Options) { o.DialTimeout, o.DialBudget = time.Hour, time.Hour },
			direct:  twoClusters, others: []netip.AddrPort{serve(t, loopback, echo)},
		})
		const n = 200
		var hung []*net.TCPConn
		for range n {
			c := mustDial(t, r.listeners[0])
			mustWrite(t, c, []byte("nobody hears it"))
			hung = append(hung, c)
		}
		r.awaitStats("all are dialed", func(s l4.Stats) bool { return s.Dials == n })
		start := time.Now()
		for range 300 {
			c := mustDial(t, r.listeners[1])
			mustExchange(t, c, "prompt")
			c.Close()
		}
		if took := time.Since(start); took > patience {
			t.Errorf("300 connections took %v", took)
		}
		open := 0
		for _, rec := range r.live() {
			if rec.Endpoint == hangs && rec.Attempts == 1 && rec.Sent == 0 && rec.Connect == 0 {
				open++
			}
		}
		if open != n || r.cluster.Endpoints[0].Live() != n {
			t.Errorf("%d dials are listed and %d counted, want %d", open, r.cluster.Endpoints[0].Live(), n)
		}
		// An application that gives up ends its dial.
		for _, c := range hung {
			reset(c)
		}
		resets := 0
		for _, rec := range r.awaitEnded(n + 300) {
			if rec.End == flow.ReasonDownstreamReset {
				resets++
			}
		}
		if resets != n {
			t.Errorf("%d of %d given up dials ended by the application's reset", resets, n)
		}
	})
}

// Each address is asked for before it is dialed; one that is not allowed ends
// the connection without another attempt.
func TestNotAllowed(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		handle := func(*net.TCPConn) { t.Error("a forbidden address was dialed") }
		r := newRig(t, setup{
			loopback:  loopback,
			endpoints: []netip.AddrPort{serve(t, loopback, handle), serve(t, loopback, handle)},
			allowed:   func(netip.AddrPort) flow.Reason { return flow.ReasonLoop },
		})
		r.wantRefused(r.listeners[0])
		if rec := r.awaitEnded(1)[0]; rec.End != flow.ReasonLoop || rec.Attempts != 1 {
			t.Errorf("record: %+v", rec)
		}
	})
}

// What is no connection of ours gets a reset, and no record.
func TestUnknown(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		r := newRig(t, setup{loopback: loopback, direct: func(*rig, netip.AddrPort, netip.AddrPort) (l4.Target, error) {
			return l4.Target{}, flow.NewError(flow.ReasonNotOurs, "not ours")
		}})
		for range 3 {
			r.wantRefused(r.listeners[0])
		}
		r.awaitStats("they are counted", func(s l4.Stats) bool { return s.Unknown == 3 })
		if s := r.relay.Stats(); s.Ended != 0 || s.Dials != 0 {
			t.Errorf("they were treated as connections: %+v", s)
		}
	})
}

// An error of the director's is the end of the connection, for its reason.
func TestDirectorRefuses(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		r := newRig(t, setup{loopback: loopback, direct: func(r *rig, local, remote netip.AddrPort) (l4.Target, error) {
			return r.target(local, remote), flow.NewError(flow.ReasonLoop, "comes back")
		}})
		r.wantRefused(r.listeners[0])
		if rec := r.awaitEnded(1)[0]; rec.End != flow.ReasonLoop || rec.Attempts != 0 || rec.Cookie == 0 {
			t.Errorf("record: %+v", rec)
		}
	})
}

// The upstream socket has the application's options, and is exempt before it
// connects.
func TestUpstreamIsDressed(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		var mu sync.Mutex
		var exempt []int
		server, conns := serveTo(t, loopback)
		d := flow.Downstream{
			TOS: 0x28, Priority: 5, UserTimeout: 54321,
			KeepAlive:  flow.KeepAlive{Count: 3, Idle: 7201, Interval: 11},
			Congestion: otherCongestion(t),
		}
		if os.Geteuid() == 0 {
			d.Mark = 0x1234
		}
		if loopback.Is4() {
			d.BoundSource = netip.MustParseAddr("127.0.0.9")
		}
		r := newRig(t, setup{
			loopback: loopback, endpoints: []netip.AddrPort{server},
			options: func(o *l4.Options) {
				o.Exempt = func(fd int) error {
					mu.Lock()
					defer mu.Unlock()
					if _, err := unix.Getpeername(fd); !errors.Is(err, unix.ENOTCONN) {
						t.Errorf("exempt of a connected socket: %v", err)
					}
					exempt = append(exempt, fd)
					return nil
				}
			},
			direct: func(r *rig, local, remote netip.AddrPort) (l4.Target, error) {
				target := r.target(local, remote)
				known := target.Downstream
				target.Downstream = d
				target.Downstream.Cookie, target.Downstream.Source, target.Downstream.OrigDst = known.Cookie, known.Source, known.OrigDst
				return target, nil
			},
		})
		c := r.dial()
		mustWrite(t, c, []byte("x"))
		s := accept(t, conns)
		wantBytes(t, s, []byte("x"))
		// A second write is when a leg like this gets an algorithm of its own.
		mustWrite(t, c, []byte("y"))
		wantBytes(t, s, []byte("y"))
		from := s.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()
		if d.BoundSource.IsValid() && from != d.BoundSource {
			t.Errorf("dialed from %s, want %s", from, d.BoundSource)
		}
		mu.Lock()
		defer mu.Unlock()
		if len(exempt) != 1 {
			t.Fatalf("%d sockets were exempt", len(exempt))
		}
		level, option := unix.IPPROTO_IP, unix.IP_TOS
		if loopback.Is6() {
			level, option = unix.IPPROTO_IPV6, unix.IPV6_TCLASS
		}
		wantOption(t, exempt[0], "tos", level, option, int(d.TOS))
		wantOption(t, exempt[0], "priority", unix.SOL_SOCKET, unix.SO_PRIORITY, int(d.Priority))
		wantOption(t, exempt[0], "mark", unix.SOL_SOCKET, unix.SO_MARK, int(d.Mark))
		wantOption(t, exempt[0], "keep-alive", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
		wantOption(t, exempt[0], "keep-alive count", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, int(d.KeepAlive.Count))
		wantOption(t, exempt[0], "keep-alive idle", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(d.KeepAlive.Idle))
		wantOption(t, exempt[0], "keep-alive interval", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(d.KeepAlive.Interval))
		wantOption(t, exempt[0], "user timeout", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(d.UserTimeout))
		want := unix.ByteSliceToString(d.Congestion[:])
		if got, err := unix.GetsockoptString(exempt[0], unix.IPPROTO_TCP, unix.TCP_CONGESTION); err != nil || got != want {
			t.Errorf("congestion control is %q (%v), want %q", got, err, want)
		}
		s.Close()
	})
}

// otherCongestion is one that a socket here may have and none has by itself: not
// the default, nor what a leg that does not leave the machine gets, reno. Where
// there is none it is reno all the same: a leg whose source is bound gets that
// from the application only. The default would say that nobody has chosen, and a
// leg without a bound source gets reno then.
func otherCongestion(t *testing.T) (name [16]byte) {
	t.Helper()
	read := func(what string) string {
		b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_" + what)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	own, other := read("congestion_control"), "reno"
	for _, a := range strings.Fields(read("available_congestion_control")) {
		if a != own && a != "reno" {
			other = a
		}
	}
	copy(name[:], other)
	return name
}

func wantOption(t *testing.T, fd int, name string, level, option, want int) {
	t.Helper()
	if got, err := unix.GetsockoptInt(fd, level, option); err != nil || got != want {
		t.Errorf("%s is %#x (%v), want %#x", name, got, err, want)
	}
}

// A socket that cannot be made exempt is never connected: the connection would
// come back to the handler.
func TestExemptFails(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server := serve(t, loopback, func(*net.TCPConn) { t.Error("dialed all the same") })
		r := newRig(t, setup{
			loopback: loopback, endpoints: []netip.AddrPort{server},
			options: func(o *l4.Options) { o.Exempt = func(int) error { return errors.New("no") } },
		})
		r.wantRefused(r.listeners[0])
		if rec := r.awaitEnded(1)[0]; rec.End != flow.ReasonDialFailed {
			t.Errorf("record: %+v", rec)
		}
	})
}

// What a listing and a record say of a connection.
func TestRecords(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server, conns := serveTo(t, loopback)
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{refusing(t, loopback), server}})
		began := time.Now()
		c := r.dial()
		mustWrite(t, c, []byte("12345"))
		s := accept(t, conns)
		wantBytes(t, s, []byte("12345"))
		mustWrite(t, s, []byte("123"))
		wantBytes(t, c, []byte("123"))
		want := flow.Record{
			Cookie: 1, Cgroup: 7, Service: "web", Cluster: "test",
			Source: c.LocalAddr().(*net.TCPAddr).AddrPort(), OrigDst: r.listeners[0], Endpoint: server,
			Path: flow.PathRelay, Reason: flow.ReasonService,
			Attempts: 2, Sent: 5, Received: 3, Open: true,
		}
		measured := cmp.Options{
			cmpopts.IgnoreFields(flow.Record{}, "Start", "Duration", "Connect", "RTT", "Retransmits"),
			cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
		}
		live := r.live()
		if diff := cmp.Diff([]flow.Record{want}, live, measured); diff != "" {
			t.Errorf("what is open (-want +got):\n%s", diff)
		}
		c.Close()
		s.Close()
		want.Open, want.End = false, flow.ReasonClosed
		records := r.awaitEnded(1)
		if diff := cmp.Diff([]flow.Record{want}, records, measured); diff != "" {
			t.Errorf("what ended (-want +got):\n%s", diff)
		}
		for _, rec := range append(live, records...) {
			if rec.Start.Before(began.Add(-time.Second)) || rec.Start.After(time.Now()) ||
				rec.Duration <= 0 || rec.Duration > time.Since(began)+time.Second ||
				rec.Connect <= 0 || rec.Connect > rec.Duration || rec.RTT <= 0 {
				t.Errorf("times: %+v", rec)
			}
		}
		if n := len(r.live()); n != 0 {
			t.Errorf("%d connections are open", n)
		}
	})
}
