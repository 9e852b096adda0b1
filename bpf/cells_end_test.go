package bpf

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
)

// closeAll accepts, and ends each connection: with a reset, after a word, where the port is
// that of reset, at once where it is that of gone, or when the application has.
func closeAll(l net.Listener, reset, gone uint16, open *sync.WaitGroup) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		open.Go(func() {
			switch conn.LocalAddr().(*net.TCPAddr).AddrPort().Port() {
			case reset:
				// Not before connect(2) has returned, which would tell of it.
				conn.Read(make([]byte, 1))
				conn.(*net.TCPConn).SetLinger(0)
			case gone:
			default:
				io.Copy(io.Discard, conn)
			}
			conn.Close()
		})
	}
}

// Ports whose peers do not wait for the application.
const portReset, portGone = 8003, 8004

// endings has destinations for each way to end; failures eject nobody.
func (h *hooks) endings(t *testing.T) {
	t.Helper()
	h.services(t)
	h.network(t)
	patient := healthy
	patient.Failures = 0
	for i, to := range []string{fmt.Sprint("127.0.0.1:", portReset), fmt.Sprint("127.0.0.1:", portGone), "127.0.0.1:1", "192.0.2.66:80", "192.0.2.77:80"} {
		id := uint32(10 + i)
		h.service(t, fmt.Sprintf("10.96.1.%d:80", i), Service{Id: id, Path: uint8(PathDirect)})
		h.publish(t, id, patient, 0, 10*id, []endpointOf{{to, 1}}, []uint32{0})
	}
	var open sync.WaitGroup
	all := []net.Listener{h.listeners[0], h.listeners[1]}
	h.ns.Do(t, func() error {
		for _, port := range []int{portReset, portGone} {
			config := net.ListenConfig{}
			config.SetMultipathTCP(false)
			l, err := config.Listen(t.Context(), "tcp", fmt.Sprint("127.0.0.1:", port))
			if err != nil {
				return err
			}
			all = append(all, l)
		}
		return nil
	})
	for _, l := range all {
		open.Go(func() { closeAll(l, portReset, portGone, &open) })
	}
	t.Cleanup(func() {
		for _, l := range all {
			l.Close()
		}
		open.Wait()
	})
}

// TestEndings: whatever the path of a connection and its end, its cell is given back,
// its row of sent too, and all is counted.
func TestEndings(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.endings(t)
	const relayed4, relayed6 = "198.51.100.7:26", "[2001:db8:beef::1]:443"
	var round []string
	for _, to := range []string{at4, at6, asked4, asked6, mapped4, relayed4, relayed6, "[::ffff:198.51.100.7]:26"} {
		family := "4"
		if strings.HasPrefix(to, "[") {
			family = "6"
		}
		round = append(round,
			"new="+family, "again="+to, "drop", "new="+family, "again="+to, "write", "reset",
			"new="+family, "again="+to, "leave", "drop", "new="+family, "again="+to, "shut", "leave", "again="+to, "reset",
			"new=mptcp"+family, "again="+to, "peer", "drop")
	}
	for _, port := range []int{portReset, portGone} {
		for _, to := range []string{fmt.Sprintf("10.96.1.%d:80", port-portReset), fmt.Sprint("127.0.0.1:", port), fmt.Sprint("198.51.100.7:", port)} {
			round = append(round, "new=4", "again="+to)
			if port == portReset {
				round = append(round, "write")
			}
			round = append(round, "gone", "drop", "new=4", "again="+to, "shut", "gone", "again="+asked4, "drop")
		}
	}
	for _, to := range []string{"127.0.0.1:1", "10.96.1.2:80", "198.51.100.7:25", "203.0.113.9:80", "240.5.0.9:80"} { // refused, by whomever
		round = append(round, "new=4", "again="+to, "again="+to, "drop", "new=4", "again="+to, "again="+asked4, "again="+to, "drop")
	}
	// The second one has no source port. Who is bound to what is not ours is left alone.
	h.put(t, "own_addrs", FromAddr(netip.MustParseAddr("127.0.0.1")), uint32(1))
	for i, to := range []string{at4, asked4} {
		from := fmt.Sprint("from=127.0.0.1:", 4001+i)
		round = append(round, "new=4", "reuse", from, "again="+to, "new=4", "reuse", from, "again="+to, "drop", "reset")
	}
	for _, to := range []string{at4, asked4, relayed4} {
		round = append(round, "new=4", "defer="+to, "drop", "new=4", "defer="+to, "write", "drop", "new=4", "defer="+to, "leave", "again="+to, "reset")
	}
	round = append(round, "quit=10.96.1.3:80", "quit=192.0.2.66:80")
	connects := strings.Count(strings.Join(round, " "), "again=") + strings.Count(strings.Join(round, " "), "defer=") + 2
	least := uint64(2000)
	if os.Getenv(envCrowd) != "" {
		least = 300
	}
	times := int(least)*6/5/connects + 1 // some have an end of their own before

	silent := h.steps(t, "brief=10.96.1.3:80", "tcp=10.96.1.4:80", "close") // each waits
	if diff := cmp.Diff([]string{"brief=10.96.1.3:80 ETIMEDOUT", "tcp=10.96.1.4:80 EHOSTUNREACH", "close"}, silent); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	a := h.start(t, append([]string{"times=" + strconv.Itoa(times)}, round...)...)
	said, err := io.ReadAll(a.out)
	if err := a.cmd.Wait(); err != nil {
		t.Fatalf("the application: %v %s", err, a.log)
	}
	ends, asked := map[string]int{}, ""
	for _, line := range strings.Split(strings.TrimSpace(string(said)), "\n") {
		if _, end, ok := strings.Cut(line, " E"); ok {
			ends["E"+end]++
		}
		if peer, ok := strings.CutPrefix(line, "peer "); ok && peer != asked {
			t.Errorf("the peer is %s, asked for was %s", peer, asked)
		}
		if to, ok := strings.CutPrefix(line, "again="); ok {
			asked, _, _ = strings.Cut(to, " ")
		}
	}
	t.Logf("%d times %d connects: %v %v", times, connects, ends, err)
	for errno, n := range map[string]int{"EADDRNOTAVAIL": 2, "ENETUNREACH": 3, "EINPROGRESS": 2, "ECONNRESET": 6} {
		if ends[errno] < n*times {
			t.Errorf("%s is seen %d times, want %d", errno, ends[errno], n*times)
		}
	}
	// Who is killed.
	open := []string{"pinned"}
	for range 20 {
		open = append(open, "tcp="+at4, "tcp="+asked4, "mptcp="+asked6, "tcp="+relayed4, "new=4", "defer="+asked4, "new=4", "again=203.0.113.9:80")
	}
	a = h.start(t, append(open, "wait")...)
	a.said(t, len(open))
	// One whose cookie was made while another was being made has none.
	if n := len(h.cells.owned()); n < 118 && os.Getenv(envCrowd) == "" {
		t.Errorf("%d cells of 120 sockets", n)
	}
	if err := a.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	a.cmd.Wait()
	h.waitClosed(t)
	h.allFree(t)
	n := h.balanced(t)
	if n[TallyDecided]+n[TallyDenied] < least || n[TallySentPass] == 0 || n[TallySentRelay] == 0 || n[TallySentDirect] == 0 || n[TallyUnsent] == 0 {
		t.Errorf("tallies: %v", n)
	}
	for _, id := range []uint32{10, 20, 100, 110, 120, 130, 140} {
		h.idle(t, id)
	}
	kinds := map[string]uint64{}
	h.records(t, int(n[TallyConnects]+n[TallyDenied]), func(raw []byte) string {
		e, _ := ParseEvent(raw)
		if e.Kind == EventDenied {
			kinds["denied"]++
		} else {
			kinds[flow.Path(e.Path).String()]++
		}
		return ""
	})
	if diff := cmp.Diff(map[string]uint64{
		"denied": n[TallyDenied], "pass": n[TallySentPass], "direct": n[TallySentDirect], "relay": n[TallySentRelay],
	}, kinds); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
}

// TestNameAfterTheEnd: a socket whose peer has ended the connection still has the
// address of its own that the application was shown.
func TestNameAfterTheEnd(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.endings(t)
	const source4, source6 = "192.0.2.50", "2001:db8:1::50"
	for to, source := range map[string]string{"198.51.100.0": source4, "2001:db8:7::": source6} {
		a := netip.MustParseAddr(to)
		k := PrefixKey{Prefixlen: 96 + 24, Addr: abiIpAddr(FromAddr(a))}
		if a.Is6() {
			k.Prefixlen = 48
		}
		h.put(t, "routes", k, Route{Kind: RouteUnicast, Source: abiIpAddr(FromAddr(netip.MustParseAddr(source)))})
	}
	for _, tt := range []struct{ family, addr, source string }{
		{"4", "198.51.100.7", source4}, {"6", "[2001:db8:7::7]", source6}, {"6", "[::ffff:198.51.100.7]", "::ffff:" + source4},
	} {
		for name, way := range map[string]struct {
			port int
			ends []string
		}{
			"reset": {portReset, []string{"write ok", "gone ECONNRESET"}}, "closed": {portGone, []string{"shut ok", "gone ok"}},
		} {
			t.Run(name+" "+tt.addr, func(t *testing.T) {
				to := fmt.Sprint(tt.addr, ":", way.port)
				steps := []string{"new=" + tt.family, "again=" + to}
				want := []string{}
				for _, w := range way.ends {
					step, _, _ := strings.Cut(w, " ")
					steps, want = append(steps, step), append(want, w)
				}
				a := h.start(t, append(steps, "wait", "name", "leave", "name", "again="+at4, "name", "drop")...)
				said := a.said(t, len(steps))
				if diff := cmp.Diff(want, said[2:]); diff != "" {
					t.Errorf("the end (-want +got):\n%s", diff)
				}
				h.waitClosed(t) // it has come to CLOSE
				testutil.Eventually(t, 10*time.Second, func() bool { return len(h.cells.owned()) == 0 }, "its cell is given back")
				if v, ok := h.storedWith(t, a, said[0]); !ok || v.Followed != 0 || v.Pending != 0 {
					t.Errorf("in storage: %v %+v", ok, v)
				}
				a.write("\n")
				none := "0.0.0.0"
				if tt.family == "6" {
					none = "::"
				}
				if diff := cmp.Diff([]string{"wait", "name " + tt.source, "leave no peer", "name " + none}, a.said(t, 4)); diff != "" {
					t.Errorf("names (-want +got):\n%s", diff)
				}
				a.cmd.Wait()
			})
		}
	}
	h.allFree(t)
	h.balanced(t)
}
