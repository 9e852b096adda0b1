package bpf

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
)

// envDial makes the test binary an application that connects to each of the
// addresses, says how that ended, and ends.
const envDial = "PILLION_TEST_DIAL"

// envDevice is the network device that an application of envDial binds its sockets to.
const envDevice = "PILLION_TEST_DEVICE"

// dialAll writes, for each address, the peer that the socket has, or the error.
func dialAll(addrs string) {
	d := net.Dialer{Timeout: 5 * time.Second, Control: bindDevice}
	for _, addr := range strings.Fields(addrs) {
		conn, err := d.Dial("tcp", addr)
		if err != nil {
			errno, _ := errors.AsType[unix.Errno](err)
			fmt.Println(addr, unix.ErrnoName(errno))
			continue
		}
		fmt.Println(addr, conn.RemoteAddr())
		conn.Close()
	}
}

func bindDevice(_, _ string, raw syscall.RawConn) error {
	device := os.Getenv(envDevice)
	if device == "" {
		return nil
	}
	var set error
	err := raw.Control(func(fd uintptr) {
		set = unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, device)
	})
	return errors.Join(err, set)
}

// envHold is like envDial for one address, from a bound source and with socket
// options; the connection stays until the standard input ends.
const envHold = "PILLION_TEST_HOLD"

// The options of a held connection.
const (
	heldMark     = 0x55aa
	heldPriority = 5
	heldTOS      = 0x28
	heldCount    = 3 // keep-alive
	heldIdle     = 7201
	heldInterval = 11
	heldTimeout  = 123456 // ms
	heldControl  = "reno"
)

// hold connects from source to addr, says so, and waits.
func hold(source, addr string) {
	d := net.Dialer{Control: holdOptions, LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
	conn, err := d.Dial("tcp", addr)
	fmt.Println(err)
	io.Copy(io.Discard, os.Stdin)
	if err == nil {
		conn.Close()
	}
}

func holdOptions(network, _ string, raw syscall.RawConn) error {
	var set error
	err := raw.Control(func(fd uintptr) {
		level, tos := unix.SOL_IP, unix.IP_TOS
		if network == "tcp6" {
			level, tos = unix.SOL_IPV6, unix.IPV6_TCLASS
		}
		set = errors.Join(
			// First: IP_TOS also sets a priority of its own.
			unix.SetsockoptInt(int(fd), level, tos, heldTOS),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PRIORITY, heldPriority),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, heldMark),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
			unix.SetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_KEEPCNT, heldCount),
			unix.SetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_KEEPIDLE, heldIdle),
			unix.SetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_KEEPINTVL, heldInterval),
			unix.SetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_USER_TIMEOUT, heldTimeout),
			unix.SetsockoptString(int(fd), unix.SOL_TCP, unix.TCP_CONGESTION, heldControl))
	})
	return errors.Join(err, set)
}

// hooks are all programs attached around one cgroup and one network namespace,
// with listeners in the handler's place.
type hooks struct {
	ns        *testutil.NS
	cgroup    *testutil.Cgroup
	maps      map[string]*ebpf.Map
	progs     map[string]*ebpf.Program
	listeners []*net.TCPListener
	cells     *crowded[Decision]
	sent      *crowded[Sent]
}

func newHooks(t *testing.T) *hooks {
	t.Helper()
	h := &hooks{ns: testutil.NewNS(t), cgroup: testutil.NewCgroup(t)}
	cookie := h.ns.Cookie(t)
	progs, shared := loadAll(t, map[string]any{
		"cfg_netns": cookie, "cfg_slot4": uint32(testSlot4), "cfg_slot6": uint32(testSlot6),
		"cfg_scope":       uint64(0),
		"cfg_scope_level": uint32(0),
	})
	h.maps, h.progs = shared, progs
	for name, at := range programs {
		if at.Type == ebpf.SchedCLS {
			continue // only a process that answers may hold
		}
		var l link.Link
		var err error
		if name == ProgLookup {
			l, err = link.AttachNetNs(h.ns.FD(), progs[name])
		} else {
			l, err = link.AttachCgroup(link.CgroupOptions{Path: h.cgroup.Path, Attach: at.Attach, Program: progs[name]})
		}
		if err != nil {
			t.Fatalf("attach %s: %v", name, err)
		}
		t.Cleanup(func() { l.Close() })
	}
	h.crowd(t)
	h.listen(t)
	// No class of addresses has an own one, so that what is ordinary takes the short way.
	h.put(t, "not_own", uint32(0), uint64(math.MaxUint64))
	return h
}

// listen adds the local routes of the slots and puts a listener in each family.
func (h *hooks) listen(t *testing.T) {
	t.Helper()
	h.ns.Do(t, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for i, family := range []struct{ route, listener, source string }{
			// The application's own address: without it a slot would be.
			{"240.5.0.0/16", "240.5.255.253:9", "127.0.0.1"},
			{"fd70:696c:6c69:9::/64", "[fd70:696c:6c69:9::fffd]:9", "::1"},
		} {
			_, dst, err := net.ParseCIDR(family.route)
			if err != nil {
				return err
			}
			route := netlink.Route{LinkIndex: lo.Attrs().Index, Dst: dst, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: unix.RT_SCOPE_HOST, Src: net.ParseIP(family.source)}
			if err := netlink.RouteReplace(&route); err != nil { // it may be there
				return fmt.Errorf("add route %s: %w", family.route, err)
			}
			config := net.ListenConfig{Control: freebind}
			config.SetMultipathTCP(false)
			l, err := config.Listen(t.Context(), "tcp", family.listener)
			if err != nil {
				return err
			}
			t.Cleanup(func() { l.Close() })
			tcp := l.(*net.TCPListener)
			h.listeners = append(h.listeners, tcp)
			raw, err := tcp.SyscallConn()
			if err != nil {
				return err
			}
			var put error
			err = raw.Control(func(fd uintptr) {
				put = h.maps["listeners"].Put(uint32(i*WorkersMax), uint64(fd))
			})
			if err := errors.Join(err, put); err != nil {
				return fmt.Errorf("publish listener: %w", err)
			}
		}
		return nil
	})
}

// freebind lets a listener have an IPv6 address that only a route makes local.
func freebind(_, _ string, raw syscall.RawConn) error {
	var set error
	err := raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
	})
	return errors.Join(err, set)
}

func (h *hooks) put(t *testing.T, name string, key, value any) {
	t.Helper()
	if err := h.maps[name].Put(key, value); err != nil {
		t.Fatalf("write to %s: %v", name, err)
	}
}

// serve makes the handler well, and every destination but 2001:dead::/16 routed.
func (h *hooks) serve(t *testing.T) {
	t.Helper()
	h.put(t, "settings", uint32(0), Settings{
		Workers: 1, DenyRules: 2, ExcludeRules: 1, DefaultPath: uint32(flow.PathRelay),
		OnFailure: OnFailureOpen, SlotQuota: 100, ConnQuota: 100, LiveMax: 100, Families: 3,
	})
	h.put(t, "state", uint32(0), State{NextSlot: SlotFirst})
	h.put(t, "beat", uint32(0), Beat{Stamp: 1, MaxAge: math.MaxInt64})
	for _, p := range []string{"::ffff:0:0/96", "2001:db8::/32"} {
		pfx := netip.MustParsePrefix(p)
		var addr IPAddr
		if pfx.Addr().Is4In6() {
			addr = FromAddr(netip.MustParseAddr("0.0.0.0"))
		} else {
			addr = FromAddr(pfx.Addr())
		}
		h.put(t, "routes", PrefixKey{Prefixlen: uint32(pfx.Bits()), Addr: abiIpAddr(addr)}, Route{Kind: RouteUnicast})
	}
}

// dial runs an application in the scope.
func (h *hooks) dial(t *testing.T, addrs ...string) []string {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envDial+"="+strings.Join(addrs, " "))
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := (testutil.Place{NS: h.ns, Cgroup: h.cgroup}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("the application: %v\n%s", err, &out)
	}
	return strings.Split(strings.TrimSpace(out.String()), "\n")
}

// accepted returns where the connections that reached the handler are.
func (h *hooks) accepted(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, l := range h.listeners {
		for {
			// The application has ended: what came is in the queue.
			const wait = 100 * time.Millisecond
			start := time.Now()
			l.SetDeadline(start.Add(wait))
			conn, err := l.Accept()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				if time.Since(start) > 2*wait {
					continue // it may not have looked at all
				}
				break
			}
			if err != nil {
				t.Fatalf("accept: %v", err)
			}
			all = append(all, conn.LocalAddr().String())
			conn.Close()
		}
	}
	return all
}

// waitClosed waits until the last redirected connection has ended. The peer of an
// application that has ended may take its time with the answer to a FIN.
func (h *hooks) waitClosed(t *testing.T) {
	t.Helper()
	testutil.Eventually(t, 10*time.Second, func() bool {
		var key LiveKey
		var entry Live
		return !h.maps["live"].Iterate().Next(&key, &entry)
	}, "live is empty")
}

// counts sums a per-CPU array of counters over the CPUs, without the zeros.
func (h *hooks) counts(t *testing.T, name string) map[uint32]uint64 {
	t.Helper()
	sums := map[uint32]uint64{}
	var key uint32
	var perCPU []uint64
	entries := h.maps[name].Iterate()
	for entries.Next(&key, &perCPU) {
		for _, n := range perCPU {
			if n > 0 {
				sums[key] += n
			}
		}
	}
	if err := entries.Err(); err != nil {
		t.Fatalf("read %s: %v", name, err)
	}
	return sums
}

func (h *hooks) reasons(t *testing.T) map[string]uint64 {
	t.Helper()
	named := map[string]uint64{}
	for r, n := range h.counts(t, "reasons") {
		named[flow.Reason(r).String()] = n
	}
	return named
}

// events reads n records of the ring, or more if there are: kind, path, reason and
// original destination of each.
func (h *hooks) events(t *testing.T, n int) []string {
	t.Helper()
	return h.records(t, n, func(raw []byte) string { return h.describe(t, raw) })
}

// records reads n records of the ring, or more if there are, in words and sorted.
// The kernel side does not wake a reader.
func (h *hooks) records(t *testing.T, n int, describe func(raw []byte) string) []string {
	t.Helper()
	r, err := ringbuf.NewReader(h.maps["events"])
	if err != nil {
		t.Fatalf("read events: %v", err)
	}
	defer r.Close()
	r.SetDeadline(time.Now().Add(-time.Second))
	var all []string
	testutil.Eventually(t, 10*time.Second, func() bool {
		for {
			record, err := r.Read()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return len(all) >= n
			}
			if err != nil {
				t.Fatalf("read events: %v", err)
			}
			all = append(all, describe(record.RawSample))
		}
	}, "events")
	slices.Sort(all)
	return all
}

func (h *hooks) describe(t *testing.T, raw []byte) string {
	t.Helper()
	e, ok := ParseEvent(raw)
	if !ok {
		t.Fatalf("an event of %d bytes", len(raw))
	}
	if e.Cgroup != h.cgroup.ID || e.Opened == 0 || e.Ended < e.Opened {
		t.Errorf("cgroup %d (want %d), opened %d, ended %d", e.Cgroup, h.cgroup.ID, e.Opened, e.Ended)
	}
	kind := map[uint8]string{EventEnd: "end", EventDenied: "denied"}[e.Kind]
	orig := netip.AddrPortFrom(ToAddr(e.Orig), e.OrigPort)
	return fmt.Sprint(kind, " ", flow.Path(e.Path), " ", flow.Reason(e.Reason), " ", orig)
}

func rule(t *testing.T, prefix string, port uint16) RuleKey {
	t.Helper()
	p := netip.MustParsePrefix(prefix)
	k := RuleKey{Prefixlen: RulePortBits + uint32(p.Bits()), Port: port, Family: 6, Addr: abiIpAddr(FromAddr(p.Addr()))}
	if p.Addr().Is4() {
		k.Prefixlen, k.Family = k.Prefixlen+96, 4
	}
	return k
}

// TestHooks sends one connection each way, and wants every counter to say so.
func TestHooks(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.serve(t)
	h.put(t, "deny", rule(t, "198.51.100.0/24", 25), uint32(1))
	h.put(t, "deny", rule(t, "2001:db8:dead::/48", 0), uint32(1))
	h.put(t, "exclude", rule(t, "203.0.113.0/24", 0), uint32(1))
	h.put(t, "services", EndpointKey{Addr: abiIpAddr(FromAddr(netip.MustParseAddr("10.96.0.12"))), Port: 80}, Service{})
	own := FromAddr(netip.MustParseAddr("192.0.2.1"))
	h.put(t, "own_addrs", own, uint32(1))
	h.put(t, "not_own", uint32(0), ^ClassOf(own)) // as the loader says it

	want := []string{
		"198.51.100.7:25 ECONNREFUSED", // denied
		"198.51.100.7:26 198.51.100.7:26",
		"198.51.101.7:25 198.51.101.7:25",
		"[2001:db8:dead::1]:443 ECONNREFUSED", // denied
		"[2001:db8:beef::1]:443 [2001:db8:beef::1]:443",
		"203.0.113.9:80 ENETUNREACH", // excluded: the kernel answers
		"10.96.0.12:80 10.96.0.12:80",
		"10.96.0.12:81 10.96.0.12:81",
		"[2001:dead::1]:1 ENETUNREACH", // no route
		"192.0.2.1:80 ENETUNREACH",     // own address
		"127.0.0.1:1 ECONNREFUSED",
		"240.5.0.9:80 ECONNREFUSED",
		"[fd70:696c:6c69:9::9]:80 ECONNREFUSED",
	}
	var addrs []string
	for _, w := range want {
		addr, _, _ := strings.Cut(w, " ")
		addrs = append(addrs, addr)
	}
	if diff := cmp.Diff(want, h.dial(t, addrs...)); diff != "" {
		t.Errorf("what the application saw (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{
		"240.5.0.1:26", "240.5.0.2:25", "240.5.0.4:80", "240.5.0.4:81",
		"[fd70:696c:6c69:9::3]:443",
	}, h.accepted(t)); diff != "" {
		t.Errorf("what the handler got (-want +got):\n%s", diff)
	}
	reasons := h.reasons(t)
	delete(reasons, "not_live") // an acknowledgement may come when its connection has ended
	if diff := cmp.Diff(map[string]uint64{
		"denied": 2, "default": 4, "service": 1, "excluded": 1, "no_route": 1,
		"own_address": 1, "loopback": 1, "slot_address": 2,
		"unsent": 3, "admitted": 5,
		// The slots that the application dialed are looked for too.
		"probe": 7,
	}, reasons); diff != "" {
		t.Errorf("reasons (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[uint32]uint64{
		TallyConnects: 6, TallyDecided: 9, TallyDenied: 4, TallyUnsent: 3,
		TallySentPass: 1, TallySentRelay: 5,
	}, h.tallies(t)); diff != "" {
		t.Errorf("tallies (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{
		"denied deny denied 198.51.100.7:25",
		"denied deny denied [2001:db8:dead::1]:443",
		"denied deny slot_address 240.5.0.9:80",
		"denied deny slot_address [fd70:696c:6c69:9::9]:80",
		"end pass loopback 127.0.0.1:1",
		"end relay default 10.96.0.12:81",
		"end relay default 198.51.100.7:26",
		"end relay default 198.51.101.7:25",
		"end relay default [2001:db8:beef::1]:443",
		"end relay service 10.96.0.12:80",
	}, h.events(t, 10)); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}

// TestLiveEntry looks at what the handler gets to know of a connection.
func TestLiveEntry(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.serve(t)
	const routed = "192.0.2.50"
	h.put(t, "routes", PrefixKey{Prefixlen: 128, Addr: abiIpAddr(FromAddr(netip.MustParseAddr("10.96.0.13")))},
		Route{Kind: RouteUnicast, Source: abiIpAddr(FromAddr(netip.MustParseAddr(routed)))})
	for _, tt := range []struct {
		source, dst, slot string
		bound, seen       netip.Addr
	}{
		{"192.0.2.1", "10.96.0.12:8080", "240.5.0.1", netip.MustParseAddr("192.0.2.1"), netip.Addr{}},
		{"2001:db8::5", "[2001:db8::7]:443", "fd70:696c:6c69:9::2", netip.MustParseAddr("2001:db8::5"), netip.Addr{}},
		// The route has a source, but the application's own counts.
		{"192.0.2.2", "10.96.0.13:8080", "240.5.0.3", netip.MustParseAddr("192.0.2.2"), netip.Addr{}},
		// It bound nothing, so the upstream socket is not bound.
		{"127.0.0.1", "10.96.0.13:8081", "240.5.0.3", netip.Addr{}, netip.MustParseAddr(routed)},
	} {
		t.Run(tt.dst, func(t *testing.T) {
			source, dst := netip.MustParseAddr(tt.source), netip.MustParseAddrPort(tt.dst)
			from := ""
			if tt.bound.IsValid() {
				from = tt.source
				h.ns.AddAddr(t, "lo", netip.PrefixFrom(source, source.BitLen()))
				h.put(t, "own_addrs", FromAddr(source), uint32(1))
			}
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), envHold+"="+from+" "+tt.dst)
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := (testutil.Place{NS: h.ns, Cgroup: h.cgroup}).Start(cmd); err != nil {
				t.Fatal(err)
			}
			line, _ := bufio.NewReader(stdout).ReadString('\n')
			var key LiveKey
			var got Live
			entries := h.maps["live"].Iterate()
			if !entries.Next(&key, &got) {
				t.Errorf("no entry in live (the application says %q): %v", line, entries.Err())
			}
			stdin.Close()
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
			if key.SourcePort == 0 || got.Cookie == 0 || got.Opened == 0 || got.Group != h.cgroup.ID {
				t.Errorf("source port %d, cookie %d, opened %d, group %d", key.SourcePort, got.Cookie, got.Opened, got.Group)
			}
			key.SourcePort, got.Cookie, got.Opened, got.Group = 0, 0, 0, 0
			wantKey := LiveKey{
				Source: abiIpAddr(FromAddr(source)), SlotPort: dst.Port(),
				Slot: abiIpAddr(FromAddr(netip.MustParseAddr(tt.slot))),
			}
			want := Live{
				Cgroup: h.cgroup.ID, Orig: abiIpAddr(FromAddr(dst.Addr())),
				Bound: abiIpAddr(FromAddr(tt.bound)), Seen: abiIpAddr(FromAddr(tt.seen)),
				Mark: heldMark, Priority: heldPriority, Tos: heldTOS, Reason: uint8(flow.ReasonDefault),
				KeepCount: heldCount, KeepIdle: heldIdle, KeepInterval: heldInterval, UserTimeout: heldTimeout,
			}
			copy(want.Congestion[:], heldControl)
			if key != wantKey || got != want {
				t.Errorf("live:\n got %+v %+v\nwant %+v %+v", key, got, wantKey, want)
			}
			h.waitClosed(t)
		})
	}
}
