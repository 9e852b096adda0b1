package rig

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/testutil"
)

// stopLimit is how long a server has to end by itself.
const stopLimit = 5 * time.Second

// Give gives the world an address, if it has not got it.
func (r *Rig) Give(t testing.TB, addr netip.Addr) {
	t.Helper()
	r.World.Do(t, func() error { return addAddr(addr) })
}

// Listen listens in the world. The address is added if it is missing, unless it
// is the unspecified one, which is all that the world has. Port 0 is a free one.
// The caller accepts; the listener is closed at the end of the test at the
// latest.
func (r *Rig) Listen(t testing.TB, addr netip.AddrPort) net.Listener {
	t.Helper()
	if !addr.Addr().IsUnspecified() {
		r.Give(t, addr.Addr())
	}
	var ln net.Listener
	r.World.Do(t, func() (err error) {
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(context.Background(), "tcp", addr.String())
		return err
	})
	t.Cleanup(func() { ln.Close() })
	return ln
}

// ServeHTTP runs an HTTP server in the world until the end of the test. The
// address is as in [Rig.Listen].
func (r *Rig) ServeHTTP(t testing.TB, addr netip.AddrPort, h http.Handler) {
	t.Helper()
	ln := r.Listen(t, addr)
	s := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	done := make(chan error)
	go func() { done <- s.Serve(ln) }()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
}

// Process is a program that runs beside the test, in a cgroup of its own.
type Process struct {
	Cmd   *exec.Cmd
	Log   *Log
	home  *testutil.Cgroup
	stop  os.Signal
	ended chan struct{}
}

// StartProcess starts a program in a namespace. At the end of the test it is
// told to end by stop, and killed with all its children if it does not.
func StartProcess(t testing.TB, ns *testutil.NS, cmd *exec.Cmd, stop os.Signal) *Process {
	t.Helper()
	p := &Process{Cmd: cmd, Log: &Log{}, home: testutil.NewCgroup(t), stop: stop, ended: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = p.Log, p.Log
	if err := (testutil.Place{NS: ns, Cgroup: p.home}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	go func() {
		cmd.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() {
		p.End(t)
		if t.Failed() {
			t.Logf("log of %s:\n%s", cmd.Path, p.Log)
		}
	})
	return p
}

// End tells the process to end, and kills it with all its children if it does
// not. One that has ended is no error.
func (p *Process) End(t testing.TB) {
	t.Helper()
	p.Cmd.Process.Signal(p.stop)
	select {
	case <-p.ended:
	case <-time.After(stopLimit):
	}
	p.Kill(t)
}

// Kill ends the process and its children without their knowing, and waits until
// they are gone. One that has ended is no error.
func (p *Process) Kill(t testing.TB) {
	t.Helper()
	if err := p.home.Kill(); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	<-p.ended
}

// Freeze keeps the process and its children from running, or lets them again.
func (p *Process) Freeze(t testing.TB, frozen bool) {
	t.Helper()
	text := "0"
	if frozen {
		text = "1"
	}
	if err := os.WriteFile(filepath.Join(p.home.Path, "cgroup.freeze"), []byte(text), 0); err != nil {
		t.Fatal(err)
	}
}

// Running ends the test if the process has ended.
func (p *Process) Running(t testing.TB) {
	t.Helper()
	select {
	case <-p.ended:
		t.Fatalf("%s ended: %s\n%s", p.Cmd.Path, p.Cmd.ProcessState, p.Log)
	default:
	}
}

// Daemon runs a server in the world until the end of the test, and waits until
// it listens on addr. It is then told to end by stop, and killed with all its
// children if it does not. What it returns ends it before.
func (r *Rig) Daemon(t testing.TB, cmd *exec.Cmd, stop os.Signal, addr netip.AddrPort) (end func()) {
	t.Helper()
	p := StartProcess(t, r.World, cmd, stop)
	testutil.Eventually(t, Limit, func() bool {
		p.Running(t)
		return r.World.Run(func() error {
			c, err := net.Dial("tcp", addr.String())
			if err != nil {
				return err
			}
			return c.Close()
		}) == nil
	}, cmd.Path, " listens on ", addr, "\n", p.Log)
	return func() { p.End(t) }
}

// Dir makes a directory that a user other than root can reach, and gives it to
// that user. It ends with the test.
func Dir(t testing.TB, uid, gid int) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, uid, gid); err != nil {
		t.Fatal(err)
	}
	return dir
}
