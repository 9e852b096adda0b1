package check

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// asker is a checker that asks for real, once.
func asker() *Checker { return New(Options{Report: func(Change) {}}) }

// within returns a context for one question.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// listen listens on an address until the test ends.
func listen(t *testing.T, a string) net.Listener {
	t.Helper()
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(t.Context(), "tcp", a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

func addrOf(ln net.Listener) netip.AddrPort { return ln.Addr().(*net.TCPAddr).AddrPort() }

// silent returns an address that does not answer: its accept queue is full.
func silent(t *testing.T) netip.AddrPort {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	a := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(name.(*unix.SockaddrInet4).Port))
	conn, err := net.Dial("tcp", a.String()) // a queue of 0 has room for one
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return a
}

// wantErr compares the text of an error; nothing is no error.
func wantErr(t *testing.T, err error, want string) {
	t.Helper()
	got := ""
	if err != nil {
		got = err.Error()
	}
	if got != want {
		t.Errorf("error %q, want %q", got, want)
	}
}

func TestTCP(t *testing.T) {
	c := asker()
	s := Default()
	for _, a := range []string{"127.0.0.1:0", "[::1]:0"} {
		ln := listen(t, a)
		to := addrOf(ln)
		wantErr(t, c.ask(within(t, limit), Target{Addr: to, Spec: s}), "")
		conn, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		// An end, and not a reset.
		if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil || err.Error() != "EOF" {
			t.Errorf("the endpoint reads %d bytes, %v", n, err)
		}
		conn.Close()

		s := s
		s.Port = to.Port()
		wantErr(t, c.ask(within(t, limit), Target{Addr: netip.AddrPortFrom(to.Addr(), 1), Spec: s}), "")
		ln.Close()
		err = c.ask(within(t, limit), Target{Addr: to, Spec: Default()})
		wantErr(t, err, "connect: connection refused")
		if isOwn(err) {
			t.Error("a refused connection is our own failure")
		}
	}
	err := c.ask(within(t, 50*time.Millisecond), Target{Addr: silent(t), Spec: s})
	wantErr(t, err, "connect: no answer in time")
	if isOwn(err) {
		t.Error("silence is our own failure")
	}
}

// TestOwnFailures: what hits every endpoint alike is not the endpoint's.
func TestOwnFailures(t *testing.T) {
	for _, tt := range []struct {
		errno syscall.Errno
		own   bool
	}{
		{unix.ECONNREFUSED, false}, {unix.ETIMEDOUT, false}, {unix.EHOSTUNREACH, false}, {unix.ENETUNREACH, false},
		{unix.EMFILE, true}, {unix.ENOBUFS, true}, {unix.EADDRNOTAVAIL, true}, {unix.EPERM, true}, {unix.EACCES, true}, {unix.EAGAIN, true},
	} {
		if got := !isEndpoints(&net.OpError{Op: "dial", Err: tt.errno}); got != tt.own {
			t.Errorf("%v is our own: %v, want %v", tt.errno, got, tt.own)
		}
	}
	c := asker()
	// There is no address in front of a scope that does not exist.
	err := c.ask(within(t, limit), Target{Addr: netip.MustParseAddrPort("[fe80::1%nowhere]:80"), Spec: Default()})
	if !isOwn(err) {
		t.Errorf("an address that cannot be dialed is the endpoint's failure: %v", err)
	}
}

// TestExempt: every socket is a plain TCP one and is marked before it connects.
func TestExempt(t *testing.T) {
	ln := listen(t, "127.0.0.1:0")
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			conn.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
			conn.Close()
		}
	}()
	for _, kind := range []Kind{KindTCP, KindHTTP} {
		var marked int
		c := asker()
		c.o.Exempt = func(fd int) error {
			marked++
			if _, err := unix.Getpeername(fd); !errors.Is(err, unix.ENOTCONN) {
				t.Errorf("%s: connected before it is marked: %v", kind, err)
			}
			if p, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || p != unix.IPPROTO_TCP {
				t.Errorf("%s: protocol %d, %v", kind, p, err)
			}
			return nil
		}
		s := Default()
		s.Kind = kind
		target := Target{Addr: addrOf(ln), Spec: s}
		wantErr(t, c.ask(within(t, limit), target), "")
		if marked != 1 {
			t.Errorf("%s: %d sockets were marked", kind, marked)
		}
		c.o.Exempt = func(int) error { return errors.New("tag socket: no memory") }
		err := c.ask(within(t, limit), target)
		wantErr(t, err, "connect: tag socket: no memory")
		if !isOwn(err) {
			t.Errorf("%s: a socket that cannot be marked is the endpoint's failure", kind)
		}
	}
}

// TestFlapping follows a real endpoint that comes and goes.
func TestFlapping(t *testing.T) {
	r := &reports{}
	c := New(Options{Report: r.add})
	ln := listen(t, "127.91.7.3:0")
	to := addrOf(ln)
	s := spec(minInterval)
	s.Timeout = limit // a busy machine is no failure
	set(t, c, Target{Cluster: "shop", Addr: to, Spec: s})
	run(t, c)
	want := []State{StateUp}
	r.want(t, to, want...)
	for range 3 {
		ln.Close()
		want = append(want, StateDown)
		r.want(t, to, want...)
		if got := status(t, c, to); got.Err != "connect: connection refused" {
			t.Errorf("down because of %q", got.Err)
		}
		ln = listen(t, to.String())
		want = append(want, StateUp)
		r.want(t, to, want...)
	}
}

// TestMany checks 10,000 real endpoints, with bounded goroutines.
func TestMany(t *testing.T) {
	const n = 10000
	ln := listen(t, "0.0.0.0:0")
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	})
	defer accepting.Wait()
	defer ln.Close()

	var dialing, most atomic.Int64
	r := &reports{}
	c := New(Options{Report: r.add, Parallel: 32})
	ask := c.probe
	c.probe = func(ctx context.Context, t Target) error {
		storeMax(&most, dialing.Add(1))
		defer dialing.Add(-1)
		return ask(ctx, t)
	}
	s := spec(time.Second)
	s.Timeout = limit
	var all []Target
	for i := range n {
		all = append(all, Target{Cluster: "shop", Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 92, byte(i >> 8), byte(i)}), addrOf(ln).Port()), Spec: s})
	}
	set(t, c, all...)
	stop := run(t, c)
	testutil.Eventually(t, limit, func() bool { return r.count() >= n }, "all were checked")
	stop()
	if most.Load() > 32 {
		t.Errorf("%d checks at once", most.Load())
	}
	for _, s := range c.States() {
		if s.State != StateUp {
			t.Fatalf("%+v", s)
		}
	}
}

// serve answers every connection by a function, until the test ends, and tells
// what was asked.
func serve(t *testing.T, a string, answer func(net.Conn)) (netip.AddrPort, func() []string) {
	t.Helper()
	ln := listen(t, a)
	var mu sync.Mutex
	var asked []string
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				text := readRequest(conn)
				mu.Lock()
				asked = append(asked, text)
				mu.Unlock()
				answer(conn)
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		serving.Wait()
	})
	return addrOf(ln), func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(asked)
	}
}

// readRequest reads up to the empty line.
func readRequest(conn net.Conn) string {
	var text strings.Builder
	b := make([]byte, 1)
	for !strings.HasSuffix(text.String(), "\r\n\r\n") {
		if _, err := conn.Read(b); err != nil {
			break
		}
		text.Write(b)
	}
	return text.String()
}
