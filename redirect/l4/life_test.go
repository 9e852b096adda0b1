package l4_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// A silent connection ends, one that moves bytes does not.
func TestIdleTimeout(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		// A busy machine may do nothing else for a while.
		const timeout = 2500 * time.Millisecond
		r := newRig(t, setup{
			loopback: loopback, endpoints: []netip.AddrPort{serve(t, loopback, echo)},
			options: func(o *l4.Options) { o.IdleTimeout = timeout },
		})
		silent, busy := r.dial(), r.dial()
		mustExchange(t, silent, "and no more")
		for start := time.Now(); time.Since(start) < 2*timeout; {
			mustExchange(t, busy, "go on")
		}
		wantReset(t, silent, nil)
		rec := r.awaitEnded(1)[0]
		if rec.End != flow.ReasonIdleTimeout || rec.Duration < timeout || rec.Duration > timeout+patience {
			t.Errorf("record: %+v", rec)
		}
		mustExchange(t, busy, "still there")
		busy.Close()
		if rec := r.awaitEnded(2)[1]; rec.End != flow.ReasonClosed {
			t.Errorf("the busy one: %+v", rec)
		}
	})
}

func TestMaxLifetime(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		const lifetime = 300 * time.Millisecond
		r := newRig(t, setup{
			loopback: loopback, endpoints: []netip.AddrPort{serve(t, loopback, echo)},
			options: func(o *l4.Options) { o.MaxLifetime = lifetime },
		})
		c := r.dial()
		for err := error(nil); err == nil; {
			err = exchange(c, []byte("go on"))
		}
		rec := r.awaitEnded(1)[0]
		if rec.End != flow.ReasonMaxLifetime || rec.Duration < lifetime || rec.Duration > lifetime+patience {
			t.Errorf("record: %+v", rec)
		}
	})
}

// At the limit nothing is accepted: connections wait until one ends.
func TestMaxConns(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		const limit = 10
		r := newRig(t, setup{
			loopback: loopback, endpoints: []netip.AddrPort{serve(t, loopback, echo)},
			options: func(o *l4.Options) { o.MaxConns = limit },
		})
		var conns []*net.TCPConn
		for range limit {
			c := r.dial()
			mustExchange(t, c, "in")
			conns = append(conns, c)
		}
		var waiting []*net.TCPConn
		for range limit {
			c := r.dial()
			mustWrite(t, c, []byte("waits"))
			waiting = append(waiting, c)
		}
		r.awaitStats("accepting pauses", func(s l4.Stats) bool { return s.Pauses > 0 })
		for range 100 {
			mustExchange(t, conns[0], "open ones go on")
		}
		if s := r.relay.Stats(); s.Accepted != limit || s.Live != limit {
			t.Errorf("at the limit: %+v", s)
		}
		for i, c := range conns {
			c.Close()
			wantBytes(t, waiting[i], []byte("waits"))
			if live := r.relay.Stats().Live; live > limit {
				t.Errorf("%d connections, more than the limit", live)
			}
		}
		for _, c := range waiting {
			mustExchange(t, c, "at last")
			c.Close()
		}
		r.awaitEnded(2 * limit)
	})
}

const envFewDescriptors = "PILLION_TEST_FEW_DESCRIPTORS"

// With no descriptor left accepting pauses, nobody else is disturbed, and it
// goes on when there are some. It runs in a process of its own, whose limit it
// can lower.
func TestDescriptorLimit(t *testing.T) {
	if os.Getenv(envFewDescriptors) == "1" {
		families(t, testDescriptorLimit)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestDescriptorLimit$", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), envFewDescriptors+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("with few descriptors: %v\n%s", err, out)
	}
}

func testDescriptorLimit(t *testing.T, loopback netip.Addr) {
	r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{serve(t, loopback, echo)}})
	first := r.dial()
	mustExchange(t, first, "before")

	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	// Open what will be clients, then leave no descriptor to the relay.
	var fds []int
	for range 20 {
		fd, err := unix.Socket(familyOf(loopback), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, fd)
	}
	limit := before
	limit.Cur = uint64(lowestFree(t))
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	restore := func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
			t.Fatal(err)
		}
	}
	defer restore()
	for _, fd := range fds {
		if err := unix.Connect(fd, sockaddrOf(r.listeners[0])); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(fd, []byte("waits")); err != nil {
			t.Fatal(err)
		}
	}
	r.awaitStats("accepting pauses", func(s l4.Stats) bool { return s.Pauses > 0 })
	for range 100 {
		mustExchange(t, first, "not disturbed")
	}
	restore()
	for _, fd := range fds {
		_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 8})
		b := make([]byte, 5)
		n, err := unix.Read(fd, b)
		for err == unix.EINTR { // the runtime's signals; a read with a time-out is not restarted
			n, err = unix.Read(fd, b)
		}
		if err != nil || string(b[:n]) != "waits" {
			t.Errorf("once there are descriptors: %q, %v", b[:max(n, 0)], err)
		}
		unix.Close(fd)
	}
	first.Close()
	for _, rec := range r.awaitEnded(len(fds) + 1) {
		if rec.End != flow.ReasonClosed {
			t.Errorf("record: %+v", rec)
		}
	}
}

// lowestFree returns the number that the next descriptor gets.
func lowestFree(t *testing.T) int {
	t.Helper()
	fd, err := unix.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	return fd
}

// Drain: no new connection, and the open ones go on for as long as they like.
func TestDrain(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		r := newRig(t, setup{loopback: loopback, workers: 2, endpoints: []netip.AddrPort{serve(t, loopback, echo)}})
		var conns []*net.TCPConn
		for range 10 {
			c := r.dial()
			mustExchange(t, c, "before")
			conns = append(conns, c)
		}
		r.drain()
		for _, addr := range r.listeners {
			testutil.Eventually(t, patience, func() bool {
				c, err := dialTo(addr)
				if err == nil {
					c.Close()
				}
				return errors.Is(err, syscall.ECONNREFUSED)
			}, "new connections are refused")
		}
		for _, c := range conns {
			mustExchange(t, c, "during")
			if r.relay.Backlog() != 0 {
				t.Error("a drained relay has a backlog")
			}
		}
		if n := len(r.live()); n < len(conns) {
			t.Errorf("%d connections are open", n)
		}
		select {
		case err := <-r.done:
			t.Fatalf("Run returned with open connections: %v", err)
		default:
		}
		for _, c := range conns {
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			wantEOF(t, c)
			c.Close()
		}
		r.close()
		if n := len(r.live()); n != 0 {
			t.Errorf("%d connections are open after the end", n)
		}
	})
}

// What was in the accept queue when the drain began is served.
func TestDrainServesTheQueue(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server := serve(t, loopback, echo)
		for range 20 {
			r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
			var conns []*net.TCPConn
			for range 20 {
				conns = append(conns, r.dial())
			}
			r.drain()
			for _, c := range conns {
				mustExchange(t, c, "queued")
				c.Close()
			}
			r.close()
		}
	})
}

func TestForce(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		_, hangs := hanging(t, loopback)
		r := newRig(t, setup{
			loopback: loopback, workers: 2, perWorker: 2, direct: twoClusters,
			endpoints: []netip.AddrPort{serve(t, loopback, echo)}, others: []netip.AddrPort{hangs},
		})
		var conns []*net.TCPConn
		for range 10 {
			c := mustDial(t, r.listeners[0])
			mustExchange(t, c, "before")
			conns = append(conns, c, mustDial(t, r.listeners[1]))
		}
		r.awaitStats("all are dialed", func(s l4.Stats) bool { return s.Dials == 20 })
		r.drain()
		r.force()
		r.close()
		for _, c := range conns {
			wantReset(t, c, nil)
		}
		for _, rec := range r.records {
			if rec.End != flow.ReasonDrained {
				t.Errorf("record: %+v", rec)
			}
		}
	})
}

// Both deadlines at once, with connections on their way in: Run has to end.
func TestForceAtOnce(t *testing.T) {
	testutil.CheckLeaks(t)
	server := serve(t, loopback4, func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)) })
	for range 500 {
		var listeners [][]int
		var addrs []netip.AddrPort
		for range 2 {
			fd, err := l4.Listen(loopback4, nil)
			if err != nil {
				t.Fatal(err)
			}
			listeners = append(listeners, []int{fd})
			addrs = append(addrs, localAddr(t, fd))
		}
		r := &rig{t: t}
		r.cluster = r.newCluster("test", server)
		relay, err := l4.New(l4.Options{
			Listeners: listeners, Limits: flow.Limits{DialTimeout: time.Hour, DialBudget: time.Hour, Attempts: 1}, MaxConns: 1000,
		}, r)
		if err != nil {
			t.Fatal(err)
		}
		r.relay = relay
		var conns []*net.TCPConn
		for i := range 6 {
			conns = append(conns, mustDial(t, addrs[i%2]))
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- relay.Run(ctx, ctx) }()
		cancel()
		if err := receive(t, done); err != nil {
			t.Fatal(err)
		}
		r.balanced()
		for _, c := range conns {
			c.Close()
		}
	}
}

// New frees the listeners when it fails.
func TestNewFails(t *testing.T) {
	testutil.CheckLeaks(t)
	good := l4.Options{Limits: flow.Limits{DialTimeout: 1, DialBudget: 1, Attempts: 1}, MaxConns: 1}
	for name, spoil := range map[string]func(*l4.Options){
		"attempts":          func(o *l4.Options) { o.Attempts = 0 },
		"too many attempts": func(o *l4.Options) { o.Attempts = 9 },
		"dial timeout":      func(o *l4.Options) { o.DialTimeout = 0 },
		"dial budget":       func(o *l4.Options) { o.DialBudget = 0 },
		"connections":       func(o *l4.Options) { o.MaxConns = 0 },
		"workers": func(o *l4.Options) {
			for range 100 {
				o.Listeners = append(o.Listeners, nil)
			}
		},
	} {
		o := good
		fd, err := l4.Listen(loopback4, nil)
		if err != nil {
			t.Fatal(err)
		}
		o.Listeners = [][]int{{fd}}
		spoil(&o)
		if _, err := l4.New(o, &rig{t: t}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	t.Setenv("GODEBUG", "asyncpreemptoff=1")
	if _, err := l4.New(good, &rig{t: t}); !errors.Is(err, l4.ErrNoPreemption) {
		t.Errorf("without preemption: %v", err)
	}
}

func TestListenFails(t *testing.T) {
	testutil.CheckLeaks(t)
	want := errors.New("no")
	if _, err := l4.Listen(loopback4, func(int) error { return want }); !errors.Is(err, want) {
		t.Errorf("listen: %v", err)
	}
}

// A target's own limits hold for its connections, and the relay's for others.
func TestTermsOfATarget(t *testing.T) {
	own := flow.Terms{Limits: flow.Limits{
		DialTimeout: time.Hour, DialBudget: time.Hour, Attempts: 1, MaxLifetime: 200 * time.Millisecond,
	}}
	r := newRig(t, setup{
		endpoints: []netip.AddrPort{serve(t, loopback4, echo)},
		direct: func(r *rig, _, _ netip.AddrPort) (l4.Target, error) {
			target := l4.Target{Downstream: flow.Downstream{Cookie: r.cookies.Add(1)}, Cluster: r.cluster}
			if target.Downstream.Cookie == 2 {
				target.Terms = &own
			}
			return target, nil
		},
	})
	unbounded := r.dial()
	mustExchange(t, unbounded, "the first")
	bounded := r.dial()
	rec := r.awaitEnded(1)[0]
	if rec.End != flow.ReasonMaxLifetime || rec.Cookie != 2 {
		t.Errorf("record: %+v", rec)
	}
	wantReset(t, bounded, nil)
	mustExchange(t, unbounded, "still there")
	unbounded.Close()
	r.awaitEnded(2)
}

// What a process that is killed leaves open ends with a reset on both sides: an end of
// file would say that this was all.
func TestDeath(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server, conns := serveTo(t, loopback)
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		c := r.dial()
		s := accept(t, conns)
		mustWrite(t, c, []byte("half of a request"))
		wantBytes(t, s, []byte("half of a request"))
		mustWrite(t, s, []byte("half of an answer"))
		wantBytes(t, c, []byte("half of an answer"))
		f := r.freeze()
		f.Leave()
		if err := receive(t, r.done); err != nil {
			t.Fatal(err)
		}
		closeAll(f.Given()) // as the kernel does
		wantReset(t, c, nil)
		wantReset(t, s, nil)
		r.closed = true // its books are as open as its connections
	})
}
