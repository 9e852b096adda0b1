package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// killedBy is the signal that ended a process; 0: it ended by itself.
func killedBy(err error) syscall.Signal {
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			return status.Signal()
		}
	}
	return 0
}

// TestSecondSignal ends a run that drains, and whose application does not let go, with a
// second SIGTERM.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	i := g.Run(t, "", "--drain-timeout", "1h")
	s := newSession(t, g.Rig, g.at4)
	i.Signal(t, unix.SIGTERM)
	testutil.Eventually(t, rig.Limit, func() bool { return strings.Contains(i.Log(), "draining") }, "it drains")
	i.Signal(t, unix.SIGTERM)
	if err := i.Wait(t); killedBy(err) != unix.SIGTERM {
		t.Errorf("run: %v, want the end by the signal", err)
	}
	s.end()
}

// TestSignalledStart tells a run to end while it starts, at several moments. It does, and
// leaves nothing.
func TestSignalledStart(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	config := filepath.Join(t.TempDir(), "config.yaml")
	// Its source never answers, so that the start takes ten seconds.
	text := "services: [{name: a, address: 10.96.0.1:80, discover: {dns: {name: a.example., port: 80, servers: [\"203.0.113.66:53\"]}}}]"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, after := range []time.Duration{0, 30 * time.Millisecond, 600 * time.Millisecond} {
		name := fmt.Sprintf("early-%d-%d", os.Getpid(), after)
		cmd := exec.Command(rig.Binary(t), "run", "--cgroup", r.Scope.Path, "--config", config, "--name", name, "--runtime-dir", r.Runtime)
		var log rig.Log
		cmd.Stdout, cmd.Stderr = &log, &log
		if err := r.App.Start(cmd); err != nil {
			t.Fatal(err)
		}
		time.Sleep(after)
		cmd.Process.Signal(unix.SIGTERM)
		late := time.AfterFunc(rig.Limit, func() { cmd.Process.Kill() })
		err := cmd.Wait()
		late.Stop()
		// It ends by the signal where there was nothing to undo yet.
		if err != nil && killedBy(err) != unix.SIGTERM {
			t.Errorf("told to end after %v: %v\n%s", after, err, &log)
		}
		if strings.Contains(log.String(), "ready") {
			t.Errorf("told to end after %v, it says that it is ready:\n%s", after, &log)
		}
		gone(t, r, name)
		r.Pillion(t, "unload", name)
	}
}

// TestNobodyReadsLog has whoever read a run's log go away: no line of it is worth the
// connections.
func TestNobodyReadsLog(t *testing.T) {
	t.Parallel()
	g := newGround(t)
	// The shell's reader ends after the first line.
	g.Wrap = []string{"bash", "-c", `exec "$@" 2> >(head -n 1 >/dev/null)`, "bash"}
	i := g.Run(t, "")
	for range 3 {
		if _, err := i.Reload(context.Background()); err != nil { // which is logged
			t.Fatalf("reload: %v", err)
		}
	}
}

// TestNotNotified has a run start beside a service manager that is not there.
func TestNotNotified(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	r.Env = []string{"NOTIFY_SOCKET=" + filepath.Join(t.TempDir(), "nobody"), "WATCHDOG_USEC=200000"}
	r.Run(t, "")
}

// TestInterrupted interrupts a command that waits for its input.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	for _, sig := range []unix.Signal{unix.SIGINT, unix.SIGTERM} {
		cmd := exec.Command(rig.Binary(t), "inject", "-f", "-")
		in, err := cmd.StdinPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		// It reads when it has taken what a pipe does not hold.
		if _, err := io.WriteString(in, strings.Repeat("# comment\n", 20000)); err != nil {
			t.Fatal(err)
		}
		cmd.Process.Signal(sig)
		late := time.AfterFunc(rig.Limit, func() { cmd.Process.Kill() })
		err = cmd.Wait()
		late.Stop()
		in.Close()
		if killedBy(err) != sig {
			t.Errorf("%v: %v", sig, err)
		}
	}
}

// TestHangup has exec run with hang-ups ignored, as nohup does: its command ignores them
// too.
func TestHangup(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	cmd := exec.Command("nohup", rig.Binary(t), "exec", "--runtime-dir", r.Runtime, "--", "sh", "-c", "echo there; read line; echo $line")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = r.App.Start(cmd)
	}
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	if n, err := out.Read(buf); string(buf[:n]) != "there\n" {
		t.Fatalf("%q %v", buf[:n], err)
	}
	cmd.Process.Signal(unix.SIGHUP)
	time.Sleep(50 * time.Millisecond) // else a wrong one may come too late to be seen
	io.WriteString(in, "still\n")
	in.Close()
	all, _ := io.ReadAll(out)
	if err := cmd.Wait(); err != nil || string(all) != "still\n" {
		t.Errorf("%q, %v", all, err)
	}
}

// TestLogNotRead has whoever is to read a run's log not do so: changes of the configuration
// are taken, and it ends when it is told to.
func TestLogNotRead(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	config := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(config, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("unread-%d", os.Getpid())
	cmd := exec.Command(rig.Binary(t), "run", "--cgroup", r.Scope.Path, "--config", config, "--name", name, "--runtime-dir", r.Runtime)
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if _, err := unix.FcntlInt(writer.Fd(), unix.F_SETPIPE_SZ, 4096); err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = writer
	err = r.App.Start(cmd)
	writer.Close()
	if err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(2*rig.Limit, func() { cmd.Process.Kill() })
	defer late.Stop()
	client := admin.Dial(filepath.Join(r.Runtime, name+".sock"))
	testutil.Eventually(t, rig.Limit, func() bool { return client.Ready(context.Background()) == nil }, "it is ready")
	for n := range 60 { // more lines than the pipe holds
		if _, err := client.Reload(context.Background()); err != nil {
			t.Errorf("reload %d: %v", n, err)
			break
		}
	}
	cmd.Process.Signal(unix.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("run: %v", err)
	}
	r.Pillion(t, "unload", name)
}

// TestNotSaved has no place for the flows of a command: that is none of its failures.
func TestNotSaved(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	if err := os.MkdirAll(r.Runtime, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.Runtime, "ended"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	out, errs, err := r.Exec(t, nil, "echo", "well")
	if err != nil || out != "well\n" || !strings.Contains(errs, "flows") {
		t.Errorf("%v: %q %q, want what the command says, and a word of the flows", err, out, errs)
	}
}
