package handler_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/handler"
	"github.com/pillion-project/pillion/redirect/route"
	"github.com/pillion-project/pillion/redirect/upstream"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	// A relay wants two processors more than it has workers.
	runtime.GOMAXPROCS(max(6, runtime.GOMAXPROCS(0)))
	testutil.Main(m)
}

const patience = 10 * time.Second

// kernel stands for the kernel side: it names the connections to a listener by
// what the test says that the application asked for.
type kernel struct {
	mu      sync.Mutex
	orig    netip.AddrPort // not valid: nobody in scope opened it
	cookies uint64
}

func (k *kernel) set(orig netip.AddrPort) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.orig = orig
}

// Live implements origdst.Live.
func (k *kernel) Live(source, _ netip.AddrPort) (flow.Downstream, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.cookies++
	return flow.Downstream{
		Cookie: k.cookies, Source: source, OrigDst: flow.OrigDst{AddrPort: k.orig}, Reason: flow.ReasonService,
	}, k.orig.IsValid()
}

// Open implements origdst.Live.
func (k *kernel) Open(_, _ netip.AddrPort) bool { return true }

// rig is a running handler.
type rig struct {
	t       testing.TB
	kernel  kernel
	handler *handler.Handler
	v4, v6  []netip.AddrPort
	records []flow.Record
}

var limits = flow.Limits{DialTimeout: time.Second, DialBudget: 2 * time.Second, Attempts: 3}

func newRig(t *testing.T, table *route.Table, slots ...netip.Prefix) *rig {
	t.Helper()
	r := &rig{t: t}
	var err error
	r.handler, err = handler.New(handler.Options{
		Live: &r.kernel, Table: table, Slots: slots,
		Listen4: netip.MustParseAddr("127.0.0.1"), Listen6: netip.IPv6Loopback(),
		Workers: 2, Limits: limits, MaxConns: 1000,
	})
	if err != nil {
		t.Fatal(err)
	}
	v4, v6 := r.handler.Listeners()
	r.v4, r.v6 = addrs(t, v4), addrs(t, v6)
	ctx, drain := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.handler.Run(ctx, context.Background()) }()
	t.Cleanup(func() {
		drain()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Error("the handler did not drain")
		}
	})
	return r
}

func addrs(t *testing.T, fds []int) (all []netip.AddrPort) {
	t.Helper()
	for _, fd := range fds {
		sa, err := unix.Getsockname(fd)
		if err != nil {
			t.Fatal(err)
		}
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			all = append(all, netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)))
		case *unix.SockaddrInet6:
			all = append(all, netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)))
		}
	}
	return all
}

func table(t *testing.T, name string, service netip.AddrPort, endpoints ...netip.AddrPort) *route.Table {
	t.Helper()
	spec := upstream.ClusterSpec{Name: name, Policy: flow.PolicyRoundRobin}
	for _, e := range endpoints {
		spec.Endpoints = append(spec.Endpoints, upstream.EndpointSpec{Addr: e, Weight: 1})
	}
	s, err := upstream.Build(nil, []upstream.ClusterSpec{spec}, upstream.Options{})
	if err != nil {
		t.Fatal(err)
	}
	made, err := route.NewTable([]route.Service{{Name: name, Addr: service, Cluster: s.Cluster(name)}}, limits)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// greeter is a server that says its name and ends when the client does.
func greeter(t *testing.T, name string) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			running.Go(func() { greet(c, name) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		running.Wait()
	})
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

func greet(c net.Conn, name string) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	_, _ = io.WriteString(c, name)
	_, _ = io.Copy(io.Discard, c)
}

// open dials the handler and wants to hear this.
func open(t *testing.T, to netip.AddrPort, want string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", to.String(), patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("heard %q (%v), want %q", got, err, want)
	}
	return c.(*net.TCPConn)
}

// wantReset dials the handler and wants nothing but a reset.
func wantReset(t *testing.T, to netip.AddrPort) {
	t.Helper()
	c, err := net.DialTimeout("tcp", to.String(), patience)
	if err == nil {
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("want a reset, got %v", err)
	}
}

func (r *rig) lastEnded(n int) flow.Record {
	r.t.Helper()
	testutil.Eventually(r.t, patience, func() bool {
		r.records = r.handler.Ended(r.records)
		return len(r.records) >= n
	}, "the record of an end")
	return r.records[n-1]
}

var service = netip.MustParseAddrPort("10.96.0.12:80")

// A service's address leads to its cluster, through every listener.
func TestService(t *testing.T) {
	testutil.CheckLeaks(t)
	good := greeter(t, "endpoint")
	r := newRig(t, table(t, "web", service, good))
	r.kernel.set(service)
	if len(r.v4) != 2 || len(r.v6) != 2 {
		t.Fatalf("%d and %d listeners, want one per worker", len(r.v4), len(r.v6))
	}
	for i, to := range append(r.v4, r.v6...) {
		c := open(t, to, "endpoint")
		if live := r.handler.Live(context.Background()); len(live) != 1 || live[0].OrigDst != service {
			t.Errorf("open: %+v", live)
		}
		c.Close()
		rec := r.lastEnded(i + 1)
		if rec.Service != "web" || rec.Cluster != "web" || rec.OrigDst != service || rec.Endpoint != good || rec.End != flow.ReasonClosed {
			t.Errorf("record: %+v", rec)
		}
	}
	if !r.handler.Moved() || r.handler.Lost() != 0 || r.handler.Backlog() != 0 {
		t.Error("an idle handler shows signs of trouble")
	}
}

// What the kernel side does not know gets a reset and no record.
func TestUnknown(t *testing.T) {
	testutil.CheckLeaks(t)
	r := newRig(t, nil)
	wantReset(t, r.v4[0])
	wantReset(t, r.v6[0])
	testutil.Eventually(t, patience, func() bool {
		s := r.handler.Stats()
		return s.Unknown == 2 && s.Ended == 0
	}, "both are counted, and no connection")
}

// The handler is no open relay: it never dials what cannot have been captured.
func TestNeverDialed(t *testing.T) {
	testutil.CheckLeaks(t)
	slots := []netip.Prefix{netip.MustParsePrefix("240.0.0.0/10"), netip.MustParsePrefix("fd70:696c:6c69::/48")}
	here := greeter(t, "must not be heard")
	// A slot is not even dialed when a service names it as an endpoint.
	r := newRig(t, table(t, "web", service, netip.MustParseAddrPort("240.1.2.3:80")), slots...)
	for i, to := range []netip.AddrPort{
		here,
		netip.AddrPortFrom(netip.MustParseAddr("::ffff:127.0.0.1"), here.Port()),
		netip.AddrPortFrom(netip.MustParseAddr("0.0.0.0"), here.Port()),
		netip.AddrPortFrom(netip.IPv6Loopback(), here.Port()),
		netip.AddrPortFrom(netip.IPv6Unspecified(), here.Port()),
		netip.MustParseAddrPort("169.254.169.254:80"),
		netip.MustParseAddrPort("[fe80::1]:80"),
		netip.MustParseAddrPort("224.0.0.1:80"),
		netip.MustParseAddrPort("[ff02::1]:80"),
		netip.MustParseAddrPort("240.0.0.1:80"),
		netip.MustParseAddrPort("240.63.255.255:80"),
		netip.MustParseAddrPort("[fd70:696c:6c69:1::1]:80"),
		service,
	} {
		r.kernel.set(to)
		wantReset(t, r.v4[i%2])
		if rec := r.lastEnded(i + 1); rec.End != flow.ReasonLoop {
			t.Errorf("%s: record: %+v", to, rec)
		}
	}
}

// A new table is for new connections; those that are open stay where they are.
func TestSetTable(t *testing.T) {
	testutil.CheckLeaks(t)
	first, second := table(t, "web", service, greeter(t, "first")), table(t, "web", service, greeter(t, "second"))
	r := newRig(t, first)
	r.kernel.set(service)
	old := open(t, r.v4[0], "first")
	r.handler.SetTable(second)
	if r.handler.Table() != second {
		t.Error("the table is not the one that was set")
	}
	young := open(t, r.v4[0], "second")
	if n := len(r.handler.Live(context.Background())); n != 2 {
		t.Errorf("%d connections are open, want both", n)
	}
	for i, c := range []*net.TCPConn{old, young} {
		if _, err := c.Write([]byte("still there")); err != nil {
			t.Error(err)
		}
		if err := c.CloseWrite(); err != nil {
			t.Error(err)
		}
		if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
			t.Errorf("connection %d: %q, %v", i, rest, err)
		}
	}
	r.lastEnded(2)
}

// An endpoint that was removed: its connections end at once if that is asked for.
func TestEnd(t *testing.T) {
	testutil.CheckLeaks(t)
	gone := greeter(t, "first")
	first, second := table(t, "web", service, gone), table(t, "web", service, greeter(t, "second"))
	r := newRig(t, first)
	r.kernel.set(service)
	old := open(t, r.v4[0], "first")
	r.handler.SetTable(second)
	young := open(t, r.v4[1], "second")
	if n := r.handler.End(context.Background(), "web", gone); n != 1 {
		t.Errorf("%d connections ended, want 1", n)
	}
	if _, err := old.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("want a reset, got %v", err)
	}
	if rec := r.lastEnded(1); rec.End != flow.ReasonEndpointRemoved || rec.Endpoint != gone {
		t.Errorf("record: %+v", rec)
	}
	young.Close()
	if rec := r.lastEnded(2); rec.End != flow.ReasonClosed {
		t.Errorf("record: %+v", rec)
	}
}

// Further attempts go by the table of now; without the service there are none.
func TestAgain(t *testing.T) {
	first := table(t, "web", service, netip.MustParseAddrPort("192.0.2.1:80"))
	second := table(t, "new", service, netip.MustParseAddrPort("192.0.2.2:80"))
	r := newRig(t, first)
	r.kernel.set(service)
	target, err := r.handler.Direct(netip.AddrPort{}, netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	r.handler.SetTable(second)
	if why := r.handler.Again(&target); why != flow.ReasonNone || target.Cluster != second.Services()[0].Cluster {
		t.Errorf("%s: %+v", why, target)
	}
	r.handler.SetTable(nil)
	if why := r.handler.Again(&target); why != flow.ReasonEndpointRemoved {
		t.Errorf("without the service: %s", why)
	}
}

// New closes what it opened when it fails.
func TestNewFails(t *testing.T) {
	testutil.CheckLeaks(t)
	good := handler.Options{
		Live: &kernel{}, Listen4: netip.MustParseAddr("127.0.0.1"), Listen6: netip.IPv6Loopback(),
		Workers: 2, Limits: flow.Limits{DialTimeout: 1, DialBudget: 1, Attempts: 1}, MaxConns: 1,
	}
	want := errors.New("no")
	calls := 0
	noExempt := good
	noExempt.Exempt = func(int) error {
		if calls++; calls == 3 {
			return want
		}
		return nil
	}
	if _, err := handler.New(noExempt); !errors.Is(err, want) {
		t.Errorf("without an exemption: %v", err)
	}
	noAttempts := good
	noAttempts.Attempts = 0
	if _, err := handler.New(noAttempts); err == nil {
		t.Error("without attempts: no error")
	}
}

// A destination that no service names is dialed itself.
func TestUnnamedDestination(t *testing.T) {
	testutil.CheckLeaks(t)
	ln, err := net.Listen("tcp", netip.AddrPortFrom(ownAddr(t), 0).String())
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		c, err := ln.Accept()
		if err == nil {
			greet(c, "itself")
		}
	})
	t.Cleanup(func() {
		ln.Close()
		running.Wait()
	})
	dst := ln.Addr().(*net.TCPAddr).AddrPort()
	r := newRig(t, table(t, "web", service, greeter(t, "endpoint")))
	r.kernel.set(dst)
	open(t, r.v4[0], "itself").Close()
	if rec := r.lastEnded(1); rec.Endpoint != dst || rec.Service != "" || rec.Cluster != "" || rec.Attempts != 1 {
		t.Errorf("record: %+v", rec)
	}
}

// ownAddr is an address of this machine that is not loopback: the handler does
// not dial that.
func ownAddr(t *testing.T) netip.Addr {
	t.Helper()
	all, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && p.Addr().IsGlobalUnicast() {
			return p.Addr()
		}
	}
	t.Skip("this machine has no address but loopback")
	panic("not reached")
}
