package matrix

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// port is where the world echoes, on every address it has.
const port = "7000"

// mptcp is IPPROTO_MPTCP.
const mptcp = 262

// The addresses of the matrix' world, beside those of the rig.
const (
	other4 = "198.51.100.8"
	other6 = "2001:db8:7::8"
	// link is the world's on the application's own link.
	link, otherLink, ownLink = "fe80::7", "fe80::8", "fe80::1"
	// foreign is nobody's here, but the world sends it to the application.
	foreign4, foreign6 = "203.0.113.9", "2001:db8:99::9"
	// The route to routed has second for the source address.
	routed4, routed6 = "198.51.100.40", "2001:db8:7::40"
	second4, second6 = "192.0.2.50", "2001:db8:1::50"
	// behind is behind another interface of the application's.
	behind4, behind6 = "198.51.100.41", "2001:db8:7::41"
)

// otherApp is the application's other interface.
const otherApp = "eth1"

// firstPort is below those that the kernel gives away.
const firstPort = 20000

// The sysctl net.ipv4.tcp_fastopen: who sends data with a SYN, without a cookie,
// and who takes it, for every listener.
const (
	fastOpenClient = "5"
	fastOpenServer = "1539"
	fastOpenBoth   = "1543"
)

// world is a rig with all that the ways need.
type world struct {
	*rig.Rig
	nested  *testutil.Cgroup // below the scope
	outside *testutil.Cgroup // not of the scope
	box     *testutil.NS     // a network namespace of a container in the scope
	classes string           // of the Java application
	tuned   bool             // listeners of the application take data with a SYN
	limit   string           // of the C application, in seconds
	saw     *witnesses       // of the endpoints of direct
	// lastPort is the source port that was bound last.
	lastPort int
	ways     map[string]string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	testutil.Need(t, "gcc", "musl-gcc", "ip")
	w := &world{Rig: rig.New(t), outside: testutil.NewCgroup(t), box: testutil.NewNS(t), ways: build(t), lastPort: firstPort, limit: "30"}
	w.nested = w.Scope.Child(t, "pod").Child(t, "container")
	for _, a := range []string{other4, other6, routed4, routed6, behind4, behind6} {
		w.Give(t, netip.MustParseAddr(a))
	}
	for _, a := range []netip.Addr{rig.Far4, rig.Far6} {
		w.Give(t, a)
	}
	testutil.Join(t, w.box, testutil.AppLink, w.World, "world1")
	prefixes := func(ns *testutil.NS, on string, all ...string) {
		for _, p := range all {
			ns.AddAddr(t, on, netip.MustParsePrefix(p))
		}
	}
	prefixes(w.box, testutil.AppLink, "203.0.113.130/25", "2001:db8:3::1/64")
	prefixes(w.World, "world1", "203.0.113.129/25", "2001:db8:3::2/64")
	w.box.Route(t, testutil.AppLink, netip.MustParseAddr("203.0.113.129"), netip.MustParseAddr("2001:db8:3::2"))
	testutil.Join(t, w.App, otherApp, w.World, "world2")
	prefixes(w.App, otherApp, "203.0.113.67/26", "2001:db8:4::1/64")
	prefixes(w.World, "world2", "203.0.113.66/26", "2001:db8:4::2/64")
	w.linkLocal(t)
	w.foreign(t)
	w.second(t)
	w.farIsOrdinary(t)
	w.World.Sysctl(t, "net/ipv4/tcp_fastopen", fastOpenServer)
	w.App.Sysctl(t, "net/ipv4/tcp_fastopen", fastOpenClient)
	w.Serve(t, netip.MustParseAddrPort("[::]:"+port), echo)
	w.serveDirect(t)
	return w
}

// linkLocal gives all interfaces link-local addresses of ours in place of the
// kernel's, which come some time later and would change the source address of a
// connection in between.
func (w *world) linkLocal(t *testing.T) {
	t.Helper()
	for _, end := range []struct {
		ns   *testutil.NS
		link string
		own  []string
	}{
		{w.App, testutil.AppLink, []string{ownLink}},
		{w.App, otherApp, []string{ownLink}},
		{w.box, testutil.AppLink, []string{ownLink}},
		{w.World, testutil.WorldLink, []string{link, otherLink}},
		{w.World, "world1", []string{link, otherLink}},
		{w.World, "world2", []string{link, otherLink}},
	} {
		end.ns.Sysctl(t, filepath.Join("net/ipv6/conf", end.link, "addr_gen_mode"), "1")
		run(t, end.ns, "ip", "-6", "addr", "flush", "dev", end.link, "scope", "link")
		for _, a := range end.own {
			end.ns.AddAddr(t, end.link, netip.PrefixFrom(netip.MustParseAddr(a), 64))
		}
	}
}

// foreign has packets to the foreign addresses end at the application, as for a
// transparent proxy.
func (w *world) foreign(t *testing.T) {
	t.Helper()
	for _, f := range []struct{ version, addr, via string }{
		{"-4", foreign4, testutil.AppV4.Addr().String()},
		{"-6", foreign6, testutil.AppV6.Addr().String()},
	} {
		run(t, w.World, "ip", f.version, "route", "add", f.addr, "via", f.via)
		run(t, w.App, "ip", f.version, "rule", "add", "iif", testutil.AppLink, "to", f.addr, "lookup", "100")
		run(t, w.App, "ip", f.version, "route", "add", "local", f.addr, "dev", "lo", "table", "100")
	}
}

// second gives the application more addresses, and routes that have them for the
// source, because they say so or because of their interface.
func (w *world) second(t *testing.T) {
	t.Helper()
	w.App.AddAddr(t, "lo", netip.MustParsePrefix(second4+"/32"), netip.MustParsePrefix(second6+"/128"))
	for _, r := range []struct{ version, to, via, src, own string }{
		{"-4", routed4, testutil.WorldV4.Addr().String(), second4, testutil.AppV4.Addr().String()},
		{"-6", routed6, testutil.WorldV6.Addr().String(), second6, testutil.AppV6.Addr().String()},
	} {
		run(t, w.App, "ip", r.version, "route", "add", r.to, "via", r.via, "src", r.src)
		run(t, w.World, "ip", r.version, "route", "add", r.src, "via", r.own)
	}
	run(t, w.App, "ip", "-4", "route", "add", behind4, "via", "203.0.113.66")
	run(t, w.App, "ip", "-6", "route", "add", behind6, "via", "2001:db8:4::2")
}

// farIsOrdinary makes sure that connects to the far addresses are what most connects are:
// one to an address that shares its class with one of the application's goes another way
// through the hook.
func (w *world) farIsOrdinary(t *testing.T) {
	t.Helper()
	w.App.Do(t, func() error {
		all, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, own := range all {
			a, ok := netip.AddrFromSlice(own.IP)
			if !ok {
				return fmt.Errorf("%v is no address", own.IP)
			}
			if a.IsLoopback() || a.IsLinkLocalUnicast() {
				continue // no class counts these
			}
			for _, far := range []netip.Addr{rig.Far4, rig.Far6} {
				if bpf.ClassOf(bpf.FromAddr(a)) == bpf.ClassOf(bpf.FromAddr(far)) {
					return fmt.Errorf("%s and the application's %s are of one class: give it another address", far, a)
				}
			}
		}
		return nil
	})
}

// run runs a program in a namespace. It must succeed.
func run(t *testing.T, ns *testutil.NS, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	log := &rig.Log{}
	cmd.Stdout, cmd.Stderr = log, log
	err := ns.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, log)
	}
}

// echo sends back what it gets, and ends when the client does.
func echo(c net.Conn) { io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) }

// build compiles the application for each C library.
func build(t *testing.T) map[string]string {
	t.Helper()
	programs := map[string]string{}
	for libc, compiler := range map[string][]string{
		"glibc": {"gcc"},
		// The kernel's headers are the system's: after its own.
		"musl": {"musl-gcc", "-static", "-idirafter", "/usr/include", "-idirafter", "/usr/include/x86_64-linux-gnu"},
	} {
		path := filepath.Join(t.TempDir(), "ways-"+libc)
		args := append(compiler[1:], "-O1", "-Wall", "-Werror", "-pthread", "-o", path, "testdata/ways.c")
		if out, err := exec.Command(compiler[0], args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", compiler[0], err, out)
		}
		programs[libc] = path
	}
	return programs
}
