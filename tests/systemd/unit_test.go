package systemd

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// TestUnit is about the unit as it is shipped: it is hardened, and works so.
func TestUnit(t *testing.T) {
	m := stage(t)
	m.beside(t, "shop", shop)
	m.must(t, "systemctl", "start", "shop.service")
	if !t.Run("Ready", m.testReady) {
		return
	}
	t.Run("Hardened", m.testHardened)
	t.Run("Exposure", m.testExposure)
	t.Run("Works", m.testWorks)
	t.Run("Gone", m.testGone)
}

// testReady: the service starts when its connections are captured.
func (m *machine) testReady(t *testing.T) {
	for _, unit := range []string{"pillion@shop.service", "shop.service"} {
		if got := m.show(t, unit, "ActiveState"); got != "active" {
			t.Fatalf("%s is %s\n%s", unit, got, m.journal(t, unit))
		}
	}
	if got := m.show(t, "pillion@shop.service", "Type"); got != "notify" {
		t.Errorf("the unit's type is %s", got)
	}
	ready, started := m.when(t, "pillion@shop.service", "ActiveEnter"), m.when(t, "shop.service", "ExecMainStart")
	if ready == 0 || ready > started {
		t.Errorf("Pillion was ready at %d us, the application started at %d us", ready, started)
	}
	if s := m.status(t, "shop"); !s.Ready || s.Scope != "/sys/fs/cgroup/pillion.slice/pillion-shop.slice" {
		t.Errorf("ready: %v, scope: %s", s.Ready, s.Scope)
	}
	journal := m.journal(t, "pillion@shop.service")
	for _, want := range []string{`msg=ready instance=shop scope=/sys/fs/cgroup/pillion.slice/pillion-shop.slice`, "Started pillion@shop.service"} {
		if !strings.Contains(journal, want) {
			t.Errorf("%q is not in the journal:\n%s", want, journal)
		}
	}
}

// when returns a time of a unit, in microseconds since boot.
func (m *machine) when(t testing.TB, unit, what string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(m.show(t, unit, what+"TimestampMonotonic"), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// main is the process of a service, as this system numbers it.
func (m *machine) main(t testing.TB, unit string) int {
	t.Helper()
	inner := m.show(t, unit, "MainPID")
	found := 0
	for _, entry := range m.numbers(t) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", entry))
		if err != nil {
			continue
		}
		if list := field(string(b), "NSpid"); len(list) == 2 && list[1] == inner && sameNamespace(entry, m.init) {
			found = entry
		}
	}
	if found == 0 {
		t.Fatalf("process %s of %s is not found", inner, unit)
	}
	return found
}

func (m *machine) numbers(t testing.TB) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var all []int
	for _, e := range entries {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			all = append(all, n)
		}
	}
	return all
}

func sameNamespace(a, b int) bool {
	one, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", a))
	two, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", b))
	return err == nil && err2 == nil && one == two
}

// field returns the words behind the name of a line in /proc/PID/status.
func field(status, name string) []string {
	for line := range strings.Lines(status) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.Fields(rest)
		}
	}
	return nil
}

// testHardened: what the unit says holds for the running process.
func (m *machine) testHardened(t *testing.T) {
	pid := m.main(t, "pillion@shop.service")
	status := readProc(t, pid, "status")
	caps := fmt.Sprintf("%016x", uint64(1)<<unix.CAP_BPF|uint64(1)<<unix.CAP_NET_ADMIN)
	for name, want := range map[string]string{
		"CapEff": caps, "CapPrm": caps, "CapBnd": caps, "CapInh": fmt.Sprintf("%016x", 0), "CapAmb": fmt.Sprintf("%016x", 0),
		"NoNewPrivs": "1", "Seccomp": "2", "Umask": "0077",
	} {
		if got := field(status, name); len(got) != 1 || got[0] != want {
			t.Errorf("%s is %v, want %s", name, got, want)
		}
	}
	// The last mount at a place is the one that is seen.
	options := map[string]string{}
	for line := range strings.Lines(readProc(t, pid, "mountinfo")) {
		w := strings.Fields(line)
		options[w[4]] = w[5]
	}
	for _, place := range []string{"/", "/run", "/sys", "/sys/fs/bpf", "/sys/fs/cgroup", "/proc/sys", "/dev", "/home", "/root", "/run/user"} {
		if got, _, _ := strings.Cut(options[place], ","); got != "ro" {
			t.Errorf("%s is mounted %q, want read-only", place, options[place])
		}
	}
	// What it has to write, what is its own, and what is for everybody.
	writable := []string{"/tmp/bpf", "/run/pillion", "/var/log/pillion", "/tmp", "/var/tmp", "/proc", "/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/hugepages"}
	for place, option := range options {
		got, _, _ := strings.Cut(option, ",")
		if got == "rw" && !slices.Contains(writable, place) && !strings.HasPrefix(place, "/run/host/") {
			t.Errorf("%s is writable", place)
		}
		if got != "rw" && slices.Contains(writable[:3], place) {
			t.Errorf("%s is not writable", place)
		}
	}
	// Nothing of the machine is in its private directories; of devices there are the
	// harmless ones.
	m.write(t, "/tmp/seen", "")
	m.write(t, "/home/seen", "")
	for _, name := range []string{"/tmp/seen", "/home/seen", "/dev/kmsg"} {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/root%s", pid, name)); err == nil {
			t.Errorf("the process sees %s", name)
		}
	}
	if got := m.list(t, "/var/log/pillion"); !slices.Contains(got, "shop.jsonl") {
		t.Errorf("in /var/log/pillion there is %v", got)
	}
}

func readProc(t testing.TB, pid int, name string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// exposureMax is where systemd-analyze's OK ends.
const exposureMax = 4.0

// testExposure: systemd itself says so of the loaded unit.
func (m *machine) testExposure(t *testing.T) {
	out := m.must(t, "systemd-analyze", "security", "--no-pager", "pillion@shop.service")
	found := regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+) (\S+)`).FindStringSubmatch(out)
	if found == nil {
		t.Fatalf("no level in:\n%s", out)
	}
	level, err := strconv.ParseFloat(found[1], 64)
	if err != nil || level > exposureMax || found[2] != "OK" {
		t.Errorf("exposure %s %s, want %.1f at most: %v\n%s", found[1], found[2], exposureMax, err, out)
	}
	t.Logf("exposure %s %s", found[1], found[2])
}

// testWorks: so hardened, it captures, balances and records on every path.
func (m *machine) testWorks(t *testing.T) {
	a := m.client(t, "shop.service")
	ways := []struct {
		to   netip.AddrPort
		path flow.Path
		want []netip.AddrPort
	}{
		{relayed, flow.PathRelay, []netip.AddrPort{server(1), server(2)}},
		{direct, flow.PathDirect, []netip.AddrPort{server(3), server(4)}},
		{unnamed, flow.PathRelay, []netip.AddrPort{unnamed}},
	}
	for _, w := range ways {
		tries := a.goes(t, w.to, w.want...)
		for _, r := range m.records(t, "shop", w.to, tries) {
			if r.Path != w.path || !slices.Contains(w.want, r.Endpoint) {
				t.Errorf("a connection to %s: path %s, endpoint %s, reason %s", w.to, r.Path, r.Endpoint, r.Reason)
			}
		}
		m.logged(t, w.to, tries)
	}
	m.conserved(t, "shop")
	if code, out := m.code(t, "pillion", "status"); code != 0 || !strings.Contains(out, "relayed") {
		t.Errorf("pillion status: %d\n%s", code, out)
	}
	for _, ask := range []string{"ready", "live"} {
		if code, out := m.code(t, "pillion", ask, "--instance", "shop"); code != 0 || out != "" {
			t.Errorf("pillion %s: %d\n%s", ask, code, out)
		}
	}
}

// logged waits until the flow log has some number of lines about a destination.
func (m *machine) logged(t testing.TB, to netip.AddrPort, want int) {
	t.Helper()
	testutil.Eventually(t, rig.Limit, func() bool {
		n := 0
		for lines := bufio.NewScanner(strings.NewReader(m.read(t, flowLog))); lines.Scan(); {
			var r flow.Record
			if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
				continue // the last one may be half a line yet
			}
			if r.OrigDst == to {
				n++
			}
		}
		return n == want
	}, want, " lines about ", to, " in the flow log")
}

// testGone: what is stopped leaves nothing but its log.
func (m *machine) testGone(t *testing.T) {
	m.must(t, "systemctl", "stop", "shop.service", "pillion@shop.service")
	if got := m.show(t, "pillion@shop.service", "Result"); got != "success" {
		t.Errorf("the unit ended with %s\n%s", got, m.journal(t, "pillion@shop.service"))
	}
	m.nothingLeft(t)
}

// nothingLeft fails the test if anything of an instance is still there.
func (m *machine) nothingLeft(t testing.TB) {
	t.Helper()
	if pins := m.list(t, "/sys/fs/bpf/pillion"); pins != nil {
		t.Errorf("pins are left: %v", pins)
	}
	for _, name := range m.list(t, "/run/pillion") {
		t.Errorf("/run/pillion/%s is left", name)
	}
	for _, family := range []string{"-4", "-6"} {
		// Slots are the only local addresses of these ranges.
		for line := range strings.Lines(m.must(t, "ip", family, "route", "show", "table", "all", "type", "local")) {
			if strings.Contains(line, "local 24") || strings.Contains(line, "local fd") {
				t.Errorf("a route is left: %s", line)
			}
		}
	}
}
