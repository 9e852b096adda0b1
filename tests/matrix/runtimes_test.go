package matrix

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// What listens, beside the port of all addresses: on those of IPv4 alone, and
// curl's servers, which send back what is posted.
const (
	port4     = "7001"
	webPort   = "7080"
	webPort4  = "7081"
	unrouted  = "2001:db8:dead::1"
	silent    = "2001:db8:7::dead"
	nameAddr  = "198.51.100.9:53"
	byName    = ".test"
	lateModes = "adaptive mirror direct" // in which a connect may fail as the network's does
)

// target is a column: where to go, and whom to reach.
type target struct {
	title string
	name  string // for Go, whose names are looked up
	addrs []string
	peer  string
	only4 bool // to the port where nobody listens on IPv6
	late  bool
}

func targets() []target {
	four, six := rig.Far4.String(), rig.Far6.String()
	return []target{
		{title: "IPv4", addrs: []string{four}, peer: four},
		{title: "IPv6", addrs: []string{six}, peer: six},
		{title: "IPv4-mapped", addrs: []string{mapped(four)}, peer: mapped(four)},
		{title: "both", name: "both", addrs: []string{six, four}, peer: six},
		{title: "IPv6 without a route", name: "unrouted", addrs: []string{unrouted, four}, peer: four},
		{title: "IPv6 refused", name: "refused", addrs: []string{six, four}, peer: four, only4: true, late: true},
		{title: "IPv6 silent", name: "silent", addrs: []string{silent, four}, peer: four, late: true},
	}
}

// client is a row: one way of one runtime.
type client struct {
	title  string
	method string
	// targets are the titles of those that it knows.
	targets []string
	// curl has the arguments that say from where, by the target.
	curl func(w *world, to target) []string
	// command is what runs the others.
	command []string
	// unmaps: it shows an address of IPv4 as such on a socket of IPv6.
	unmaps bool
	want   string
}

func (w *world) clients(t *testing.T) []client {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	literal := []string{"IPv4", "IPv6"}
	all := []string{"IPv4", "IPv6", "IPv4-mapped", "both", "IPv6 without a route", "IPv6 refused", "IPv6 silent"}
	inTurn := all[:6] // one address after the other, and no end of waiting for one
	java := []string{"java", "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", w.classes, "Client"}
	python, own := []string{"python3", "testdata/client.py"}, func(to target) string {
		if to.title == "IPv6" {
			return testutil.AppV6.Addr().String()
		}
		return testutil.AppV4.Addr().String()
	}
	return []client{
		{title: "Go, `net.Dialer`", method: "dial", targets: all, command: []string{self}, unmaps: true},
		{title: "Go, `net.Dialer`, MPTCP", method: "mptcp", targets: all, command: []string{self}, unmaps: true},
		{title: "Java, `Socket`", method: "blocking", targets: literal, command: java},
		{title: "Java, `SocketChannel` and `Selector`", method: "nio", targets: literal, command: java},
		{title: "Python, `socket`", method: "sync", targets: inTurn, command: python},
		{title: "Python, `asyncio`", method: "asyncio", targets: all, command: python},
		{title: "Node, `net`", method: "connect", targets: all, command: []string{"node", "testdata/client.js"}},
		{title: "Perl, `IO::Socket::IP`", method: "connect", targets: inTurn, command: []string{"perl", "testdata/client.pl"}},
		{title: "curl", targets: all, curl: func(*world, target) []string { return nil }},
		{title: "curl, `--interface ADDRESS`", targets: literal,
			curl: func(_ *world, to target) []string { return []string{"--interface", "host!" + own(to)} }},
		{title: "curl, `--interface DEVICE`", targets: literal, want: pass("bound_device"),
			curl: func(*world, target) []string { return []string{"--interface", testutil.AppLink} }},
		{title: "curl, `--local-port`", targets: all[:3],
			curl: func(w *world, _ target) []string {
				w.lastPort++
				return []string{"--local-port", fmt.Sprint(w.lastPort)}
			}},
	}
}

// TestRuntimes does so with what applications are written in, and has them choose
// among the addresses of a name.
func TestRuntimes(t *testing.T) {
	testutil.Need(t, "java", "javac", "python3", "node", "perl", "curl")
	w := newWorld(t)
	w.prepare(t)
	clients := w.clients(t)
	before := map[string][]seen{}
	for n, all := range w.converse(t, clients, "") {
		c := clients[n]
		before[c.title] = all
		c.sound(t, all, targetsOf(c, ""), "without Pillion")
	}
	found, directly := table{}, table{}
	for _, mode := range append(slices.Clone(modes), direct) {
		t.Run(mode, func(t *testing.T) {
			into := found
			if mode == direct {
				into = directly
			}
			s := w.instance(t, mode, into, port, port4, webPort, webPort4)
			for n, all := range w.converse(t, clients, mode) {
				s.client(t, clients[n], mode, before[clients[n].title], all)
			}
			s.checkClients(t)
			if s.direct {
				s.settled(t, false)
			}
		})
	}
	var columns, rows []string
	for _, to := range targets() {
		columns = append(columns, to.title)
	}
	for _, c := range clients {
		rows = append(rows, c.title)
	}
	found.compare(t, runtimeSection, rows, columns)
	directly.compare(t, directRuntimeSection, rows, columns)
}

// prepare makes what the runtimes need more than the C application.
func (w *world) prepare(t *testing.T) {
	t.Helper()
	w.classes = t.TempDir()
	if out, err := exec.Command("javac", "-d", w.classes, "testdata/Client.java").CombinedOutput(); err != nil {
		t.Fatalf("javac: %v\n%s", err, out)
	}
	// Not on the unspecified address: Go takes that for both families'.
	w.Serve(t, netip.MustParseAddrPort(rig.Far4.String()+":"+port4), echo)
	w.ServeHTTP(t, netip.MustParseAddrPort("[::]:"+webPort), http.HandlerFunc(post))
	w.ServeHTTP(t, netip.MustParseAddrPort(rig.Far4.String()+":"+webPort4), http.HandlerFunc(post))
	far := func(port string) netip.AddrPort {
		return endpointOf(netip.MustParseAddrPort(rig.Far4.String() + ":" + port))
	}
	w.Serve(t, far(port4), w.witnessed)
	w.ServeHTTP(t, netip.AddrPortFrom(netip.IPv6Unspecified(), far(webPort).Port()), http.HandlerFunc(w.witnessedPost))
	w.ServeHTTP(t, far(webPort4), http.HandlerFunc(w.witnessedPost))
	zone := map[string][]netip.Addr{}
	for _, to := range targets() {
		for _, a := range to.addrs {
			zone[to.name+byName+"."] = append(zone[to.name+byName+"."], netip.MustParseAddr(a))
		}
	}
	w.NameServer(t, netip.MustParseAddrPort(nameAddr), zone)
	for _, a := range []string{unrouted, ownEndpoints()[unrouted]} {
		run(t, w.App, "ip", "-6", "route", "add", "unreachable", a)
	}
}

// targetsOf are those that a client knows, in a mode, or without Pillion.
func targetsOf(c client, mode string) []target {
	return slices.DeleteFunc(targets(), func(to target) bool {
		return !slices.Contains(c.targets, to.title) || to.late && mode != "" && !strings.Contains(lateModes, mode)
	})
}

// converse makes the connections of all clients, a few at once: some wait for
// long, and many would leave the instance no processor to beat in time.
func (w *world) converse(t *testing.T, clients []client, mode string) [][]seen {
	t.Helper()
	const atOnce = 3
	running := make([]*process, len(clients))
	each := make([][]seen, len(clients))
	end := func(n int) {
		if n >= 0 && running[n] != nil {
			each[n] = running[n].end(t)
		}
	}
	for n, c := range clients {
		end(n - atOnce)
		all := targetsOf(c, mode)
		if c.curl == nil {
			running[n] = w.run(t, c, all)
			continue
		}
		for _, to := range all {
			each[n] = append(each[n], w.curl(t, c, to)...)
		}
	}
	for n := len(clients) - atOnce; n < len(clients); n++ {
		end(n)
	}
	return each
}

// run starts a client.
func (w *world) run(t *testing.T, c client, all []target) *process {
	t.Helper()
	args := slices.Clone(c.command[1:])
	for _, to := range all {
		host, at := strings.Join(to.addrs, ","), port
		if to.name != "" && strings.HasPrefix(c.title, "Go") {
			host = to.name + byName
		}
		if to.only4 {
			at = port4
		}
		args = append(args, c.method, host, at)
	}
	cmd := exec.Command(c.command[0], args...)
	cmd.Env = append(os.Environ(), envNames+"="+nameAddr)
	return launch(t, w.place(false, false), cmd, false)
}

// curl posts random bytes, and compares what comes back.
func (w *world) curl(t *testing.T, c client, to target) []seen {
	t.Helper()
	dir := t.TempDir()
	data := make([]byte, size)
	for n := range data {
		data[n] = byte(rand.Uint32())
	}
	if err := os.WriteFile(filepath.Join(dir, "up"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	at := webPort
	if to.only4 {
		at = webPort4
	}
	args := []string{
		"-sS", "-g", "-m", "40", "--happy-eyeballs-timeout-ms", "2000", "-H", "Expect:", "--data-binary", "@" + filepath.Join(dir, "up"),
		"-o", filepath.Join(dir, "down"),
		"-w", `{"peer": "%{remote_ip}", "peer_port": %{remote_port}, "own": "%{local_ip}", "own_port": %{local_port}}`,
	}
	args = append(args, c.curl(w, to)...)
	if len(to.addrs) > 1 {
		args = append(args, "--resolve", "a.test:"+at+":"+strings.Join(to.addrs, ","), "http://a.test:"+at+"/")
	} else {
		args = append(args, "http://"+net.JoinHostPort(to.addrs[0], at)+"/")
	}
	all := launch(t, w.place(false, false), exec.Command("curl", args...), false).end(t)
	got, err := os.ReadFile(filepath.Join(dir, "down"))
	if err != nil {
		t.Error(err)
	}
	for n := range all {
		all[n].To, all[n].Sent, all[n].Got, all[n].Same = to.addrs[0], size, len(got), bytes.Equal(got, data)
	}
	return all
}
