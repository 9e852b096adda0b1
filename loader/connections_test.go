package loader

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// serve listens in a namespace, and keeps what comes. It ends with the test.
func serve(t testing.TB, ns *testutil.NS, at netip.AddrPort) <-chan net.Conn {
	t.Helper()
	var l net.Listener
	ns.Do(t, func() (err error) {
		var c net.ListenConfig
		c.SetMultipathTCP(false)
		l, err = c.Listen(t.Context(), "tcp", at.String())
		return err
	})
	conns := make(chan net.Conn, 1024)
	done := make(chan struct{})
	go accept(l, conns, done)
	t.Cleanup(func() {
		l.Close()
		<-done
		for c := range conns {
			c.Close()
		}
	})
	return conns
}

func accept(l net.Listener, conns chan<- net.Conn, done chan<- struct{}) {
	defer close(done)
	defer close(conns)
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		conns <- c
	}
}

// withCaps calls f on a thread that has these capabilities and no others.
func withCaps(f func() error, caps ...int) error {
	done := make(chan error, 1)
	go limited(f, caps, done)
	return <-done
}

// limited ends its thread: the runtime does not reuse one that is locked.
func limited(f func() error, caps []int, done chan<- error) {
	runtime.LockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for _, c := range caps {
		data[c/32].Effective |= 1 << (c % 32)
		data[c/32].Permitted |= 1 << (c % 32)
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		done <- fmt.Errorf("drop capabilities: %w", err)
		return
	}
	done <- f()
}

// connections lists what is open, with CAP_BPF alone.
func connections(t testing.TB, d *Datapath) (all []flow.Record) {
	t.Helper()
	err := withCaps(func() (err error) { all, err = d.Connections(); return err }, unix.CAP_BPF)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestConnectionsPass: an open connection that is passed is listed, with what is
// known of it; one that is not in scope is not.
func TestConnectionsPass(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	rules := plain
	rules.Default = flow.PathPass
	setRules(t, d, rules)
	p.attach(t, d)
	for _, world := range []netip.Addr{testutil.WorldV4.Addr(), testutil.WorldV6.Addr()} {
		at := netip.AddrPortFrom(world, 7070)
		conns := serve(t, p.World, at)
		outside, err := net.Conn(nil), error(nil)
		p.App.Do(t, func() error { outside, err = net.Dial("tcp", at.String()); return err })
		defer outside.Close()
		(<-conns).Close()
		before := time.Now()
		c, err := p.open(t, at)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		peer := <-conns
		exchange(t, c, peer, 1000, 300)
		// The peer's FIN is no byte.
		peer.(*net.TCPConn).CloseWrite()
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Fatal(err)
		}
		all := connections(t, d)
		if len(all) != 1 {
			t.Fatalf("connections: %+v", all)
		}
		r := all[0]
		if !r.Open || r.Path != flow.PathPass || r.Reason != flow.ReasonDefaultPass || r.Cookie == 0 || r.Cgroup != p.scope.ID {
			t.Errorf("%+v", r)
		}
		if r.OrigDst != at || r.Endpoint != at || r.Source != c.LocalAddr().(*net.TCPAddr).AddrPort() {
			t.Errorf("addresses: %+v", r)
		}
		if r.Sent != 1000 || r.Received != 300 || r.RTT == 0 {
			t.Errorf("sent %d, received %d, round trip %s", r.Sent, r.Received, r.RTT)
		}
		if r.Start.Before(before.Add(-time.Second)) || r.Start.After(time.Now()) || r.Duration <= 0 || r.Connect <= 0 || r.Connect > r.Duration {
			t.Errorf("start %s, duration %s, connect %s", r.Start, r.Duration, r.Connect)
		}
		c.Close()
		peer.Close()

		// Nor is the application's own, once it is acknowledged.
		half, err := p.open(t, at)
		if err != nil {
			t.Fatal(err)
		}
		defer half.Close()
		peer = <-conns
		exchange(t, half, peer, 1000, 300)
		half.(*net.TCPConn).CloseWrite()
		fd := fdOf(t, half)
		testutil.Eventually(t, patience, func() bool {
			info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO)
			return err == nil && info.State == tcpFinWait2
		}, "its FIN is acknowledged")
		if all := connections(t, d); len(all) != 1 || all[0].Sent != 1000 || all[0].Received != 300 {
			t.Errorf("of one that is half closed: %+v", all)
		}
		half.Close()
		peer.Close()
	}
}

// exchange sends bytes both ways, and waits until they have arrived.
func exchange(t testing.TB, a, b net.Conn, there, back int) {
	t.Helper()
	for _, x := range []struct {
		from, to net.Conn
		n        int
	}{{a, b, there}, {b, a, back}} {
		if _, err := x.from.Write(make([]byte, x.n)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(x.to, make([]byte, x.n)); err != nil {
			t.Fatal(err)
		}
	}
}
