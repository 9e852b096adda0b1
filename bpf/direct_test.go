package bpf

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
)

// endpointOf is one member of a set. Its alias table is that of equal weights.
type endpointOf struct {
	addr   string
	weight uint16
}

// asRow lets a row of a set be written as what it is.
func asRow[T any](v T) SetRow {
	if unsafe.Sizeof(v) != unsafe.Sizeof(SetRow{}) {
		panic("not the size of a row")
	}
	return *(*SetRow)(unsafe.Pointer(&v))
}

// publish puts a set in place of the service's last one.
func (h *hooks) publish(t *testing.T, id uint32, config SetConfig, local int, firstID uint32, members []endpointOf, tables ...[]uint32) *ebpf.Map {
	t.Helper()
	if local == 0 {
		local = len(members)
	}
	var rows []SetRow
	for i, m := range members {
		at := netip.MustParseAddrPort(m.addr)
		index := uint32(i)
		if i >= local {
			index -= uint32(local)
		}
		rows = append(rows, asRow(SetEndpoint{
			Addr: abiIpAddr(FromAddr(at.Addr())), Port: at.Port(), Weight: m.weight,
			Id: firstID + uint32(i), Cut: 1<<32 - 1, Alias: index,
		}))
		h.put(t, "endpoint_names", firstID+uint32(i), EndpointName{
			Addr: abiIpAddr(FromAddr(at.Addr())), Set: id, Port: at.Port(), Weight: m.weight,
		})
	}
	var tiers SetTiers
	tiers.Tier[0].Count = uint32(local)
	tiers.Tier[1].First, tiers.Tier[1].Count = uint32(local), uint32(len(members)-local)
	for i, table := range tables {
		tiers.Tier[i].Table, tiers.Tier[i].Entries = uint32(SetHead+len(rows)), uint32(len(table))
		for len(table) > 0 {
			var row SetTable
			table = table[copy(row.Entry[:], table):]
			rows = append(rows, asRow(row))
		}
	}
	rows = append([]SetRow{asRow(tiers), asRow(config), asRow(SetState{})}, rows...)
	inner, err := ebpf.NewMap(&ebpf.MapSpec{
		Type: ebpf.Array, KeySize: 4, ValueSize: uint32(unsafe.Sizeof(SetRow{})),
		MaxEntries: uint32(len(rows)), Flags: 0x1000, // BPF_F_INNER_MAP
	})
	if err != nil {
		t.Fatalf("create a set: %v", err)
	}
	t.Cleanup(func() { inner.Close() })
	for i, row := range rows {
		if err := inner.Put(uint32(i), row); err != nil {
			t.Fatalf("write a set: %v", err)
		}
	}
	h.put(t, "sets", id, inner)
	return inner
}

func (h *hooks) service(t *testing.T, addr string, s Service) {
	t.Helper()
	at := netip.MustParseAddrPort(addr)
	h.put(t, "services", EndpointKey{Addr: abiIpAddr(FromAddr(at.Addr())), Port: at.Port()}, s)
}

func (h *hooks) endpoint(t *testing.T, id uint32) Endpoint {
	t.Helper()
	var e Endpoint
	if err := h.maps["endpoints"].Lookup(id, &e); err != nil {
		t.Fatalf("endpoint %d: %v", id, err)
	}
	return e
}

// listenAt puts a listener where an endpoint is to be. It ends each connection when
// the application has.
func (h *hooks) listenAt(t *testing.T, addr string) {
	t.Helper()
	var l net.Listener
	h.ns.Do(t, func() error {
		var err error
		config := net.ListenConfig{}
		config.SetMultipathTCP(false)
		l, err = config.Listen(t.Context(), "tcp", addr)
		return err
	})
	var open sync.WaitGroup
	open.Go(func() { acceptAll(l, &open) })
	t.Cleanup(func() {
		l.Close()
		open.Wait()
	})
}

func acceptAll(l net.Listener, open *sync.WaitGroup) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		open.Go(func() {
			io.Copy(io.Discard, conn)
			conn.Close()
		})
	}
}

// ask is a dry run.
func (h *hooks) ask(t *testing.T, question DryRun) DryRun {
	t.Helper()
	size := 14 + unsafe.Sizeof(question)
	in, out := make([]byte, size), make([]byte, size)
	if _, err := binary.Encode(in[14:], binary.NativeEndian, question); err != nil {
		t.Fatal(err)
	}
	h.ns.Do(t, func() error {
		_, err := h.progs[ProgExplain].Run(&ebpf.RunOptions{Data: in, DataOut: out})
		return err
	})
	var answer DryRun
	if _, err := binary.Decode(out[14:], binary.NativeEndian, &answer); err != nil {
		t.Fatal(err)
	}
	return answer
}

// TestDirect sends connections straight to endpoints, in every family.
func TestDirect(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.serve(t)
	for _, s := range []struct {
		id            uint32
		addr, to, bad string
	}{
		{1, "10.96.0.12:80", "127.0.0.1:8001", "127.0.0.1:1"},
		{2, "[2001:db8::12]:80", "[::1]:8002", "[::1]:1"},
	} {
		h.service(t, s.addr, Service{Id: s.id, Path: uint8(PathDirect), NoEndpoint: 113})
		h.publish(t, s.id, SetConfig{Failures: 3, Base: 1000, Max: 2000, Panic: 50}, 0, 10*s.id, []endpointOf{{s.to, 1}})
		h.listenAt(t, s.to)
	}
	h.service(t, "10.96.0.13:80", Service{Id: 3, Path: uint8(PathDirect), NoEndpoint: 113}) // no set
	h.service(t, "10.96.0.14:80", Service{Id: 4, Path: uint8(PathPass)})
	want := []string{
		"10.96.0.12:80 10.96.0.12:80",
		"[2001:db8::12]:80 [2001:db8::12]:80",
		"10.96.0.13:80 EHOSTUNREACH",
		"10.96.0.14:80 ENETUNREACH",
	}
	if diff := cmp.Diff(want, h.dial(t, "10.96.0.12:80", "[2001:db8::12]:80", "10.96.0.13:80", "10.96.0.14:80")); diff != "" {
		t.Errorf("what the application saw (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{
		"denied deny no_endpoint 10.96.0.13:80",
		"end direct service 10.96.0.12:80",
		"end direct service [2001:db8::12]:80",
	}, h.events(t, 3)); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	for _, id := range []uint32{10, 20} {
		if diff := cmp.Diff(Endpoint{Connects: 1}, h.endpoint(t, id)); diff != "" {
			t.Errorf("endpoint %d (-want +got):\n%s", id, diff)
		}
	}
	if diff := cmp.Diff(map[uint32]uint64{
		TallyConnects: 2, TallyDecided: 3, TallyDenied: 1, TallyUnsent: 1, TallySentDirect: 2,
	}, h.tallies(t)); diff != "" {
		t.Errorf("tallies (-want +got):\n%s", diff)
	}
}

// healthy is a configuration whose waits do not end while a test runs.
var healthy = SetConfig{Failures: 2, Base: 1 << 24, Max: 1 << 30, Panic: 0, Policy: PolicyRoundRobin}

// idle waits until nobody is counted at an endpoint, and returns it without what
// differs from run to run.
func (h *hooks) idle(t *testing.T, id uint32) Endpoint {
	t.Helper()
	var e Endpoint
	testutil.Eventually(t, 10*time.Second, func() bool {
		e = h.endpoint(t, id)
		return e.Live == 0
	}, "endpoint %d is idle", id)
	if e.Until != 0 {
		e.Until = 1
	}
	return e
}

func (h *hooks) same(t *testing.T, want map[uint32]Endpoint) {
	t.Helper()
	got := map[uint32]Endpoint{}
	for id := range want {
		got[id] = h.idle(t, id)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("endpoints (-want +got):\n%s", diff)
	}
}

// TestDirectPeers: whatever the socket, its peer is what the application asked for,
// and only while it is connected there.
func TestDirectPeers(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.serve(t)
	const four, six = "10.96.0.12:80", "[2001:db8::12]:443"
	h.service(t, four, Service{Id: 1, Path: uint8(PathDirect)})
	h.service(t, six, Service{Id: 2, Path: uint8(PathDirect)})
	h.publish(t, 1, healthy, 0, 10, []endpointOf{{"127.0.0.1:8001", 1}}, []uint32{0})
	h.publish(t, 2, healthy, 0, 20, []endpointOf{{"[::1]:8002", 1}}, []uint32{0})
	h.listenAt(t, "127.0.0.1:8001")
	h.listenAt(t, "[::1]:8002")
	a := h.start(t, "tcp="+four, "tcp="+six, "mapped=[::ffff:10.96.0.12]:80", "mptcp="+four, "mptcp="+six,
		"tcp=127.0.0.1:8001", "leave", "again="+four, "tcp="+four, "leave", "again=127.0.0.1:8001", "wait")
	want := []string{
		"tcp=" + four + " " + four, "tcp=" + six + " " + six,
		"mapped=[::ffff:10.96.0.12]:80 [::ffff:10.96.0.12]:80",
		"mptcp=" + four + " " + four, "mptcp=" + six + " " + six,
		"tcp=127.0.0.1:8001 127.0.0.1:8001", "leave no peer", "again=" + four + " " + four,
		"tcp=" + four + " " + four, "leave no peer", "again=127.0.0.1:8001 127.0.0.1:8001",
	}
	if diff := cmp.Diff(want, a.said(t, len(want))); diff != "" {
		t.Errorf("peers (-want +got):\n%s", diff)
	}
	for id, live := range map[uint32]uint32{10: 4, 20: 2} {
		if e := h.endpoint(t, id); e.Live != live {
			t.Errorf("endpoint %d has %d connections, want %d", id, e.Live, live)
		}
	}
	a.write("\n")
	h.same(t, map[uint32]Endpoint{10: {Connects: 5}, 20: {Connects: 2}})
	if tallies := h.counts(t, "tallies"); tallies[TallySentDirect] != 7 || tallies[TallyConnects] != 9 || tallies[TallyEscaped] != 0 {
		t.Errorf("tallies: %v", tallies)
	}
}

// TestDirectOutlived: an MPTCP socket whose first subflow has ended, and that goes
// on by another, still has the peer that it asked for.
func TestDirectOutlived(t *testing.T) {
	testutil.CheckLeaks(t)
	testutil.Need(t, "ip", "ss")
	for _, tt := range []struct{ asked, endpoint, second string }{
		{"10.96.0.12:80", "127.0.0.1:8001", "127.0.0.2"},
		{"[2001:db8::12]:443", "[2001:db8::1]:8002", "2001:db8::2"},
	} {
		t.Run(tt.asked, func(t *testing.T) {
			h := newHooks(t)
			h.serve(t)
			endpoint := netip.MustParseAddrPort(tt.endpoint)
			h.service(t, tt.asked, Service{Id: 1, Path: uint8(PathDirect)})
			h.publish(t, 1, healthy, 0, 10, []endpointOf{{tt.endpoint, 1}}, []uint32{0})
			if endpoint.Addr().Is6() {
				h.command(t, "ip", "addr", "add", endpoint.Addr().String()+"/128", "dev", "lo", "nodad")
				h.command(t, "ip", "addr", "add", tt.second+"/128", "dev", "lo", "nodad")
				// The kernel adds their routes a moment later.
				testutil.Eventually(t, 10*time.Second, func() bool {
					routes := h.command(t, "ip", "-6", "route", "show", "table", "local")
					return strings.Contains(routes, "local "+endpoint.Addr().String()+" ") && strings.Contains(routes, "local "+tt.second+" ")
				}, "the addresses are local")
			}
			h.command(t, "ip", "mptcp", "endpoint", "add", tt.second, "dev", "lo", "subflow")
			var l net.Listener
			h.ns.Do(t, func() (err error) {
				config := net.ListenConfig{}
				config.SetMultipathTCP(true)
				l, err = config.Listen(t.Context(), "tcp", tt.endpoint)
				return err
			})
			defer l.Close()
			a := h.start(t, "mptcp="+tt.asked, "wait", "peer")
			conn, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			// A path is added when the connection has been used.
			if _, err := conn.Write([]byte{1}); err != nil {
				t.Fatal(err)
			}
			subflows := func(filter ...string) int {
				return strings.Count(h.command(t, "ss", append([]string{"-Htn", "dport", "=", fmt.Sprint(endpoint.Port())}, filter...)...), "ESTAB")
			}
			testutil.Eventually(t, 10*time.Second, func() bool { return subflows() == 2 }, "there are two subflows")
			_, port, _ := net.SplitHostPort(conn.RemoteAddr().String())
			first := []string{"and", "sport", "=", port}
			h.command(t, "ss", append([]string{"-Htn", "--kill", "dport", "=", fmt.Sprint(endpoint.Port())}, first...)...)
			testutil.Eventually(t, 10*time.Second, func() bool { return subflows(first...) == 0 }, "the first has ended")
			if n := subflows(); n != 1 {
				t.Errorf("%d subflows are left", n)
			}
			a.write("\n")
			want := []string{"mptcp=" + tt.asked + " " + tt.asked, "wait", "peer " + tt.asked}
			if diff := cmp.Diff(want, a.said(t, len(want))); diff != "" {
				t.Errorf("peers (-want +got):\n%s", diff)
			}
		})
	}
}

// command runs a command in the application's namespace, and returns what it wrote.
func (h *hooks) command(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := h.ns.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, &out)
	}
	return out.String()
}

// dialed is the path of a record, what was asked for, and what was dialed.
func dialed(raw []byte) string {
	e, _ := ParseEvent(raw)
	orig, to := netip.AddrPortFrom(ToAddr(e.Orig), e.OrigPort), netip.AddrPortFrom(ToAddr(e.Endpoint), e.EndpointPort)
	return flow.Path(e.Path).String() + " " + orig.String() + " to " + to.String()
}

// TestDirectEvents: a record says what was asked for, what was dialed, and how long
// the answer took.
func TestDirectEvents(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.serve(t)
	h.service(t, "10.96.0.12:80", Service{Id: 1, Path: uint8(PathDirect)})
	h.publish(t, 1, healthy, 0, 10, []endpointOf{{"127.0.0.1:8001", 1}, {"127.0.0.1:1", 1}}, []uint32{0, 1})
	h.listenAt(t, "127.0.0.1:8001")
	h.steps(t, "tcp=10.96.0.12:80", "tcp=10.96.0.12:80", "tcp=127.0.0.1:8001", "tcp=127.0.0.1:2")
	endings := []string{"closed", "reset", "refused", "timeout", "unreachable", "abandoned"}
	want := []string{
		"direct 10.96.0.12:80 to 127.0.0.1:1: refused, answered false",
		"direct 10.96.0.12:80 to 127.0.0.1:8001: closed, answered true",
		"pass 127.0.0.1:2 to 127.0.0.1:2: refused, answered false",
		"pass 127.0.0.1:8001 to 127.0.0.1:8001: closed, answered true",
	}
	got := h.records(t, len(want), func(raw []byte) string {
		e, _ := ParseEvent(raw)
		if e.Connect > e.Ended-e.Opened {
			t.Errorf("answered after %d of %d ns", e.Connect, e.Ended-e.Opened)
		}
		return dialed(raw) + ": " + endings[e.Ending] + ", answered " + strconv.FormatBool(e.Connect > 0)
	})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}

// TestEjection: an endpoint that refuses is avoided by the next connect, whatever
// the policy, and a trial brings it back.
func TestEjection(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.serve(t)
	const asked = "10.96.0.12:80"
	h.service(t, asked, Service{Id: 1, Path: uint8(PathDirect), NoEndpoint: 113})
	members := []endpointOf{{"127.0.0.1:8001", 1}, {"127.0.0.1:8003", 1}}
	h.publish(t, 1, healthy, 0, 10, members, []uint32{0, 1})
	h.listenAt(t, "127.0.0.1:8001")
	connect := func(n int, want string) {
		t.Helper()
		var steps, all []string
		for i := range n {
			steps = append(steps, "tcp="+asked)
			end := asked
			if want[i%len(want)] == 'x' {
				end = "ECONNREFUSED"
			}
			all = append(all, "tcp="+asked+" "+end)
		}
		if diff := cmp.Diff(all, h.steps(t, steps...)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	connect(4, ".x.x")
	h.same(t, map[uint32]Endpoint{10: {Connects: 2}, 11: {Failed: 2, Ejections: 1, Round: 1, Until: 1, Last: EndingRefused}})
	connect(6, ".")
	for _, policy := range []uint8{PolicyLeastConnections, PolicyRandom, PolicyMaglev} {
		config := healthy
		config.Policy = policy
		h.publish(t, 1, config, 0, 10, members, []uint32{1, 1, 1, 1, 1, 1, 1, 1, 1})
		connect(6, ".")
	}
	// Its wait is over: one connect is the trial, and begins the next wait.
	h.publish(t, 1, healthy, 0, 10, members, []uint32{1})
	e := h.endpoint(t, 11)
	e.Until = 1
	h.put(t, "endpoints", uint32(11), e)
	connect(3, "x..")
	h.same(t, map[uint32]Endpoint{10: {Connects: 28}, 11: {Failed: 3, Ejections: 1, Round: 2, Until: 1, Last: EndingRefused}})
	if e := h.endpoint(t, 11); e.Until < uint64(1<<25)*uint64(time.Millisecond)*3/4 {
		t.Errorf("the second wait is no longer than the first: until %d", e.Until)
	}
	// In a panic its ejection does not count, and an answer ends it.
	config := healthy
	config.Panic = 60
	h.publish(t, 1, config, 0, 10, members, []uint32{1})
	h.listenAt(t, "127.0.0.1:8003")
	connect(1, ".")
	h.same(t, map[uint32]Endpoint{11: {Connects: 1, Failed: 3, Ejections: 1, Round: 2, Last: EndingRefused}})
	// Down is down, also in a panic.
	e = h.endpoint(t, 11)
	e.Down = 1
	h.put(t, "endpoints", uint32(11), e)
	connect(3, ".")
	e = h.endpoint(t, 10)
	e.Down = 1
	h.put(t, "endpoints", uint32(10), e)
	if got := h.steps(t, "tcp="+asked); got[0] != "tcp="+asked+" EHOSTUNREACH" {
		t.Errorf("all are down: %v", got)
	}
}

// network gives the namespace a subnet in which nobody answers: 192.0.2.66 is
// silent, and nobody has 192.0.2.77.
func (h *hooks) network(t *testing.T) {
	t.Helper()
	h.ns.Do(t, func() error {
		pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "near"}, PeerName: "far"}
		if err := netlink.LinkAdd(pair); err != nil {
			return err
		}
		for _, name := range []string{"near", "far"} {
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(l); err != nil {
				return err
			}
		}
		near, err := netlink.LinkByName("near")
		if err != nil {
			return err
		}
		addr, err := netlink.ParseAddr("192.0.2.1/24")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(near, addr); err != nil {
			return err
		}
		return netlink.NeighAdd(&netlink.Neigh{
			LinkIndex: near.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.ParseIP("192.0.2.66"),
			HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 66},
		})
	})
	h.ns.Sysctl(t, "net/ipv4/neigh/near/mcast_solicit", "1")
	h.ns.Sysctl(t, "net/ipv4/neigh/near/retrans_time_ms", "50")
}

// TestFailedConnects: who is to blame for a connect that was not answered.
func TestFailedConnects(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.serve(t)
	h.network(t)
	const asked = "10.96.0.12:80"
	h.service(t, asked, Service{Id: 1, Path: uint8(PathDirect)})
	h.put(t, "routes", PrefixKey{Prefixlen: 96 + 24, Addr: abiIpAddr(FromAddr(netip.MustParseAddr("203.0.113.0")))}, Route{Kind: RouteNone})
	config := healthy
	config.Failures = 0
	for i, tt := range []struct {
		name, endpoint, step, said string
		want                       Endpoint
	}{
		{"refused", "127.0.0.1:1", "tcp", "ECONNREFUSED", Endpoint{Failed: 1, Last: EndingRefused}},
		{"refused again on one socket", "127.0.0.1:1", "tcp=" + asked + " again", "ECONNREFUSED", Endpoint{Failed: 2, Last: EndingRefused}},
		{"timed out", "192.0.2.66:80", "brief", "ETIMEDOUT", Endpoint{Failed: 1, Last: EndingTimeout}},
		{"unreachable", "192.0.2.77:80", "tcp", "EHOSTUNREACH", Endpoint{Failed: 1, Last: EndingUnreachable}},
		{"given up", "192.0.2.66:80", "quit", "EINPROGRESS", Endpoint{}},
		{"no route to it", "203.0.113.7:80", "tcp", "ENETUNREACH", Endpoint{Failed: 1, Last: EndingUnreachable}},
		{"refused by the kernel", "198.51.100.7:80", "tcp", "ENETUNREACH", Endpoint{}},
		{"a source that does not go with it", "192.0.2.66:80", "bound=127.0.0.1,", "EINVAL", Endpoint{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			id := uint32(100 + i)
			h.put(t, "own_addrs", FromAddr(netip.MustParseAddr("127.0.0.1")), uint32(1))
			h.publish(t, 1, config, 0, id, []endpointOf{{tt.endpoint, 1}}, []uint32{0})
			steps := tt.step + "=" + asked
			if strings.HasSuffix(tt.step, ",") {
				steps = tt.step + asked
			}
			said := h.steps(t, strings.Fields(steps)...)
			if last := said[len(said)-1]; !strings.HasSuffix(last, " "+tt.said) {
				t.Errorf("the application saw %q, want %s", last, tt.said)
			}
			h.same(t, map[uint32]Endpoint{id: tt.want})
		})
	}
	tallies := h.counts(t, "tallies")
	if tallies[TallyConnects] != tallies[TallySentDirect] || tallies[TallyDecided] != tallies[TallySentDirect]+tallies[TallyUnsent] {
		t.Errorf("not all are accounted for: %v", tallies)
	}
}

// TestFallback: with the handler gone a service that has endpoints is balanced
// still, if it is not closed.
func TestFallback(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.serve(t)
	h.put(t, "beat", uint32(0), Beat{Stamp: 1, MaxAge: 1})
	for i, s := range []Service{
		{Path: uint8(PathRelay)},
		{Path: uint8(PathRelay), OnFailure: uint8(OnFailureClosed)},
		{Path: uint8(PathRelay)}, // without a set
		{Path: uint8(PathRelay), NoEndpoint: 113},
		{Path: uint8(PathDirect), OnFailure: uint8(OnFailureClosed)},
		{Path: uint8(PathRelay), Unavailable: math.MaxUint64, NoEndpoint: 110},
		{Path: uint8(PathDirect), Unavailable: math.MaxUint64},
		{}, // as if it were relay
	} {
		s.Id = uint32(i)
		h.service(t, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, byte(i)}), 80).String(), s)
		if i == 2 {
			continue
		}
		members := []endpointOf{{"127.0.0.1:8001", 1}}
		if i == 3 {
			members = nil
		}
		h.publish(t, s.Id, healthy, 0, 10, members, []uint32{0})
	}
	h.listenAt(t, "127.0.0.1:8001")
	want := []string{
		"tcp=10.96.0.0:80 10.96.0.0:80", "tcp=10.96.0.1:80 ECONNREFUSED", "tcp=10.96.0.2:80 ENETUNREACH", "tcp=10.96.0.3:80 EHOSTUNREACH",
		"tcp=10.96.0.4:80 10.96.0.4:80", "tcp=10.96.0.5:80 ETIMEDOUT", "tcp=10.96.0.6:80 10.96.0.6:80", "tcp=10.96.0.7:80 10.96.0.7:80",
	}
	var steps []string
	for _, w := range want {
		step, _, _ := strings.Cut(w, " ")
		steps = append(steps, step)
	}
	if diff := cmp.Diff(want, h.steps(t, steps...)); diff != "" {
		t.Errorf("what the application saw (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]uint64{"handler_stale": 4, "service": 2, "no_endpoint": 2, "unsent": 1}, h.reasons(t)); diff != "" {
		t.Errorf("reasons (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{
		"denied deny handler_stale 10.96.0.1:80", "denied deny no_endpoint 10.96.0.3:80", "denied deny no_endpoint 10.96.0.5:80",
		"end direct handler_stale 10.96.0.0:80", "end direct handler_stale 10.96.0.7:80",
		"end direct service 10.96.0.4:80", "end direct service 10.96.0.6:80",
	}, h.events(t, 7)); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}
