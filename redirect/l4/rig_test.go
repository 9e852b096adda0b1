package l4_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"github.com/pillion-project/pillion/redirect/upstream"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// patience bounds whatever must happen: it is reached in a failure only.
const patience = 20 * time.Second

// families runs a test once over each address family, with a leak check.
func families(t *testing.T, test func(t *testing.T, loopback netip.Addr)) {
	t.Helper()
	for name, addr := range map[string]string{"v4": "127.0.0.1", "v6": "::1"} {
		t.Run(name, func(t *testing.T) {
			testutil.CheckLeaks(t)
			test(t, netip.MustParseAddr(addr))
		})
	}
}

var loopback4 = netip.MustParseAddr("127.0.0.1")

// setup says what rig to make. The zero value is one worker on IPv4 without
// endpoints.
type setup struct {
	loopback  netip.Addr
	workers   int
	perWorker int // listeners
	endpoints []netip.AddrPort
	others    []netip.AddrPort // of the cluster that twoClusters directs the second listener to
	options   func(*l4.Options)
	direct    func(r *rig, local, remote netip.AddrPort) (l4.Target, error)
	allowed   func(netip.AddrPort) flow.Reason
	again     func(r *rig, t *l4.Target) flow.Reason
	// killed has each successor die when it has written down what it was given, and
	// another one go on with that.
	killed bool
}

// rig is a running relay whose director stands for the kernel side.
type rig struct {
	setup
	t         testing.TB
	relay     *l4.Relay
	terms     *flow.Terms
	cluster   *upstream.Cluster
	other     *upstream.Cluster
	clusters  []*upstream.Cluster // what close checks
	listeners []netip.AddrPort
	cookies   atomic.Uint64
	next      atomic.Uint64
	drain     context.CancelFunc
	force     context.CancelFunc
	done      chan error
	records   []flow.Record
	closed    bool
	open      l4.Options // what relay was made with
	moved     l4.Stats   // of the relays before
}

func newRig(t testing.TB, s setup) *rig {
	t.Helper()
	if !s.loopback.IsValid() {
		s.loopback = loopback4
	}
	r := &rig{setup: s, t: t, done: make(chan error, 1)}
	r.cluster = r.newCluster("test", s.endpoints...)
	r.other = r.newCluster("other", s.others...)
	o := l4.Options{
		Limits:   flow.Limits{DialTimeout: 10 * time.Second, DialBudget: 20 * time.Second, Attempts: 3},
		MaxConns: 1 << 20,
	}
	for range max(s.workers, 1) {
		var fds []int
		for range max(s.perWorker, 1) {
			fd, err := l4.Listen(s.loopback, nil)
			if err != nil {
				t.Fatal(err)
			}
			fds = append(fds, fd)
			r.listeners = append(r.listeners, localAddr(t, fd))
		}
		o.Listeners = append(o.Listeners, fds)
	}
	if s.options != nil {
		s.options(&o)
	}
	r.terms = &flow.Terms{Service: "web", Limits: o.Limits}
	relay, err := l4.New(o, r)
	if err != nil {
		t.Fatal(err)
	}
	r.relay, r.open = relay, o
	r.run()
	return r
}

// newCluster makes a cluster that takes its endpoints in turn, from the first.
func (r *rig) newCluster(name string, endpoints ...netip.AddrPort) *upstream.Cluster {
	r.t.Helper()
	spec := upstream.ClusterSpec{Name: name, Policy: flow.PolicyRoundRobin}
	for _, e := range endpoints {
		spec.Endpoints = append(spec.Endpoints, upstream.EndpointSpec{Addr: e, Weight: 1})
	}
	s, err := upstream.Build(nil, []upstream.ClusterSpec{spec}, upstream.Options{})
	if err != nil {
		r.t.Fatal(err)
	}
	c := s.Cluster(name)
	r.clusters = append(r.clusters, c)
	return c
}

func (r *rig) run() {
	ctx, drain := context.WithCancel(context.Background())
	force, end := context.WithCancel(context.Background())
	r.drain, r.force = drain, end
	go r.serve(ctx, force)
	r.t.Cleanup(r.close)
}

func (r *rig) serve(ctx, force context.Context) { r.done <- r.relay.Run(ctx, force) }

// close drains the relay and checks that its books are balanced. The test's
// connections are closed by then, so nothing has to be forced.
func (r *rig) close() {
	if r.closed {
		return
	}
	r.closed = true
	r.drain()
	select {
	case err := <-r.done:
		if err != nil {
			r.t.Errorf("run: %v", err)
		}
	case <-time.After(patience):
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		live := r.relay.Live(ctx)
		cancel()
		r.t.Errorf("%d connections are left, for example %+v", len(live), live[:min(1, len(live))])
		r.force()
		<-r.done
	}
	r.force()
	r.balanced()
}

func (r *rig) balanced() {
	s := r.relay.Stats()
	s.Accepted, s.Refused, s.Ended = s.Accepted+r.moved.Accepted, s.Refused+r.moved.Refused, s.Ended+r.moved.Ended
	s.Unknown, s.Lost = s.Unknown+r.moved.Unknown, s.Lost+r.moved.Lost
	if s.Live != 0 || s.Pipes != 0 || s.Accepted+s.Refused != s.Ended+s.Unknown {
		r.t.Errorf("books at the end: %+v", s)
	}
	r.records = r.relay.Ended(r.records)
	if uint64(len(r.records))+s.Lost != s.Ended {
		r.t.Errorf("%d records and %d lost of %d connections", len(r.records), s.Lost, s.Ended)
	}
	for _, c := range r.clusters {
		for _, e := range c.Endpoints {
			if e.Live() != 0 {
				r.t.Errorf("endpoint %s of %s still has %d connections", e.Addr, c.Name, e.Live())
			}
		}
	}
	for i := range r.records {
		if rec := &r.records[i]; rec.Open || rec.End == flow.ReasonNone || rec.Duration < 0 {
			r.t.Errorf("no record of an end: %+v", *rec)
		}
	}
}

// target is what the kernel side and the table say of most connections.
func (r *rig) target(local, remote netip.AddrPort) l4.Target {
	return l4.Target{
		Downstream: flow.Downstream{
			Cookie:  r.cookies.Add(1),
			Cgroup:  7,
			Source:  remote,
			OrigDst: flow.OrigDst{AddrPort: local},
			Reason:  flow.ReasonService,
			Waits:   true, // if it has not been accepted
		},
		Terms:   r.terms,
		Cluster: r.cluster,
	}
}

// Direct implements l4.Director.
func (r *rig) Direct(local, remote netip.AddrPort) (l4.Target, error) {
	if r.direct != nil {
		return r.direct(r, local, remote)
	}
	return r.target(local, remote), nil
}

// Allowed implements l4.Director.
func (r *rig) Allowed(to netip.AddrPort) flow.Reason {
	if r.allowed != nil {
		return r.allowed(to)
	}
	return flow.ReasonNone
}

// Again implements l4.Director.
func (r *rig) Again(t *l4.Target) flow.Reason {
	if r.again != nil {
		return r.again(r, t)
	}
	return flow.ReasonNone
}

// twoClusters directs each of two listeners to a cluster of its own.
func twoClusters(r *rig, local, remote netip.AddrPort) (l4.Target, error) {
	t := r.target(local, remote)
	if local == r.listeners[1] {
		t.Cluster = r.other
	}
	return t, nil
}

// dial connects to the next listener in turn. The connection ends with the
// test, and whatever is waited for on it ends in time.
func (r *rig) dial() *net.TCPConn {
	r.t.Helper()
	c, err := r.tryDial()
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

// opened returns a connection over which a byte has come, from both sides.
func (r *rig) opened(t testing.TB, conns <-chan *net.TCPConn) (c, s *net.TCPConn) {
	t.Helper()
	c = r.dial()
	mustWrite(t, c, []byte("x"))
	s = accept(t, conns)
	wantBytes(t, s, []byte("x"))
	return c, s
}

func (r *rig) tryDial() (*net.TCPConn, error) {
	return dialTo(r.listeners[r.next.Add(1)%uint64(len(r.listeners))])
}

func dialTo(addr netip.AddrPort) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: patience}
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp", addr.String())
	if err != nil {
		return nil, err
	}
	if err := c.SetDeadline(time.Now().Add(2 * patience)); err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// awaitEnded waits for the records of n connections, and returns all.
func (r *rig) awaitEnded(n int) []flow.Record {
	r.t.Helper()
	testutil.Eventually(r.t, patience, func() bool {
		r.records = r.relay.Ended(r.records)
		return len(r.records) >= n
	}, "records of ", n, " connections")
	return r.records
}

func (r *rig) awaitStats(what string, done func(l4.Stats) bool) {
	r.t.Helper()
	testutil.Eventually(r.t, patience, func() bool { return done(r.relay.Stats()) }, what)
}

func (r *rig) live() []flow.Record {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	live := r.relay.Live(ctx)
	if ctx.Err() != nil {
		r.t.Error("listing what is open took too long")
	}
	return live
}

// serve runs handle for each connection to a server of its own, until the test
// ends. handle gets a connection with a deadline, and the server closes it.
func serve(t testing.TB, loopback netip.Addr, handle func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp", netip.AddrPortFrom(loopback, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() { acceptAll(ln, &running, handle) })
	t.Cleanup(func() {
		ln.Close()
		running.Wait()
	})
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

func acceptAll(ln net.Listener, running *sync.WaitGroup, handle func(*net.TCPConn)) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		_ = c.SetDeadline(time.Now().Add(2 * patience))
		running.Go(func() {
			defer c.Close()
			handle(c.(*net.TCPConn))
		})
	}
}

// echo answers every byte with itself, and the end of file with the same.
func echo(c *net.TCPConn) {
	// Not io.Copy, which would splice: the relay's own is what is tested.
	buf := make([]byte, 32<<10)
	for {
		n, err := c.Read(buf)
		if n > 0 {
			if _, err := c.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			_ = c.CloseWrite()
			return
		}
	}
}

// serveTo gives the test the connections to a server of its own.
func serveTo(t testing.TB, loopback netip.Addr) (addr netip.AddrPort, conns chan *net.TCPConn) {
	t.Helper()
	conns = make(chan *net.TCPConn, 4096)
	over := make(chan struct{})
	addr = serve(t, loopback, func(c *net.TCPConn) {
		conns <- c
		<-over
	})
	t.Cleanup(func() { close(over) })
	return addr, conns
}

// accept waits for the next connection, and closes it before the relay ends.
func accept(t testing.TB, conns <-chan *net.TCPConn) *net.TCPConn {
	t.Helper()
	c := receive(t, conns)
	t.Cleanup(func() { c.Close() })
	return c
}

func receive[T any](t testing.TB, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(patience):
		t.Fatal("nothing came")
		panic("not reached")
	}
}

// exchange sends message and wants it back.
func exchange(c net.Conn, message []byte) error {
	if _, err := c.Write(message); err != nil {
		return err
	}
	got := make([]byte, len(message))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != string(message) {
		return errors.New("the answer differs from the question")
	}
	return nil
}

func mustExchange(t testing.TB, c net.Conn, message string) {
	t.Helper()
	if err := exchange(c, []byte(message)); err != nil {
		t.Fatalf("exchange %.20q: %v", message, err)
	}
}

func mustWrite(t testing.TB, c net.Conn, b []byte) {
	t.Helper()
	if _, err := c.Write(b); err != nil {
		t.Fatalf("write %d bytes: %v", len(b), err)
	}
}

func wantBytes(t testing.TB, c *net.TCPConn, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(testutil.PastMarks(c), got); err != nil {
		t.Fatalf("read %d of %d bytes: %v", n, len(want), err)
	}
	if string(got) != string(want) {
		t.Fatalf("read %d wrong bytes", len(got))
	}
}

// wantEOF wants nothing but the end of file.
func wantEOF(t testing.TB, c *net.TCPConn) {
	t.Helper()
	rest, err := io.ReadAll(testutil.PastMarks(c))
	if err != nil || len(rest) > 0 {
		t.Fatalf("read %d bytes and then %v, want the end of file", len(rest), err)
	}
}

// wantReset wants these bytes and then a reset.
func wantReset(t testing.TB, c net.Conn, want []byte) {
	t.Helper()
	if err := checkReset(c, want); err != nil {
		t.Fatal(err)
	}
}

// wantRefused dials and wants nothing but a reset, which connect may see already.
func (r *rig) wantRefused(addr netip.AddrPort) {
	r.t.Helper()
	c, err := dialTo(addr)
	if errors.Is(err, syscall.ECONNRESET) {
		return
	}
	if err != nil {
		r.t.Fatal(err)
	}
	defer c.Close()
	wantReset(r.t, c, nil)
}

func checkReset(c net.Conn, want []byte) error {
	got, err := io.ReadAll(c)
	if string(got) != string(want) {
		return fmt.Errorf("read %d bytes before the reset (%v), want %d", len(got), err, len(want))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("read %d bytes and then %v, want a reset", len(got), err)
	}
	return nil
}

// reset closes c by a reset.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	c.Close()
}

func localAddr(t testing.TB, fd int) netip.AddrPort {
	t.Helper()
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	default:
		t.Fatalf("socket address %T", sa)
		panic("not reached")
	}
}

func sockaddrOf(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// boundSocket is a bound socket that ends with the test.
func boundSocket(t testing.TB, loopback netip.Addr) (fd int, addr netip.AddrPort) {
	t.Helper()
	fd, err := unix.Socket(familyOf(loopback), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, sockaddrOf(netip.AddrPortFrom(loopback, 0))); err != nil {
		t.Fatal(err)
	}
	return fd, localAddr(t, fd)
}

// refusing returns an address that refuses: it is bound, so that nobody else
// listens there, and does not listen.
func refusing(t testing.TB, loopback netip.Addr) netip.AddrPort {
	t.Helper()
	_, addr := boundSocket(t, loopback)
	return addr
}

// hanging returns a listener whose queue is full: a dial of it gets no answer
// until the connection that fills the queue is accepted, and the dial's next
// SYN after that is answered.
func hanging(t testing.TB, loopback netip.Addr) (fd int, addr netip.AddrPort) {
	t.Helper()
	fd, addr = boundSocket(t, loopback)
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	filler, err := dialTo(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { filler.Close() })
	testutil.Eventually(t, patience, func() bool {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		return err == nil && info.Unacked > 0 // of a listener: its queue
	}, "the queue is full")
	return fd, addr
}
