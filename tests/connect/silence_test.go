package connect

import (
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// modes are the settings under which a result that nobody knew before must be
// the network's own.
var modes = []string{"mirror", "adaptive"}

// TestSilenceOutlastsDial has the handler give up dials long before the
// application gives up connecting: of that the application sees nothing.
func TestSilenceOutlastsDial(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	without := perform(t, g, silent())
	late := lateAnswers(t, g)
	g.with(t, "connect: mirror\nrelay: {dial_timeout: 400ms, dial_budget: 700ms}")
	compare(t, g, silent(), without)
	alike(t, g, late, func() []transcript { return lateAnswers(t, g) })
}

// TestAnswersLater has a peer begin to answer after some seconds: the connect
// then succeeds, by the same SYN as without Pillion.
func TestAnswersLater(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	without := lateAnswers(t, g)
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			g.with(t, "connect: "+mode)
			alike(t, g, without, func() []transcript { return lateAnswers(t, g) })
			if mode == "mirror" {
				return
			}
			// It has answered, so the next is early, and waits for the echo.
			g.answer(t, false)
			a := g.begin(t, arguments(far4(portDrops), strings.Fields("connect send=hello recv")...)...)
			if r := a.await(t, "send"); a.all[0].Ret != 0 || r.Ret != 5 {
				t.Errorf("to one that answered lately: %s", a.all)
			}
			g.answer(t, true)
			if r := a.await(t, "recv"); r.Note != "hello" {
				t.Errorf("once it answers again: %s", a.all)
			}
		})
	}
}

// lateAnswers has applications connect to a port that drops two SYNs of each,
// and answers then.
func lateAnswers(t *testing.T, g *ground) []transcript {
	t.Helper()
	g.answer(t, false)
	before4, before6 := g.packets(t, "ip", "drops"), g.packets(t, "ip6", "drops")
	var apps []*app
	for _, at := range farEach(portDrops) {
		apps = append(apps, g.begin(t, arguments(at, strings.Fields("connect soerror peer send=hello recv")...)...))
	}
	testutil.Eventually(t, rig.Limit, func() bool {
		return g.packets(t, "ip", "drops")-before4 >= 4 && g.packets(t, "ip6", "drops")-before6 >= 2
	}, "two SYNs of each are dropped")
	g.answer(t, true)
	var all []transcript
	for _, a := range apps {
		tr, err := a.rest()
		if err != nil {
			t.Fatal(err)
		}
		if r := tr.last("recv"); r.Note != "hello" {
			t.Errorf("%s: %s", a.cmd.Args[1], tr)
		}
		all = append(all, tr)
	}
	return all
}

// alike fails the test unless transcripts tell of the same, but for one SYN: the
// application's and the handler's are sent again at the same time.
func alike(t *testing.T, g *ground, without []transcript, perform func() []transcript) {
	t.Helper()
	var with []transcript
	g.calmly(t, func() bool {
		with = perform()
		return slices.EqualFunc(without, with, func(a, b transcript) bool { return a.String() == b.String() })
	})
	for n, want := range without {
		got := with[n]
		if got.String() != want.String() {
			t.Errorf("without %s\n with   %s", want, got)
		}
		if d := got.retrans() - want.retrans(); d < -1 || d > 1 {
			t.Errorf("the SYN is sent %d times, without Pillion %d: %s", 1+got.retrans(), 1+want.retrans(), got)
		}
	}
}

// TestFullQueue connects to a listener whose accept queue is full, and which is
// drained while the application waits.
func TestFullQueue(t *testing.T) {
	g := newGround(t)
	port := uint16(9001)
	next := func() []transcript {
		port++
		return drained(t, g, port)
	}
	without := next()
	g.with(t, "connect: mirror")
	alike(t, g, without, next)
}

// drained has applications of each family wait for room in an accept queue.
func drained(t *testing.T, g *ground, port uint16) []transcript {
	t.Helper()
	var all []transcript
	for _, at := range []netip.AddrPort{far4(port), far6(port)} {
		ln := fullListener(t, g, at)
		before := overflows(t, g)
		a := g.begin(t, arguments(at, strings.Fields("nonblock connect connect poll0 poll soerror connect pollin recv")...)...)
		testutil.Eventually(t, rig.Limit, func() bool { return overflows(t, g) > before }, "a SYN finds the queue full")
		// The first is the one that fills the queue.
		for n := range 2 {
			fd, _, err := unix.Accept(ln)
			for err == unix.EINTR { // the runtime's signals; one with a time-out is not restarted
				fd, _, err = unix.Accept(ln)
			}
			if err != nil {
				t.Fatal(err)
			}
			if n == 1 {
				unix.Write(fd, []byte("welcome"))
			}
			unix.Close(fd)
		}
		tr, err := a.rest()
		if err != nil {
			t.Fatal(err)
		}
		if r := tr.last("recv"); r.Note != "welcome" {
			t.Errorf("%s: %s", at, tr)
		}
		all = append(all, tr)
	}
	return all
}

// fullListener returns a listener in the world that has room for one connection,
// which it has. It is closed at the end of the test.
func fullListener(t *testing.T, g *ground, at netip.AddrPort) int {
	t.Helper()
	var to unix.Sockaddr = &unix.SockaddrInet4{Addr: rig.Far4.As4(), Port: int(at.Port())}
	family := unix.AF_INET
	if at.Addr().Is6() {
		to, family = &unix.SockaddrInet6{Addr: at.Addr().As16(), Port: int(at.Port())}, unix.AF_INET6
	}
	open := func() int {
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	var ln int
	g.World.Do(t, func() error {
		ln = open()
		if err := unix.SetsockoptTimeval(ln, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(rig.Limit.Seconds())}); err != nil {
			return err
		}
		filler := open()
		if err := unix.Bind(ln, to); err != nil {
			return err
		}
		if err := unix.Listen(ln, 0); err != nil {
			return err
		}
		return unix.Connect(filler, to)
	})
	return ln
}

// overflows is how often a SYN in the world found an accept queue full.
func overflows(t *testing.T, g *ground) int {
	t.Helper()
	return netstat(t, g.World, "ListenOverflows")
}

// netstat returns a counter of a namespace's TCP.
func netstat(t *testing.T, ns *testutil.NS, counter string) int {
	t.Helper()
	n := -1
	ns.Do(t, func() error {
		b, err := os.ReadFile("/proc/thread-self/net/netstat")
		if err != nil {
			return err
		}
		lines := strings.Split(string(b), "\n")
		names, values := strings.Fields(lines[0]), strings.Fields(lines[1])
		for i, name := range names {
			if name == counter {
				n, err = strconv.Atoi(values[i])
			}
		}
		return err
	})
	if n < 0 {
		t.Fatalf("no counter %s", counter)
	}
	return n
}
