package systemd

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

const (
	// envRoot names the root file system that scripts/systemd.sh makes.
	envRoot = "PILLION_SYSTEMD_ROOT"
	// bootLimit is how long systemd may take to start, and to end.
	bootLimit = time.Minute
	// lifeLimit is how long a machine may live at all.
	lifeLimit = 7 * time.Minute
	// shipped is where the unit and the drop-in are.
	shipped = "../../deploy/systemd"
	units   = "/etc/systemd/system"
)

// machine is a container whose first process is systemd. Its network is that of the
// rig's application, its cgroups are below the rig's scope; the test's servers are in
// the rig's world.
type machine struct {
	*rig.Rig
	init int // the first process, as this system numbers it
	log  *rig.Log
}

// boot starts a machine that has the shipped unit, and pillion where that expects
// it. It ends with the test.
func boot(t *testing.T) *machine {
	t.Helper()
	root := os.Getenv(envRoot)
	if root == "" {
		t.Skip(envRoot + " is not set: make test-systemd makes a root file system and runs this")
	}
	testutil.RequireRoot(t)
	testutil.Need(t, "systemd-nspawn", "nsenter", "unshare")
	start := time.Now()
	m := &machine{Rig: rig.New(t), log: &rig.Log{}}
	bpffs := filepath.Join(t.TempDir(), "bpf")
	if err := os.Mkdir(bpffs, 0o700); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	unit, err := filepath.Abs(filepath.Join(shipped, "pillion@.service"))
	if err != nil {
		t.Fatal(err)
	}
	args := []string{
		"--quiet", "--directory=" + root, "--volatile=overlay", "--register=no", "--keep-unit",
		fmt.Sprintf("--network-namespace-path=/proc/%d/fd/%d", os.Getpid(), m.App.FD()),
		"--capability=all",
		"--system-call-filter=bpf perf_event_open open_by_handle_at name_to_handle_at @mount keyctl add_key @privileged",
		"--bind=" + bpffs + ":/sys/fs/bpf",
		"--bind-ro=" + self + ":/usr/local/bin/application",
		"--bind-ro=" + unit + ":" + units + "/pillion@.service",
		"--bind=/dev/null:/dev/kmsg",
		"--boot", "--console=pipe",
	}
	// The mount is in a namespace of its own, and so gone with the processes. The limit
	// is for a test that was killed itself.
	script := `mount -t bpf -o mode=0700 bpf "$0" && exec timeout --foreground --kill-after=10 "$1" systemd-nspawn "${@:2}"`
	cmd := exec.Command("unshare", append([]string{"--mount", "--propagation=slave", "bash", "-c", script, bpffs, strconv.Itoa(int(lifeLimit.Seconds()))}, args...)...)
	cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1", "SYSTEMD_NSPAWN_API_VFS_WRITABLE=1")
	cmd.Stdout, cmd.Stderr = m.log, m.log
	if err := (testutil.Place{Cgroup: m.Scope, Nice: rig.Preferred}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	t.Cleanup(func() {
		m.end(t, cmd.Process, done)
		clean(m.Scope)
	})
	testutil.Eventually(t, bootLimit, func() bool {
		select {
		case err := <-done:
			done <- err
			t.Fatalf("systemd-nspawn ended: %v\n%s", err, m.log)
		default:
		}
		return m.find(cmd.Process.Pid)
	}, "systemd starts\n", m.log)
	testutil.Eventually(t, bootLimit, func() bool {
		// What it says before its bus is there is an error.
		out, _ := m.try("systemctl", "is-system-running")
		state := strings.TrimSpace(out)
		if state == "degraded" {
			failed, _ := m.try("systemctl", "--no-pager", "--failed")
			t.Fatalf("a unit failed:\n%s", failed)
		}
		return state == "running"
	}, "systemd runs\n", m.log)
	m.copy(t, rig.Binary(t), "/usr/local/bin/pillion", 0o755)
	t.Logf("booted in %v", time.Since(start).Round(time.Millisecond))
	return m
}

// find looks for the container's first process among the children of nspawn.
func (m *machine) find(nspawn int) bool {
	children := []int{nspawn}
	for len(children) > 0 {
		pid := children[0]
		children = children[1:]
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			// Its numbers from the outermost namespace to its own.
			if list, ok := strings.CutPrefix(line, "NSpid:"); ok && pid != nspawn {
				if n := strings.Fields(list); len(n) > 1 && n[len(n)-1] == "1" {
					m.init = pid
					return true
				}
			}
		}
		b, _ = os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		for _, child := range strings.Fields(string(b)) {
			if n, err := strconv.Atoi(child); err == nil {
				children = append(children, n)
			}
		}
	}
	return false
}

// end stops the machine as an operator would, and if that does not help, at once.
func (m *machine) end(t *testing.T, nspawn *os.Process, done chan error) {
	if t.Failed() && m.init != 0 {
		out, _ := m.try("journalctl", "--no-pager", "-o", "short-monotonic", "-n", "200",
			"-u", unit, "-u", "shop.service", "-u", "pillion@pay.service", "-u", "bare.service", "-u", "plain.service")
		t.Logf("journal:\n%s", out)
	}
	if m.init != 0 {
		// SIGRTMIN+4 is "power off" (systemd(1)).
		if err := unix.Kill(m.init, unix.Signal(34+4)); err != nil {
			t.Errorf("power off: %v", err)
		}
	}
	select {
	case <-done:
	case <-time.After(bootLimit):
		t.Errorf("the machine does not end:\n%s", m.log)
		nspawn.Kill()
		if m.init != 0 {
			unix.Kill(m.init, unix.SIGKILL)
		}
		<-done
	}
}

// clean removes what systemd-nspawn leaves where cgroup v1 is beside v2: the same
// cgroups in systemd's own hierarchy. Those of v2 end with the test.
func clean(scope *testutil.Cgroup) {
	for _, dir := range []string{"payload", "supervisor", ""} {
		// Mostly there is none.
		_ = os.Remove(filepath.Join("/sys/fs/cgroup/systemd", filepath.Base(scope.Path), dir))
	}
}

// command prepares a command in the machine.
func (m *machine) command(name string, args ...string) *exec.Cmd {
	all := append([]string{"--target", strconv.Itoa(m.init), "--all", "--", name}, args...)
	cmd := exec.Command("nsenter", all...)
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL=C.UTF-8", "SYSTEMD_PAGER="}
	return cmd
}

// try runs a command in the machine, and returns what it wrote to both.
func (m *machine) try(name string, args ...string) (string, error) {
	out, err := m.command(name, args...).CombinedOutput()
	return string(out), err
}

// must is try for a command that must succeed; it returns its standard output.
func (m *machine) must(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := m.command(name, args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, errs.String())
	}
	return string(out)
}

// code runs a command and returns its exit code and what it wrote to both.
func (m *machine) code(t testing.TB, name string, args ...string) (int, string) {
	t.Helper()
	out, err := m.try(name, args...)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", name, err)
	}
	if exit != nil {
		return exit.ExitCode(), out
	}
	return 0, out
}

// path is where a file of the machine is found from here.
func (m *machine) path(name string) string { return fmt.Sprintf("/proc/%d/root%s", m.init, name) }

// write writes a file of the machine, in one step.
func (m *machine) write(t testing.TB, name, text string) {
	t.Helper()
	m.put(t, name, []byte(text), 0o644)
}

func (m *machine) copy(t testing.TB, from, to string, mode fs.FileMode) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	m.put(t, to, b, mode)
}

func (m *machine) put(t testing.TB, name string, b []byte, mode fs.FileMode) {
	t.Helper()
	path := m.path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".new", b, mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// read returns a file of the machine, and nothing if there is none.
func (m *machine) read(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(m.path(name))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(b)
}

// list returns the names in a directory of the machine; nil: there is none.
func (m *machine) list(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(m.path(dir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	slices.Sort(names)
	return names
}

// show returns a property of a unit, as systemd says it.
func (m *machine) show(t testing.TB, unit, property string) string {
	t.Helper()
	return strings.TrimSpace(m.must(t, "systemctl", "show", "--value", "-p", property, unit))
}

// journal returns the messages of a unit, and of systemd about it.
func (m *machine) journal(t testing.TB, unit string) string {
	t.Helper()
	m.must(t, "journalctl", "--sync")
	return m.must(t, "journalctl", "--no-pager", "-o", "cat", "-u", unit)
}
