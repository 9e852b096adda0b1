package check

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

func command(args ...string) Target {
	s := Default()
	s.Kind, s.Command = KindCommand, args
	return Target{Cluster: "shop", Addr: netip.MustParseAddrPort("192.0.2.7:80"), Spec: s}
}

func shell(script string) Target { return command("/bin/sh", "-c", script) }

func TestCommand(t *testing.T) {
	for name, tt := range map[string]struct {
		target Target
		want   string
	}{
		"well":           {command("true"), ""},
		"output is well": {shell("echo fine; echo really >&2"), ""},
		"not well":       {command("false"), "command: exit status 1"},
		"says why":       {shell("echo no; echo '  disk full' >&2; exit 3"), "command: exit status 3: no   disk full"},
		"no shell":       {command("test", "$HOME", "=", "`id`"), "command: exit status 1"},
		"by a signal":    {shell("kill -TERM $$"), "command: signal: terminated"},
		"reads nothing":  {shell("read x; exit $?"), "command: exit status 1"},
		"in the root":    {shell(`test "$(pwd)" = /`), ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := asker().ask(within(t, limit), tt.target)
			wantErr(t, err, tt.want)
			if isOwn(err) {
				t.Error("what a command says is our own failure")
			}
		})
	}
	for _, name := range []string{"pillion-no-such-program", "/", "/etc/hostname"} {
		if err := asker().ask(within(t, limit), command(name)); !isOwn(err) {
			t.Errorf("%s cannot be run, and it is the endpoint's failure: %v", name, err)
		}
	}
}

func TestCommandOutput(t *testing.T) {
	err := asker().ask(within(t, limit), shell(`head -c 1000000 /dev/zero | tr '\0' x; printf '\033[2J\nmore'; exit 1`))
	if want := "command: exit status 1: " + strings.Repeat("x", maxOutput); err == nil || err.Error() != want {
		t.Errorf("error %v", err)
	}
	err = asker().ask(within(t, limit), shell(`printf 'a\033[2J\nb\377c'; exit 1`))
	wantErr(t, err, "command: exit status 1: a [2J bc")
}

func TestCommandEnvironment(t *testing.T) {
	t.Setenv("PILLION_SECRET", "x")
	file := filepath.Join(t.TempDir(), "env")
	target := command("sh", "-c", "cat /proc/$$/environ > "+file)
	target.Spec.Port = 8081
	wantErr(t, asker().ask(within(t, limit), target), "")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"PATH=" + os.Getenv("PATH"), "PILLION_ENDPOINT_ADDRESS=192.0.2.7",
		"PILLION_ENDPOINT_PORT=8081", "PILLION_ENDPOINT_CLUSTER=shop",
	}
	if diff := cmp.Diff(want, strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// pids waits until a command has written the numbers of its processes.
func pids(t *testing.T, file string, n int) []int {
	t.Helper()
	var all []int
	testutil.Eventually(t, limit, func() bool {
		b, err := os.ReadFile(file)
		if err != nil || !strings.HasSuffix(string(b), "\n") {
			return false
		}
		all = all[:0]
		for _, f := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(f)
			if err != nil {
				return false
			}
			all = append(all, pid)
		}
		return len(all) == n
	}, "processes of the command")
	return all
}

// gone waits until processes are gone, or are zombies of somebody else's.
func gone(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		testutil.Eventually(t, limit, func() bool {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err != nil {
				return true
			}
			_, state, _ := strings.Cut(string(b), ") ")
			return strings.HasPrefix(state, "Z")
		}, "process", pid, "is gone")
	}
}

// family writes the numbers of a command, its child and its grandchild to file.
// All of them ignore SIGTERM and wait for ever.
func family(file string) string {
	return fmt.Sprintf(`trap '' TERM; (sh -c 'echo $$ >>%[1]s; exec sleep 1000' & sh -c 'echo $PPID >>%[1]s'; wait) & echo $$ >>%[1]s; `, file)
}

// TestCommandTimeout: all of the group is killed when the time is over.
func TestCommandTimeout(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pids")
	ctx, cancel := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	asking.Go(func() {
		wantErr(t, asker().ask(ctx, shell("echo I hang;"+family(file)+"wait")), "command: no answer in time: I hang")
	})
	all := pids(t, file, 3)
	cancel()
	asking.Wait()
	gone(t, all)
}

// TestCommandLeavesNothing: what a command that has ended leaves in its group is
// killed, and what left the group and holds the output is not waited for.
func TestCommandLeavesNothing(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pids")
	wantErr(t, asker().ask(within(t, limit), shell(family(file)+"while [ $(wc -l <"+file+") -lt 3 ]; do sleep 0.01; done; exit 0")), "")
	gone(t, pids(t, file, 3))

	file = filepath.Join(t.TempDir(), "pids")
	wantErr(t, asker().ask(within(t, limit), shell("setsid sh -c 'echo $$ >"+file+"; exec sleep 1000' & while ! [ -s "+file+" ]; do sleep 0.01; done; echo bye; exit 4")),
		"command: exit status 4: bye")
	for _, pid := range pids(t, file, 1) {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Errorf("who left the group is gone: %v", err)
		}
	}
}

// TestCommandZombies: also in a process that orphans go to, as the first of a
// container is one, no command leaves a zombie.
func TestCommandZombies(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
	for _, end := range []string{"wait", "exit 0", "exit 1", "kill -KILL $$"} {
		file := filepath.Join(t.TempDir(), "pids")
		ctx, cancel := context.WithCancel(t.Context())
		var asking sync.WaitGroup
		asking.Go(func() {
			asker().ask(ctx, shell(family(file)+"while [ $(wc -l <"+file+") -lt 3 ]; do sleep 0.01; done;"+end))
		})
		pids(t, file, 3)
		cancel()
		asking.Wait()
		if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err != unix.ECHILD {
			t.Errorf("%s: process %d is left, %v", end, pid, err)
		}
	}
}

// TestCommandsEndWithSet: a command of a removed endpoint is killed, and so is one
// that runs when Run ends.
func TestCommandsEndWithSet(t *testing.T) {
	dir := t.TempDir()
	r := &reports{}
	c := New(Options{Report: r.add})
	hang := func(name string, n byte) Target {
		target := shell(family(filepath.Join(dir, name)) + "wait")
		target.Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, n}), 80)
		target.Spec.Interval, target.Spec.Timeout = minInterval, time.Hour
		return target
	}
	a, b := hang("a", 1), hang("b", 2)
	set(t, c, a, b)
	stop := run(t, c)
	first, second := pids(t, filepath.Join(dir, "a"), 3), pids(t, filepath.Join(dir, "b"), 3)
	set(t, c, b)
	gone(t, first)
	stop()
	gone(t, second)
	if n := r.count(); n != 0 {
		t.Errorf("%d reports", n)
	}
}

// holding returns a checker whose commands the kernel lets go of only once free is
// closed, and how many it has started.
func holding(free <-chan struct{}) (c *Checker, r *reports, started *atomic.Int32) {
	c, r = fake(nil)
	c.probe, started = c.ask, &atomic.Int32{}
	c.commands.finish = func(ctx context.Context, cmd *exec.Cmd, out *output) error {
		started.Add(1)
		defer func() { <-free }()
		return finish(ctx, cmd, out)
	}
	return c, r, started
}

// TestCommandHeld: a command that cannot be killed is a time-out, and so are the checks
// after it, which start nothing until it has ended.
func TestCommandHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		free := make(chan struct{})
		c, r, started := holding(free)
		target := command("true")
		set(t, c, target)
		stop := run(t, c)
		time.Sleep(time.Minute)
		synctest.Wait()
		if n, got := started.Load(), r.of(target.Addr); n != 1 || len(got) != 1 || got[0] != StateDown {
			t.Errorf("%d were started, and reports are %v", n, got)
		}
		if s := status(t, c, target.Addr); s.Failed < 5 || s.Err != "command: no answer in time: the last one cannot be killed" {
			t.Errorf("%d failures, error %q", s.Failed, s.Err)
		}
		other := target
		other.Spec.Command = []string{"sh", "-c", "true"}
		set(t, c, other)
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := started.Load(); n != 2 {
			t.Errorf("%d were started, want another command's too", n)
		}
		set(t, c, target)
		close(free)
		time.Sleep(time.Minute)
		r.want(t, target.Addr, StateDown, StateUp)
		stop()
	})
}

// TestCommandHeldAtTheEnd: nobody waits for ever for a command that cannot be killed.
func TestCommandHeldAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		free := make(chan struct{})
		c, _, started := holding(free)
		target := command("true")
		target.Spec.Timeout = time.Hour
		set(t, c, target)
		stop := run(t, c)
		time.Sleep(time.Minute)
		before := time.Now()
		stop()
		if took := time.Since(before); took != killLimit || started.Load() != 1 {
			t.Errorf("the end took %s with %d commands, want %s with one", took, started.Load(), killLimit)
		}
		close(free)
		synctest.Wait()
		if n := len(c.commands.held); n != 0 {
			t.Errorf("%d are held", n)
		}
	})
}

// TestCommandsHeld: with many commands that cannot be killed no more are started, and
// that is nobody's failure.
func TestCommandsHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		free := make(chan struct{})
		c, r, started := holding(free)
		c.lanes[1].most = 1 // one after the other
		all := targets(heldMax+3, command("true").Spec)
		set(t, c, all...)
		stop := run(t, c)
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if n := started.Load(); n != heldMax || r.count() != heldMax {
			t.Errorf("%d were started, %d reported, want %d", n, r.count(), heldMax)
		}
		untold := 0
		for _, s := range c.States() {
			if s.State == StateUnknown && strings.HasPrefix(s.Err, "start command: ") {
				untold++
			}
		}
		if untold != 3 {
			t.Errorf("of %d endpoints nothing is known, want 3: %+v", untold, c.States())
		}
		stop()
		close(free)
	})
}
