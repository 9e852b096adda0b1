// Package rig runs the real binary for black-box tests: applications in a cgroup
// and a network namespace, servers in another namespace on addresses that are
// not loopback, Pillion beside the applications.
package rig

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// Limit is how long anything may take that is bound to happen.
const Limit = 30 * time.Second

// Addresses that servers may have, far behind the application's default route.
// Nothing has them until [Rig.Serve] gives them to the world.
var (
	Far4  = netip.MustParseAddr("198.51.100.7")
	Far6  = netip.MustParseAddr("2001:db8:7::7")
	Void4 = netip.MustParseAddr("203.0.113.66") // nobody ever has it
)

// built is what tests run: $PILLION, or a build of this tree.
var built = sync.OnceValues(func() (string, error) {
	if path := os.Getenv("PILLION"); path != "" {
		return path, nil
	}
	dir, err := os.MkdirTemp("", "pillion-rig-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "pillion")
	// With the keeper, as make build does it.
	const entry = "-ldflags=-E=github.com/pillion-project/pillion/cmd/pillion/keeper.entry"
	cmd := exec.Command("go", "build", entry, "-o", path, "github.com/pillion-project/pillion/cmd/pillion")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build pillion: %w\n%s", err, out)
	}
	return path, nil
})

// Binary returns the path of the pillion under test.
func Binary(t testing.TB) string {
	t.Helper()
	path, err := built()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Rig is one application's world. It ends with the test.
type Rig struct {
	*testutil.Pair
	// Scope is the cgroup whose connections are captured.
	Scope *testutil.Cgroup
	// Home is where every pillion run and exec is started, but for the
	// namespace, which is the application's.
	Home testutil.Place
	// Runtime is the runtime directory of every pillion in the rig.
	Runtime string
	// Wrap, if set, is what every pillion run is started by: a command that
	// executes what follows it, as the same process.
	Wrap []string
	// Program, if set, is run in place of [Binary], with Env in addition to the
	// environment.
	Program string
	Env     []string

	instances *atomic.Int64 // that have not finished
}

// New makes a rig.
func New(t testing.TB) *Rig {
	t.Helper()
	return &Rig{Pair: testutil.NewPair(t), Scope: testutil.NewCgroup(t), Runtime: filepath.Join(t.TempDir(), "run"),
		instances: new(atomic.Int64)}
}

// Beside makes a second application in the same network namespace: a scope of
// its own, and all else is r's.
func (r *Rig) Beside(t testing.TB) *Rig {
	t.Helper()
	other := *r
	other.Scope = testutil.NewCgroup(t)
	return &other
}

// Serve is [Rig.Server] for one that stays. It returns the address with its port.
func (r *Rig) Serve(t testing.TB, addr netip.AddrPort, serve func(net.Conn)) netip.AddrPort {
	t.Helper()
	return r.Server(t, addr, serve).At
}

// Command prepares a command that runs as an application: in the scope and in
// the application's namespace. Start it with Start.
func (r *Rig) Command(name string, args ...string) *exec.Cmd { return exec.Command(name, args...) }

// Start starts cmd as an application. The caller waits for it.
func (r *Rig) Start(cmd *exec.Cmd) error {
	return testutil.Place{NS: r.App, Cgroup: r.Scope}.Start(cmd)
}

// Output runs a command as an application and returns what it wrote to stdout.
// It must succeed.
func (r *Rig) Output(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := r.Try(name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
	}
	return out
}

// Try is Output for a command that may fail; the error then has what it wrote
// to stderr.
func (r *Rig) Try(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := r.Start(cmd); err != nil {
		return "", err
	}
	if err := cmd.Wait(); err != nil {
		return stdout.String(), fmt.Errorf("%w: %s", err, stderr.String())
	}
	return stdout.String(), nil
}

// instances numbers the instances of this process.
var instances atomic.Int64

// Instance is a running pillion.
type Instance struct {
	*admin.Client
	Name string
	Cmd  *exec.Cmd
	log  *Log
	done chan struct{} // closed when it has ended
	err  error
	rig  *Rig
	// Unsettled counts decisions of whose end no hook hears: an MPTCP socket
	// whose connect the kernel itself refused (docs/design.md, section 8).
	Unsettled int64
	args      []string
}

// Log is what a process wrote, which may be read while it writes.
type Log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// String returns everything so far.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Run starts pillion run over the scope, with a configuration in YAML, and waits
// until it is ready. At the end of the test nothing may be unaccounted for, and
// it must end by itself, without an error, and leave nothing behind.
func (r *Rig) Run(t testing.TB, config string, flags ...string) *Instance {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("rig-%d-%d", os.Getpid(), instances.Add(1))
	args := append([]string{"run", "--cgroup", r.Scope.Path, "--config", file, "--name", name, "--runtime-dir", r.Runtime, "--drain-timeout", "3s"}, flags...)
	i := &Instance{Name: name, rig: r, args: args, log: &Log{}, Client: admin.Dial(filepath.Join(r.Runtime, name+".sock"))}
	r.instances.Add(1)
	t.Cleanup(func() { i.finish(t) })
	i.Launch(t)
	return i
}

// Launch starts the process, again after it was killed, and waits until it is
// ready.
func (i *Instance) Launch(t testing.TB) {
	t.Helper()
	line := slices.Concat(i.rig.Wrap, []string{cmp.Or(i.rig.Program, Binary(t))}, i.args)
	i.Cmd = exec.Command(line[0], line[1:]...)
	i.Cmd.Env = append(os.Environ(), i.rig.Env...)
	i.Cmd.Stdout, i.Cmd.Stderr = i.log, i.log
	if err := i.rig.home().Start(i.Cmd); err != nil {
		t.Fatal(err)
	}
	i.done = make(chan struct{})
	go i.wait(i.Cmd, i.done)
	testutil.Eventually(t, Limit, func() bool {
		select {
		case <-i.done:
			t.Fatalf("pillion run ended: %v\n%s", i.err, i.log)
		default:
		}
		s, err := i.Status(context.Background())
		return err == nil && s.Ready && s.State == admin.StateServing
	}, "pillion is ready\n", i.log)
}

// Preferred is the nice value of every pillion run and exec. On a busy machine a handler
// beats late otherwise, and connections are passed by: rightly, but not what a test of
// what it does with them wants to see.
const Preferred = -15

func (r *Rig) home() testutil.Place {
	place := r.Home
	place.NS, place.Nice = r.App, Preferred
	return place
}

func (i *Instance) wait(cmd *exec.Cmd, done chan<- struct{}) {
	i.err = cmd.Wait()
	close(done)
}

// Log returns what the process has logged.
func (i *Instance) Log() string { return i.log.String() }

// Kill ends the process without its knowing, and waits until it is gone.
func (i *Instance) Kill(t testing.TB) {
	t.Helper()
	if err := i.Cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-i.done
}

// Signal sends a signal to the process.
func (i *Instance) Signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	if err := i.Cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// Halt stops every thread of the process. They go on at SIGCONT, at the latest when the
// test ends.
func (i *Instance) Halt(t testing.TB) {
	t.Helper()
	process := i.Cmd.Process
	t.Cleanup(func() { process.Signal(unix.SIGCONT) })
	i.Signal(t, unix.SIGSTOP)
	Stopped(t, process.Pid)
}

// Stopped waits until no thread of a process runs any more, after SIGSTOP: on a busy
// machine one that was told to stop may answer still.
func Stopped(t testing.TB, pid int) {
	t.Helper()
	testutil.Eventually(t, Limit, func() bool {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil || len(files) == 0 {
			t.Fatalf("threads of %d: %v", pid, err)
		}
		for _, file := range files {
			stat, err := os.ReadFile(file)
			if err == nil && !strings.Contains(string(stat), ") T ") {
				return false
			}
		}
		return true
	}, "every thread of ", pid, " has stopped")
}

// Stop ends the process as an operator would, and returns how it ended.
func (i *Instance) Stop(t testing.TB) error {
	t.Helper()
	i.Signal(t, unix.SIGTERM)
	return i.Wait(t)
}

// Wait waits until the process ends by itself, and returns how it ended.
func (i *Instance) Wait(t testing.TB) error {
	t.Helper()
	select {
	case <-i.done:
	case <-time.After(Limit):
		i.Signal(t, unix.SIGQUIT)
		<-i.done
		t.Fatalf("pillion run does not end:\n%s", i.log)
	}
	return i.err
}

// finish is the end of every instance.
func (i *Instance) finish(t testing.TB) {
	if i.done == nil {
		return
	}
	select {
	case <-i.done: // the test ended it
	default:
		if !t.Failed() {
			i.Conserved(t)
		}
		if err := i.Stop(t); err != nil {
			t.Errorf("pillion run: %v", err)
		}
	}
	// Whatever the test did, nothing may stay.
	_, err := i.rig.Pillion(t, "unload", i.Name)
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 64) { // 64: there is none
		t.Errorf("pillion unload: %v", err)
	}
	i.gone(t)
	if t.Failed() {
		t.Logf("log of %s:\n%s", i.Name, i.log)
	}
}

// Conserved fails the test unless every connection in scope is accounted for.
func (i *Instance) Conserved(t testing.TB) {
	t.Helper()
	// A connect under way is counted on one side only.
	i.until(t, "every connection is accounted for", func(s admin.Status) (string, bool) {
		return fmt.Sprintf("%d are not", s.Unaccounted), s.Unaccounted == -i.Unsettled
	})
}

// Reasons returns the kernel side's counters.
func (i *Instance) Reasons(t testing.TB) map[string]uint64 {
	t.Helper()
	s, err := i.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return s.Counters
}

// Ended waits until want connections have ended, and returns their records.
func (i *Instance) Ended(t testing.TB, want int) []flow.Record {
	t.Helper()
	var all []flow.Record
	testutil.Eventually(t, Limit, func() bool {
		var err error
		if all, err = i.Flows(context.Background(), admin.FlowQuery{}); err != nil {
			t.Fatalf("flows: %v\n%s", err, i.log)
		}
		return len(all) >= want
	}, "ended connections, want ", strconv.Itoa(want))
	return all
}

// Relayed fails the test unless every record went by relay, and there are some.
func Relayed(t testing.TB, records []flow.Record) {
	t.Helper()
	if len(records) == 0 {
		t.Error("no connection was recorded")
	}
	for _, r := range records {
		if r.Path != flow.PathRelay {
			t.Errorf("connection to %s took %s (%s), want relay", r.OrigDst, r.Path, r.Reason)
		}
	}
}

// Exec runs pillion exec with these flags around a command in the application's
// namespace, and returns what both wrote.
func (r *Rig) Exec(t testing.TB, flags []string, command ...string) (stdout, stderr string, err error) {
	t.Helper()
	args := append([]string{"exec", "--runtime-dir", r.Runtime}, flags...)
	cmd := exec.Command(Binary(t), append(append(args, "--"), command...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := r.home().Start(cmd); err != nil {
		return "", "", err
	}
	err = cmd.Wait()
	return out.String(), errs.String(), err
}

// Pillion runs another command of the binary beside the applications.
func (r *Rig) Pillion(t testing.TB, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(Binary(t), append(args, "--runtime-dir", r.Runtime)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := (testutil.Place{NS: r.App}).Start(cmd); err != nil {
		return "", err
	}
	if err := cmd.Wait(); err != nil {
		return out.String(), fmt.Errorf("%w: %s", err, errs.String())
	}
	return out.String(), nil
}
