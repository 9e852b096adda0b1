package bpf

import (
	"fmt"
	"net/netip"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
)

// takeMore takes these steps:
//
//	new=4 new=6 new=mptcp4 new=mptcp6
//	                             makes a socket, and says its descriptor
//	cookie                       says the cookie of the last socket
//	pinned                       stays on one processor: see testutil.Pin
//	same=N                       makes one whose cell is number N
//	from=AT                      binds the last socket there, with its port
//	reuse                        lets others bind where the last socket is
//	defer=ADDR                   connects with the first byte written
//	write                        writes a byte
//	name                         names the last socket itself
//	shut                         ends the last socket's own direction
//	gone                         waits for the peer's end
//	reset drop                   closes the last socket, with a reset or without
func (s *stepper) takeMore(what, where string) (said string, ok bool) {
	var a *asker
	if n := len(s.open); n > 0 {
		a = s.open[n-1]
	}
	switch what {
	case "new":
		family, protocol := unix.AF_INET, unix.IPPROTO_TCP
		if strings.HasSuffix(where, "6") {
			family = unix.AF_INET6
		}
		if strings.HasPrefix(where, "mptcp") {
			protocol = unix.IPPROTO_MPTCP
		}
		a = newAsker(family, protocol)
		s.open = append(s.open, a)
		return strconv.Itoa(a.fd), true
	case "cookie":
		cookie, err := unix.GetsockoptUint64(a.fd, unix.SOL_SOCKET, unix.SO_COOKIE)
		if err != nil {
			return err.Error(), true
		}
		return strconv.FormatUint(cookie, 10), true
	case "pinned":
		runtime.LockOSThread()
		return inWords(testutil.Pin()), true
	case "same":
		n, err := strconv.ParseUint(where, 10, 64)
		if err != nil {
			return err.Error(), true
		}
		// All sockets get their cookies out of the same hat.
		for range 8 * Cells {
			fd, _ := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			cookie, _ := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
			unix.Close(fd)
			if (cookie+1)%Cells != n {
				continue
			}
			a = newAsker(unix.AF_INET, 0)
			cookie, _ = unix.GetsockoptUint64(a.fd, unix.SOL_SOCKET, unix.SO_COOKIE)
			if cookie%Cells == n {
				s.open = append(s.open, a)
				return strconv.Itoa(a.fd), true
			}
			unix.Close(a.fd)
		}
		return "-1", true
	case "from":
		return inWords(unix.Bind(a.fd, a.sockaddr(netip.MustParseAddrPort(where)))), true
	case "reuse":
		return inWords(unix.SetsockoptInt(a.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)), true
	case "defer":
		unix.SetsockoptInt(a.fd, unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT, 1)
		return inWords(unix.Connect(a.fd, a.sockaddr(netip.MustParseAddrPort(where)))), true
	case "write":
		_, err := unix.Write(a.fd, []byte{1})
		return inWords(err), true
	case "shut":
		return inWords(unix.Shutdown(a.fd, unix.SHUT_WR)), true
	case "gone":
		for {
			if n, err := unix.Read(a.fd, make([]byte, 8)); n <= 0 {
				return inWords(err), true
			}
		}
	case "name":
		switch sa, _ := unix.Getsockname(a.fd); sa := sa.(type) {
		case *unix.SockaddrInet4:
			said = netip.AddrFrom4(sa.Addr).String()
		case *unix.SockaddrInet6:
			said = netip.AddrFrom16(sa.Addr).String()
		}
		return said, true
	case "reset", "drop":
		if what == "reset" {
			unix.SetsockoptLinger(a.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		}
		unix.Close(a.fd)
		s.open = s.open[:len(s.open)-1]
		return "", true
	}
	return "", false
}

// inWords is what an error is in words.
func inWords(err error) string {
	if err == nil {
		return "ok"
	}
	return unix.ErrnoName(err.(unix.Errno))
}

// socket lends the socket of an application that said its descriptor. It stays open
// until giveBack is called.
func (a *app) socket(t *testing.T, said string) (fd int, giveBack func()) {
	t.Helper()
	_, word, _ := strings.Cut(said, " ")
	theirs, err := strconv.Atoi(word)
	if err != nil || theirs < 0 {
		t.Fatalf("the application says %q", said)
	}
	process, err := unix.PidfdOpen(a.cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(process)
	if fd, err = unix.PidfdGetfd(process, theirs, 0); err != nil {
		t.Fatal(err)
	}
	giveBack = func() {
		unix.Close(fd)
		fd = -1
	}
	t.Cleanup(func() {
		if fd >= 0 {
			unix.Close(fd)
		}
	})
	return fd, giveBack
}

// cookieOf gives the cookie of a socket that the application said.
func (a *app) cookieOf(t *testing.T, said string) uint64 {
	t.Helper()
	fd, giveBack := a.socket(t, said)
	defer giveBack()
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		t.Fatal(err)
	}
	return cookie
}

// storedWith gives what is in storage of a socket that the application said.
func (h *hooks) storedWith(t *testing.T, a *app, said string) (v Decision, ok bool) {
	t.Helper()
	fd, giveBack := a.socket(t, said)
	defer giveBack()
	return v, h.maps["decisions"].Lookup(uint32(fd), &v) == nil
}

// balanced fails the test where the conservation law does not hold, or somebody has
// escaped.
func (h *hooks) balanced(t *testing.T) map[uint32]uint64 {
	t.Helper()
	n := h.counts(t, "tallies")
	sent := n[TallySentPass] + n[TallySentRelay] + n[TallySentDirect]
	if n[TallyEscaped] != 0 || n[TallyConnects] != sent || n[TallyDecided] != sent+n[TallyUnsent] {
		t.Errorf("not all are accounted for: %v", n)
	}
	return n
}

// endpoints of the tests below: each has a service.
const (
	asked4, asked6 = "10.96.0.12:80", "[2001:db8::12]:443"
	mapped4        = "[::ffff:10.96.0.12]:80"
	at4, at6       = "127.0.0.1:8001", "[::1]:8002"
)

// services has both families of direct, and a destination that is denied.
func (h *hooks) services(t *testing.T) {
	t.Helper()
	h.serve(t)
	h.service(t, asked4, Service{Id: 1, Path: uint8(PathDirect)})
	h.service(t, asked6, Service{Id: 2, Path: uint8(PathDirect)})
	h.publish(t, 1, healthy, 0, 10, []endpointOf{{at4, 1}}, []uint32{0})
	h.publish(t, 2, healthy, 0, 20, []endpointOf{{at6, 1}}, []uint32{0})
	h.listenAt(t, at4)
	h.listenAt(t, at6)
	h.put(t, "deny", rule(t, "198.51.100.0/24", 25), uint32(1))
	h.put(t, "exclude", rule(t, "203.0.113.0/24", 0), uint32(1))
	// A deferred connect needs no cookie to send data with its SYN.
	h.ns.Sysctl(t, "net/ipv4/tcp_fastopen", "5")
}

// TestCellOfAConnection: who connects has the cell of its cookie, with all that is
// decided, and nothing elsewhere; and the record is of that socket.
func TestCellOfAConnection(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.services(t)
	for _, tt := range []struct {
		family, to string
		path       flow.Path
	}{
		{"4", at4, flow.PathPass},
		{"6", at6, flow.PathPass},
		{"4", asked4, flow.PathDirect},
		{"6", asked6, flow.PathDirect},
		{"6", mapped4, flow.PathDirect},
		{"4", "198.51.100.7:26", flow.PathRelay},
		{"6", "[2001:db8:beef::1]:443", flow.PathRelay},
		{"6", "[::ffff:198.51.100.7]:26", flow.PathRelay},
	} {
		a := h.start(t, "new="+tt.family, "again="+tt.to, "wait", "close")
		said := a.said(t, 2)
		if want := "again=" + tt.to + " " + tt.to; said[1] != want {
			t.Errorf("the application says %q, want %q", said[1], want)
		}
		to := netip.MustParseAddrPort(tt.to)
		to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
		cookie := a.cookieOf(t, said[0])
		if v, ok := h.storedWith(t, a, said[0]); ok {
			t.Errorf("%s: it has storage too: %+v", tt.to, v)
		}
		d := h.cells.only(t)
		if d != &h.cells.all[cookie%Cells] || d.Owner != cookie {
			t.Errorf("%s: the cell is not that of cookie %d: %+v", tt.to, cookie, d)
		}
		if flow.Path(d.Path) != tt.path || netip.AddrPortFrom(ToAddr(d.Orig), d.OrigPort) != to || d.Pending != 0 || d.Followed != 1 ||
			d.Established < d.Opened || d.Opened == 0 || d.Cgroup != h.cgroup.ID {
			t.Errorf("%s: %+v", tt.to, d)
		}
		if tt.path != flow.PathDirect {
			if rows := h.sent.owned(); len(rows) != 0 {
				t.Errorf("%s: rows %v", tt.to, rows)
			}
		} else if s := h.sent.only(t); s.Owner != cookie || s.Key != d.Key || netip.AddrPortFrom(ToAddr(IPAddr(s.Asked.Addr)), s.Asked.Port) != to {
			t.Errorf("%s: the row %+v, the cell %+v", tt.to, s, d)
		}
		a.write("\n")
		a.cmd.Wait()
		h.allFree(t)
		if diff := cmp.Diff([]string{fmt.Sprint(cookie, " ", tt.path, " ", to)}, h.records(t, 1, func(raw []byte) string {
			e, _ := ParseEvent(raw)
			return fmt.Sprint(e.Cookie, " ", flow.Path(e.Path), " ", netip.AddrPortFrom(ToAddr(e.Orig), e.OrigPort))
		})); diff != "" {
			t.Errorf("%s: records (-want +got):\n%s", tt.to, diff)
		}
	}
	h.balanced(t)
}

// state of the cell of a socket, in words: what a test of one step compares.
func (h *hooks) stateOf(cookie uint64) string {
	d := &h.cells.all[cookie%Cells]
	switch owner := atomic.LoadUint64(&d.Owner); {
	case owner == cookie|CellLeft:
		return "left"
	case owner != cookie:
		return "none"
	case d.Pending == 1 && d.Followed == 0:
		return "pending"
	case d.Pending == 0 && d.Followed == 1:
		return "open"
	}
	return fmt.Sprintf("%+v", *d)
}

// awaitState waits for it: what a peer has a part in ends a moment later.
func (h *hooks) awaitState(t *testing.T, cookie uint64, want string) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); h.stateOf(cookie) != want; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("its cell is %s, want %s", h.stateOf(cookie), want)
		}
	}
}

// TestCellByStep: when a socket has a cell, and when it has given that back, step by
// step; a later connect of the same socket finds nothing of an earlier one.
func TestCellByStep(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.services(t)
	h.network(t)
	const denied, nowhere, refused, relayed, silent = "198.51.100.7:25", "203.0.113.9:80", "127.0.0.1:1", "198.51.100.7:26", "10.96.0.14:80"
	h.service(t, silent, Service{Id: 3, Path: uint8(PathDirect)})
	h.publish(t, 3, healthy, 0, 30, []endpointOf{{"192.0.2.77:80", 1}}, []uint32{0})
	type step struct{ does, says, state string }
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"denied", []step{{"again=" + denied, "ECONNREFUSED", "none"}, {"again=" + at4, at4, "open"}, {"leave", "no peer", "none"}, {"again=" + denied, "ECONNREFUSED", "none"}}},
		{"refused", []step{{"again=" + refused, "ECONNREFUSED", "none"}, {"again=" + refused, "ECONNREFUSED", "none"}, {"again=" + asked4, asked4, "open"}, {"drop", "", "none"}}},
		{"by the kernel itself", []step{
			{"again=" + nowhere, "ENETUNREACH", "pending"}, {"again=" + nowhere, "ENETUNREACH", "pending"},
			{"again=" + refused, "ECONNREFUSED", "none"}, {"again=" + nowhere, "ENETUNREACH", "pending"}, {"drop", "", "none"},
		}},
		{"by the kernel, then denied", []step{{"again=" + nowhere, "ENETUNREACH", "pending"}, {"again=" + denied, "ECONNREFUSED", "pending"}, {"drop", "", "none"}}},
		{"disconnected", []step{
			{"again=" + asked4, asked4, "open"}, {"leave", "no peer", "none"}, {"again=" + relayed, relayed, "open"}, {"leave", "no peer", "none"},
			{"again=" + at4, at4, "open"}, {"reset", "", "none"},
		}},
		{"timed out", []step{{"again=" + silent, "EHOSTUNREACH", "none"}, {"again=" + asked4, asked4, "open"}, {"drop", "", "none"}}},
		{"deferred", []step{{"defer=" + at4, "ok", "pending"}, {"name", "127.0.0.1", "pending"}, {"write", "ok", "open"}, {"drop", "", "none"}}},
		{"deferred, direct", []step{{"defer=" + asked4, "ok", "pending"}, {"write", "ok", "open"}, {"reset", "", "none"}}},
		{"deferred, relay", []step{{"defer=" + relayed, "ok", "pending"}, {"write", "ok", "open"}, {"leave", "no peer", "none"}}},
		{"deferred, closed", []step{{"defer=" + asked4, "ok", "pending"}, {"drop", "", "none"}}},
		{"deferred after another", []step{
			{"again=" + asked4, asked4, "open"}, {"leave", "no peer", "none"}, {"defer=" + at4, "ok", "pending"}, {"leave", "no peer", "pending"},
			{"drop", "", "none"},
		}},
		{"deferred, disconnected", []step{{"defer=" + asked4, "ok", "pending"}, {"leave", "no peer", "pending"}, {"again=" + denied, "ECONNREFUSED", "pending"}, {"drop", "", "none"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			steps := []string{"new=4", "wait"}
			for _, s := range tt.steps {
				steps = append(steps, s.does, "wait")
			}
			a := h.start(t, steps...)
			cookie := a.cookieOf(t, a.said(t, 1)[0])
			for _, s := range tt.steps {
				a.write("\n")
				want := strings.TrimSpace(s.does + " " + s.says)
				if said := a.said(t, 2)[1]; said != want {
					t.Fatalf("the application says %q, want %q", said, want)
				}
				h.awaitState(t, cookie, s.state)
			}
			a.write("\n")
			a.cmd.Wait()
			h.allFree(t)
			h.balanced(t)
		})
	}
}

// TestCellNeverOurs: a socket of another namespace, and one of the handler's, has its
// decision in storage.
func TestCellNeverOurs(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.services(t)
	for _, tt := range []struct {
		name     string
		tagged   bool
		to, said string
		reason   string
	}{
		{"tagged", true, asked4, "ENETUNREACH", "self"},
		{"tagged, to what is there", true, at4, at4, "loopback"},
		{"another namespace", false, asked4, "ENETUNREACH", "netns"},
		{"another namespace, to what is there", false, "127.0.0.1:1", "ECONNREFUSED", "netns"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ours := h.ns
			if !tt.tagged {
				h.ns = testutil.NewNS(t)
			}
			a := h.start(t, "new=4", "wait", "again="+tt.to, "wait")
			h.ns = ours
			said := a.said(t, 1)[0]
			before := h.reasons(t)[tt.reason]
			if tt.tagged {
				fd, giveBack := a.socket(t, said)
				if err := h.maps["decisions"].Put(uint32(fd), Decision{Own: 1}); err != nil {
					t.Fatal(err)
				}
				giveBack()
			}
			cookie := a.cookieOf(t, said)
			a.write("\n")
			if got := a.said(t, 2)[1]; got != "again="+tt.to+" "+tt.said {
				t.Errorf("the application says %q", got)
			}
			if owned := h.cells.owned(); len(owned) != 0 {
				t.Errorf("cells: %v (cookie %d)", owned, cookie)
			}
			v, ok := h.storedWith(t, a, said)
			if orig := netip.AddrPortFrom(ToAddr(v.Orig), v.OrigPort).String(); !ok || orig != tt.to || flow.Path(v.Path) != flow.PathPass || (v.Own == 1) != tt.tagged {
				t.Errorf("in storage: %v %+v", ok, v)
			}
			if n := h.reasons(t)[tt.reason]; n != before+1 {
				t.Errorf("%s is counted %d times", tt.reason, n-before)
			}
			a.write("\n")
			a.cmd.Wait()
			h.balanced(t)
		})
	}
}

// TestCellOfAnother: of two sockets whose cookies name the same cell the second has
// storage, and neither sees the other; when the first has gone the next one has it.
func TestCellOfAnother(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.services(t)
	first := h.start(t, "new=4", "again="+asked4, "wait", "peer", "close", "wait")
	said := first.said(t, 2)[0]
	cookie := first.cookieOf(t, said)
	n := strconv.FormatUint(cookie%Cells, 10)
	before := *h.cells.only(t)
	second := h.start(t, "same="+n, "again="+at4, "leave", "again="+asked4, "wait", "peer", "leave", "again="+at4, "peer", "wait")
	heard := second.said(t, 4)
	if diff := cmp.Diff([]string{"again=" + at4 + " " + at4, "leave no peer", "again=" + asked4 + " " + asked4}, heard[1:]); diff != "" {
		t.Errorf("the second one (-want +got):\n%s", diff)
	}
	if other := second.cookieOf(t, heard[0]); other%Cells != cookie%Cells || other == cookie {
		t.Fatalf("cookies %d and %d", cookie, other)
	}
	if v, ok := h.storedWith(t, second, heard[0]); !ok || v.Followed != 1 || flow.Path(v.Path) != flow.PathDirect {
		t.Errorf("the second has in storage: %v %+v", ok, v)
	}
	if e := h.endpoint(t, 10); e.Live != 2 {
		t.Errorf("%d are counted at the endpoint, want 2", e.Live)
	}
	if diff := cmp.Diff(before, *h.cells.only(t)); diff != "" {
		t.Errorf("the first one's cell has changed (-was +is):\n%s", diff)
	}
	first.write("\n")
	if diff := cmp.Diff([]string{"wait", "peer " + asked4, "close"}, first.said(t, 3)); diff != "" {
		t.Errorf("the first one (-want +got):\n%s", diff)
	}
	h.allFree(t)
	second.write("\n")
	if diff := cmp.Diff([]string{"wait", "peer " + asked4, "leave no peer", "again=" + at4 + " " + at4, "peer " + at4}, second.said(t, 5)); diff != "" {
		t.Errorf("the second one (-want +got):\n%s", diff)
	}
	third := h.start(t, "same="+n, "again="+asked4, "wait")
	if c := third.cookieOf(t, third.said(t, 2)[0]); h.stateOf(c) != "open" {
		t.Errorf("the third one's cell is %s", h.stateOf(c))
	}
	for _, a := range []*app{first, second, third} {
		a.stdin.Close()
		a.cmd.Wait()
	}
	h.same(t, map[uint32]Endpoint{10: {Connects: 3}})
	h.balanced(t)
}
