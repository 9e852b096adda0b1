package e2e

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// execCommand prepares pillion exec with pins of its own, so that nobody else's
// sweep meets it.
func execCommand(t *testing.T, r *rig.Rig, bpffs string, flags []string, command ...string) *exec.Cmd {
	t.Helper()
	args := append([]string{"exec", "--runtime-dir", r.Runtime, "--bpffs", bpffs}, flags...)
	return exec.Command(rig.Binary(t), append(append(args, "--"), command...)...)
}

// ownBPFFS returns a directory that Pillion mounts a bpf file system on.
func ownBPFFS(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// traceless fails the test if an exec left anything: pins, routes, cgroups.
func traceless(t *testing.T, r *rig.Rig, bpffs string) {
	t.Helper()
	if left, _ := filepath.Glob(filepath.Join(bpffs, "pillion*")); len(left) > 0 {
		t.Errorf("pins are left: %v", left)
	}
	if left, _ := filepath.Glob(filepath.Join(r.Scope.Path, "*pillion*")); len(left) > 0 {
		t.Errorf("cgroups are left: %v", left)
	}
	if left, _ := filepath.Glob(filepath.Join(r.Runtime, "*.sock")); len(left) > 0 {
		t.Errorf("sockets are left: %v", left)
	}
	nothingIn(t, r)
}

// TestExecExitCode hands the command's exit code on, or the shell's for what
// could not be started or was killed.
func TestExecExitCode(t *testing.T) {
	t.Parallel()
	r, bpffs := rig.New(t), ownBPFFS(t)
	notExecutable := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(notExecutable, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		command []string
		code    int
	}{
		"success":        {[]string{"true"}, 0},
		"failure":        {[]string{"sh", "-c", "exit 3"}, 3},
		"the highest":    {[]string{"sh", "-c", "exit 255"}, 255},
		"killed":         {[]string{"sh", "-c", "kill -KILL $$"}, 128 + 9},
		"terminated":     {[]string{"sh", "-c", "kill -TERM $$"}, 128 + 15},
		"not found":      {[]string{"no-such-program-here"}, 127},
		"no such file":   {[]string{"/nonexistent/program"}, 127},
		"not executable": {[]string{notExecutable}, 126},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := execCommand(t, r, bpffs, nil, tt.command...)
			if err := (testutil.Place{NS: r.App, Cgroup: r.Scope}).Start(cmd); err != nil {
				t.Fatal(err)
			}
			cmd.Wait()
			if got := cmd.ProcessState.ExitCode(); got != tt.code {
				t.Errorf("exit code %d, want %d", got, tt.code)
			}
			traceless(t, r, bpffs)
		})
	}
}

// TestExecSignals sends signals to pillion: they reach the command, which may
// do as it likes, and only once.
func TestExecSignals(t *testing.T) {
	t.Parallel()
	r, bpffs := rig.New(t), ownBPFFS(t)
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1} {
		t.Run(unix.SignalName(sig), func(t *testing.T) {
			// Started by nohup, the command would ignore it too.
			told := make(chan os.Signal, 1)
			signal.Notify(told, sig)
			defer signal.Stop(told)
			// Twice it goes on.
			cmd := execCommand(t, r, bpffs, nil, "sh", "-c", `n=0
trap 'n=$((n+1)); echo got $n; [ $n -lt 3 ] || exit 7' `+strings.TrimPrefix(unix.SignalName(sig), "SIG")+`
echo ready
while :; do sleep 0.02; done`)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := (testutil.Place{NS: r.App, Cgroup: r.Scope}).Start(cmd); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(out)
			for _, want := range []string{"ready", "got 1", "got 2", "got 3"} {
				if lines.Scan(); lines.Text() != want {
					t.Errorf("line %q, want %q", lines.Text(), want)
				}
				if want != "got 3" {
					cmd.Process.Signal(sig)
				}
			}
			cmd.Wait()
			if got := cmd.ProcessState.ExitCode(); got != 7 {
				t.Errorf("exit code %d, want the command's", got)
			}
			traceless(t, r, bpffs)
		})
	}
}

// TestExecPipes has the command read and write as if it stood there itself.
func TestExecPipes(t *testing.T) {
	t.Parallel()
	r, bpffs := rig.New(t), ownBPFFS(t)
	data := make([]byte, 4<<20)
	rand.Read(data)
	cmd := execCommand(t, r, bpffs, nil, "sh", "-c", "echo aside >&2; exec cat")
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(data), &out, &errs
	if err := (testutil.Place{NS: r.App, Cgroup: r.Scope}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(out.Bytes(), data) || errs.String() != "aside\n" {
		t.Errorf("%d bytes came back of %d; stderr %q", out.Len(), len(data), errs.String())
	}
	traceless(t, r, bpffs)
}

// TestExecUser runs the command as somebody else: with that one's groups, no
// privileges, and captured.
func TestExecUser(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "curl")
	r, bpffs := rig.New(t), ownBPFFS(t)
	at := r.Serve(t, netip.AddrPortFrom(rig.Far4, 7070), hello("far"))
	// A busy machine may make the handler late: then it is the address's own.
	r.Serve(t, netip.MustParseAddrPort("10.96.0.12:80"), hello("far"))
	cmd := execCommand(t, r, bpffs, []string{"--user", "nobody", "--service", "10.96.0.12:80=" + at.String()},
		"sh", "-c", "id -u; id -g; id -G; grep CapEff /proc/self/status; grep CapPrm /proc/self/status; curl -sS -m10 http://10.96.0.12/")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := (testutil.Place{NS: r.App, Cgroup: r.Scope}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, errs.String())
	}
	want, err := exec.Command("sh", "-c", "id -u nobody; id -g nobody; id -G nobody").Output()
	if err != nil {
		t.Fatal(err)
	}
	none := "0000000000000000"
	if got := out.String(); got != string(want)+"CapEff:\t"+none+"\nCapPrm:\t"+none+"\nfar" {
		t.Errorf("it says %q", got)
	}
	traceless(t, r, bpffs)
}

// TestExecDaemon leaves a process behind: exec ends with its command, says so,
// and the process goes on uncaptured.
func TestExecDaemon(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "setsid")
	r, bpffs := rig.New(t), ownBPFFS(t)
	pid := filepath.Join(t.TempDir(), "pid")
	cmd := execCommand(t, r, bpffs, nil, "sh", "-c", `setsid sleep 1000 </dev/null >/dev/null 2>&1 & echo $! >"$0"; exit 5`, pid)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := (testutil.Place{NS: r.App, Cgroup: r.Scope}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	if got := cmd.ProcessState.ExitCode(); got != 5 {
		t.Errorf("exit code %d, want 5\n%s", got, errs.String())
	}
	b, err := os.ReadFile(pid)
	if err != nil {
		t.Fatal(err)
	}
	daemon := strings.TrimSpace(string(b))
	if !strings.Contains(errs.String(), daemon) {
		t.Errorf("it does not tell of process %s: %q", daemon, errs.String())
	}
	pids, err := r.Scope.Pids()
	if err != nil || !slices.Contains(pids, daemon) {
		t.Errorf("processes %v (%v), want %s among them", pids, err, daemon)
	}
	traceless(t, r, bpffs)
}

// startExec starts an exec whose command waits, and returns it with the process
// number of its command.
func startExec(t *testing.T, r *rig.Rig, bpffs, name string) (*exec.Cmd, int) {
	t.Helper()
	cmd := execCommand(t, r, bpffs, []string{"--name", name}, "sh", "-c", "echo $$; exec sleep 1000")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := (testutil.Place{NS: r.App, Cgroup: r.Scope}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	go io.Copy(io.Discard, out)
	t.Cleanup(func() {
		// Its command, and it with it.
		unix.Kill(pid, unix.SIGKILL)
		cmd.Wait()
	})
	return cmd, pid
}

// TestExecSweep kills an exec. The next one takes away what it left, but not
// while its command lives, and never what belongs to a live one.
func TestExecSweep(t *testing.T) {
	r, bpffs := rig.New(t), ownBPFFS(t)
	next := func() {
		t.Helper()
		cmd := execCommand(t, r, bpffs, nil, "true")
		var errs bytes.Buffer
		cmd.Stderr = &errs
		if err := (testutil.Place{NS: r.App, Cgroup: r.Scope}).Start(cmd); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the next exec: %v\n%s", err, errs.String())
		}
	}
	// left tells what of an instance there is.
	left := func(name string) (pins, cgroup bool) {
		_, err := os.Stat(filepath.Join(bpffs, "pillion", name))
		_, err2 := os.Stat(filepath.Join(r.Scope.Path, "pillion-"+name))
		return err == nil, err2 == nil
	}
	routes := func() int {
		return strings.Count(inside(t, r.App, "ip", "-4", "route", "show", "table", "local"), "240.") +
			strings.Count(inside(t, r.App, "ip", "-6", "route", "show", "table", "local"), "fd70:696c:6c69")
	}
	startExec(t, r, bpffs, "live")
	dead, command := startExec(t, r, bpffs, "dead")
	dead.Process.Kill()
	dead.Process.Wait()
	next()
	if pins, cgroup := left("dead"); !pins || !cgroup {
		t.Errorf("its command lives, and yet it was swept: pins %v, cgroup %v", pins, cgroup)
	}
	unix.Kill(command, unix.SIGKILL)
	testutil.Eventually(t, rig.Limit, func() bool { return unix.Kill(command, 0) != nil || zombie(command) }, "the command is gone")
	next()
	if pins, cgroup := left("dead"); pins || cgroup {
		t.Errorf("not swept: pins %v, cgroup %v", pins, cgroup)
	}
	if _, err := os.Stat(filepath.Join(r.Runtime, "dead.sock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its socket is left: %v", err)
	}
	if pins, cgroup := left("live"); !pins || !cgroup {
		t.Errorf("a live one was swept: pins %v, cgroup %v", pins, cgroup)
	}
	if got := routes(); got != 2 {
		t.Errorf("%d routes, want the two of the live one", got)
	}
}

func zombie(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err != nil || strings.Contains(string(b), ") Z ")
}
