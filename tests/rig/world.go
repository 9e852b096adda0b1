package rig

import (
	"context"
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

// Daemon runs a server in the world until the end of the test, and waits until
// it listens on addr. It is then told to end by stop, and killed with all its
// children if it does not.
func (r *Rig) Daemon(t testing.TB, cmd *exec.Cmd, stop os.Signal, addr netip.AddrPort) {
	t.Helper()
	home := testutil.NewCgroup(t)
	log := &Log{}
	cmd.Stdout, cmd.Stderr = log, log
	if err := (testutil.Place{NS: r.World, Cgroup: home}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		cmd.Process.Signal(stop)
		select {
		case <-ended:
		case <-time.After(stopLimit):
		}
		if err := home.Kill(); err != nil {
			t.Error(err)
		}
		<-ended
		if t.Failed() {
			t.Logf("log of %s:\n%s", cmd.Path, log)
		}
	})
	testutil.Eventually(t, Limit, func() bool {
		select {
		case <-ended:
			t.Fatalf("%s ended: %s\n%s", cmd.Path, cmd.ProcessState, log)
		default:
		}
		return r.World.Run(func() error {
			c, err := net.Dial("tcp", addr.String())
			if err != nil {
				return err
			}
			return c.Close()
		}) == nil
	}, cmd.Path, " listens on ", addr, "\n", log)
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
