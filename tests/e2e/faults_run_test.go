package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// session is one connection of an application, as long as the test wants.
type session struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
	// first is the server's first line.
	first string
}

// talk is the application: it says what the server says, and sends what it is
// told.
const talk = `
import socket, sys, errno
try:
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
    f = s.makefile("rwb", buffering=0)
    print(f.readline().decode().strip(), flush=True)
    for line in sys.stdin:
        f.write(line.encode())
        print(f.readline().decode().strip() or "EOF", flush=True)
except OSError as e:
    print("errno", errno.errorcode.get(e.errno), flush=True)
`

func newSession(t *testing.T, r *rig.Rig, to netip.AddrPort) *session {
	t.Helper()
	testutil.Need(t, "python3")
	s := &session{cmd: r.Command("python3", "-c", talk, to.Addr().String(), fmt.Sprint(to.Port()))}
	in, out := testutil.Pipes(t, s.cmd)
	s.in = in
	s.out = bufio.NewScanner(out)
	if err := r.Start(s.cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.end)
	s.first = s.line()
	return s
}

func (s *session) line() string {
	s.out.Scan()
	return s.out.Text()
}

// ask sends a line and returns the answer, or what went wrong.
func (s *session) ask(line string) string {
	fmt.Fprintln(s.in, line)
	return s.line()
}

// end closes the connection.
func (s *session) end() {
	s.in.Close()
	if s.cmd.ProcessState == nil {
		s.cmd.Wait()
	}
}

// inside runs a program in the namespace and returns what it says.
func inside(t testing.TB, ns *testutil.NS, name string, args ...string) string {
	t.Helper()
	testutil.Need(t, name)
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := ns.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out.String())
	}
	return out.String()
}

// gone fails the test if anything is left in the namespace, or of the instance.
func gone(t testing.TB, r *rig.Rig, name string) {
	t.Helper()
	nothingIn(t, r)
	for _, path := range []string{pinDir(name), filepath.Join(r.Runtime, name+".sock")} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}

func nothingIn(t testing.TB, r *rig.Rig) {
	t.Helper()
	for _, family := range []string{"-4", "-6"} {
		routes := inside(t, r.App, "ip", family, "route", "show", "table", "local")
		if strings.Contains(routes, "240.") || strings.Contains(routes, "fd70:696c:6c69") {
			t.Errorf("a route is left:\n%s", routes)
		}
	}
	if sockets := inside(t, r.App, "ss", "-Htnal"); strings.Contains(sockets, "240.") || strings.Contains(sockets, "fd70:696c") {
		t.Errorf("a listener is left:\n%s", sockets)
	}
}

// TestDrain ends a run with SIGTERM: the live connection goes on, new ones go
// by on_failure, and when the live one ends nothing is left.
func TestDrain(t *testing.T) {
	t.Parallel()
	for _, setting := range []string{"open", "closed"} {
		t.Run(setting, func(t *testing.T) {
			g := newGround(t)
			i := g.Run(t, "on_failure: "+setting, "--drain-timeout", "60s")
			s := newSession(t, g.Rig, g.at4)
			l := startLoad(t, g.Rig, g.job())
			l.becomes(t, "relayed", (*outcome).relayed)
			told := now()
			i.Signal(t, unix.SIGTERM)
			if setting == "open" {
				l.becomes(t, "passed", (*outcome).passed)
			} else {
				l.becomes(t, "refused", (*outcome).refused)
			}
			if st, err := i.Status(context.Background()); err != nil || st.State != admin.StateDraining || st.Ready {
				t.Errorf("status %+v, %v", st, err)
			}
			if got := s.ask("still there?"); got != "still there?" {
				t.Errorf("the live connection: %q", got)
			}
			ended := now() // before: it may be gone by the time that this is over
			s.end()
			if err := i.Wait(t); err != nil {
				t.Errorf("run: %v", err)
			}
			l.becomes(t, "uncaptured", (*outcome).passed)
			for _, o := range l.stop(t) {
				ok := o.relayed() || o.passed() && (setting == "open" || o.Start > ended) || setting == "closed" && o.refused() && o.Start > told
				if !ok {
					t.Errorf("%v after SIGTERM: %s", time.Duration(o.Start-told), &o)
				}
			}
			gone(t, g.Rig, i.Name)
		})
	}
}

// TestListenOnDialedPort has an application listen on the port that it has a
// connection to: the handler's end of that has the port as its own, and must
// not stand in the way.
func TestListenOnDialedPort(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	g.Run(t, "")
	for _, to := range []netip.AddrPort{g.at4, g.at6} {
		s := newSession(t, g.Rig, to)
		for _, at := range []string{"0.0.0.0", "::"} {
			out, err := g.Try("python3", "-c", "import socket, sys\ns = socket.create_server((sys.argv[1], 7070), family=socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET)", at)
			if err != nil {
				t.Errorf("listen on %s while connected to %s: %s %v", at, to, out, err)
			}
		}
		if got := s.ask("still there?"); got != "still there?" {
			t.Errorf("the connection: %q", got)
		}
		s.end()
	}
}

// TestDrainForced ends a run whose application does not let go.
func TestDrainForced(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	i := g.Run(t, "", "--drain-timeout", "500ms")
	s := newSession(t, g.Rig, g.at6)
	// 75: connections had to be ended.
	var exit *exec.ExitError
	if err := i.Stop(t); !errors.As(err, &exit) || exit.ExitCode() != 75 {
		t.Errorf("run: %v, want exit code 75", err)
	}
	if got := s.ask("still there?"); got == "still there?" {
		t.Error("the connection goes on without a handler")
	}
	gone(t, g.Rig, i.Name)
}

// slotsOf returns the slots of an instance, by the address that they stand for.
func slotsOf(t *testing.T, name string) map[netip.Addr]uint32 {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(pinDir(name), "slot_by_orig"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	all := map[netip.Addr]uint32{}
	var k bpf.IPAddr
	var n uint32
	it := m.Iterate()
	for it.Next(&k, &n) {
		all[bpf.ToAddr(k)] = n
	}
	if err := it.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}

// pinsOf returns the names and inodes of the pins of an instance.
func pinsOf(t *testing.T, name string) map[string]uint64 {
	t.Helper()
	entries, err := os.ReadDir(pinDir(name))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]uint64{}
	for _, e := range entries {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(pinDir(name), e.Name()), &st); err != nil {
			t.Fatal(err)
		}
		all[e.Name()] = st.Ino
	}
	return all
}

// TestSecondInstance starts another of the same name: it is refused and changes
// nothing.
func TestSecondInstance(t *testing.T) {
	g := newGround(t)
	i := g.Run(t, "")
	l := startLoad(t, g.Rig, g.job())
	l.becomes(t, "relayed", (*outcome).relayed)
	pins, slots := pinsOf(t, i.Name), slotsOf(t, i.Name)
	other := testutil.NewCgroup(t)
	for _, scope := range []string{g.Scope.Path, other.Path} {
		_, err := g.Pillion(t, "run", "--name", i.Name, "--cgroup", scope)
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok || exit.ExitCode() != 1 || !strings.Contains(err.Error(), "running") {
			t.Errorf("a second run: %v", err)
		}
	}
	l.becomes(t, "relayed", (*outcome).relayed)
	for _, o := range l.stop(t) {
		if !o.served() {
			t.Errorf("disturbed: %s", &o)
		}
	}
	if diff := cmp.Diff(pins, pinsOf(t, i.Name)); diff != "" {
		t.Errorf("pins changed: %s", diff)
	}
	if diff := cmp.Diff(slots, slotsOf(t, i.Name)); diff != "" {
		t.Errorf("slots changed: %s", diff)
	}
}

// TestUnitCgroup captures a cgroup that is called like a unit's, without a name for the
// instance: it is called so, too, whatever way leads there.
func TestUnitCgroup(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	unit := filepath.Join(g.Scope.Path, "shop.service")
	if err := os.Mkdir(unit, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(unit)
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	relative, err := filepath.Rel(wd, unit)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{unit, relative} {
		out, err := g.Pillion(t, "init", "--cgroup", path)
		if err != nil {
			t.Fatalf("init: %v\n%s", err, out)
		}
		name := filepath.Base(g.Scope.Path) + "-shop.service"
		out, err = g.Pillion(t, "unload", name)
		if err != nil || !strings.Contains(out, "removed "+name) {
			t.Errorf("unload: %q, %v", out, err)
		}
		nothingIn(t, g.Rig)
	}
}

// TestAdopt kills a run and starts it again: the slots, the counters and the
// range are kept, and the connection that was open is accounted for.
func TestAdopt(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	i := g.Run(t, "services: [{name: web, address: 10.96.0.12:80, endpoints: ["+g.at4.String()+"]}]")
	// A busy machine may make the handler late: then it is the address's own.
	vip := g.Serve(t, netip.MustParseAddrPort("10.96.0.12:80"), introduce("vip"))
	for _, to := range []netip.AddrPort{g.at4, g.at6, vip} {
		l := startLoad(t, g.Rig, job{Targets: []netip.AddrPort{to}, Workers: 1, Pause: time.Millisecond})
		l.becomes(t, "relayed", (*outcome).relayed)
		l.stop(t)
	}
	i.Ended(t, 3)
	s := newSession(t, g.Rig, g.at4)
	before, err := i.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	slots := slotsOf(t, i.Name)
	if len(slots) != 3 {
		t.Errorf("slots %v, want three", slots)
	}
	i.Kill(t)
	if got := s.ask("still there?"); got != "errno ECONNRESET" && got != "EOF" {
		t.Errorf("the open connection: %q", got)
	}
	i.Launch(t)
	after, err := i.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if before.Slots4 != after.Slots4 || before.Slots6 != after.Slots6 {
		t.Errorf("ranges %s %s, before %s %s", after.Slots4, after.Slots6, before.Slots4, before.Slots6)
	}
	for _, name := range []string{"default", "service", "admitted"} {
		if before.Counters[name] == 0 || after.Counters[name] < before.Counters[name] {
			t.Errorf("counter %s: %d, before %d", name, after.Counters[name], before.Counters[name])
		}
	}
	l := startLoad(t, g.Rig, job{Targets: []netip.AddrPort{g.at4, g.at6}, Workers: 1, Pause: time.Millisecond})
	l.becomes(t, "relayed", (*outcome).relayed)
	l.stop(t)
	if diff := cmp.Diff(slots, slotsOf(t, i.Name)); diff != "" {
		t.Errorf("slots changed: %s", diff)
	}
	testutil.Eventually(t, rig.Limit, func() bool {
		st, err := i.Status(context.Background())
		return err == nil && st.Live == 0
	}, "no connection is taken for open")
}

// TestUnloadForce ends a run from outside, also one that does not react.
func TestUnloadForce(t *testing.T) {
	t.Parallel()
	for name, hung := range map[string]bool{"running": false, "stopped": true} {
		t.Run(name, func(t *testing.T) {
			g := newGround(t)
			i := g.Run(t, "", "--drain-timeout", "1s")
			newSession(t, g.Rig, g.at4)
			if out, err := g.Pillion(t, "unload", i.Name); err == nil || !strings.Contains(err.Error(), "--force") {
				t.Errorf("unload without force: %q, %v", out, err)
			}
			if st, err := i.Status(context.Background()); err != nil || !st.Ready {
				t.Errorf("status %+v, %v", st, err)
			}
			if hung {
				i.Halt(t)
			}
			out, err := g.Pillion(t, "unload", "--force", i.Name)
			if err != nil || !strings.Contains(out, "removed "+i.Name) {
				t.Errorf("unload --force: %q, %v", out, err)
				i.Signal(t, unix.SIGCONT)
			}
			// 75: connections had to be ended.
			var exit *exec.ExitError
			if err := i.Wait(t); !hung && (!errors.As(err, &exit) || exit.ExitCode() != 75) {
				t.Errorf("run: %v, want exit code 75", err)
			}
			gone(t, g.Rig, i.Name)
		})
	}
}

// TestExitCodes gives every command what it cannot work with. It says so, ends
// with the code of that, and has done nothing.
func TestExitCodes(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	file := func(text string) string {
		path := filepath.Join(t.TempDir(), "config.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	scope := r.Scope.Path
	tests := map[string]struct {
		args []string
		code int
		says string
		caps []uintptr
	}{
		"unknown command":       {args: []string{"ride"}, code: 64, says: "ride"},
		"unknown flag":          {args: []string{"run", "--cgruop", scope}, code: 64, says: "--cgruop"},
		"run without a cgroup":  {args: []string{"run"}, code: 64, says: "--cgroup"},
		"run with an argument":  {args: []string{"run", "--cgroup", scope, "x"}, code: 64, says: "x"},
		"no such cgroup":        {args: []string{"run", "--cgroup", scope + "-not"}, code: 64, says: "-not"},
		"a cgroup of another":   {args: []string{"run", "--cgroup", "/tmp"}, code: 64, says: "/tmp"},
		"no such file":          {args: []string{"run", "--cgroup", scope, "--config", "/nonexistent"}, code: 64, says: "/nonexistent"},
		"unknown key":           {args: []string{"run", "--cgroup", scope, "--config", file("on_failur: open")}, code: 64, says: "on_failure"},
		"a bad value":           {args: []string{"run", "--cgroup", scope, "--config", file("on_failure: perhaps")}, code: 64, says: "perhaps"},
		"a bad name":            {args: []string{"run", "--cgroup", scope, "--name", "../x"}, code: 64, says: "../x"},
		"a bad log level":       {args: []string{"run", "--cgroup", scope, "--log-level", "loud"}, code: 64, says: "loud"},
		"a bad drain time":      {args: []string{"run", "--cgroup", scope, "--drain-timeout", "soon"}, code: 64, says: "soon"},
		"exec without command":  {args: []string{"exec"}, code: 64, says: "command"},
		"a bad service":         {args: []string{"exec", "--service", "web", "--", "true"}, code: 64, says: "web"},
		"a bad rule":            {args: []string{"exec", "--deny", "example.org", "--", "true"}, code: 64, says: "example.org"},
		"a bad failure setting": {args: []string{"exec", "--on-failure", "maybe", "--", "true"}, code: 64, says: "maybe"},
		"a bad existing":        {args: []string{"exec", "--existing", "kill", "--", "true"}, code: 64, says: "kill"},
		"no such user":          {args: []string{"exec", "--user", "nobody-at-all", "--", "true"}, code: 64, says: "nobody-at-all"},
		"unload of nothing":     {args: []string{"unload", "no-such-instance"}, code: 64, says: "no-such-instance"},
		"run without CAP_BPF":   {args: []string{"run", "--cgroup", scope}, code: 69, says: "CAP_BPF", caps: without(unix.CAP_BPF, unix.CAP_SYS_ADMIN)},
		"exec without CAP_BPF":  {args: []string{"exec", "--", "true"}, code: 69, says: "CAP_BPF", caps: without(unix.CAP_BPF, unix.CAP_SYS_ADMIN)},
		"run without CAP_NET_ADMIN": {
			args: []string{"run", "--cgroup", scope}, code: 69, says: "CAP_NET_ADMIN", caps: without(unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN),
		},
	}
	// Not the files, which are others when somebody moves a controller.
	cgroups := filepath.Join(scope, "*", "cgroup.procs")
	before, err := filepath.Glob(cgroups)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(rig.Binary(t), append([]string{"--runtime-dir", r.Runtime}, tt.args...)...)
			var stderr, stdout bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			place := testutil.Place{NS: r.App, Cgroup: r.Scope}
			if tt.caps != nil {
				place = place.With(tt.caps...)
			}
			if err := place.Start(cmd); err != nil {
				t.Fatal(err)
			}
			cmd.Wait()
			if got := cmd.ProcessState.ExitCode(); got != tt.code {
				t.Errorf("exit code %d, want %d", got, tt.code)
			}
			if !strings.Contains(stderr.String(), tt.says) || stdout.Len() > 0 {
				t.Errorf("it says %q (and %q), want %q", stderr.String(), stdout.String(), tt.says)
			}
		})
	}
	nothingIn(t, r)
	after, err := filepath.Glob(cgroups)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("cgroups are left: %s", diff)
	}
}

// without returns all capabilities but some.
func without(some ...uintptr) (caps []uintptr) {
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		keep := true
		for _, s := range some {
			keep = keep && c != s
		}
		if keep {
			caps = append(caps, c)
		}
	}
	return caps
}
