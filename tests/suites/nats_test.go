package suites

import (
	"bufio"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// dialog is a program that is told what to do on stdin and tells on stdout what
// happened.
type dialog struct {
	in   io.WriteCloser
	out  *bufio.Scanner
	end  func() error // waits until it ends, with no more input
	kill func()
	said []string
}

// start starts a program as an application. It ends when the test does at the
// latest.
func start(t testing.TB, r *rig.Rig, name string, args ...string) *dialog {
	t.Helper()
	cmd := r.Command(name, args...)
	var errs rig.Log
	cmd.Stderr = &errs
	in, out := testutil.Pipes(t, cmd)
	if err := r.Start(cmd); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(appLimit, func() { cmd.Process.Kill() })
	d := &dialog{in: in, out: bufio.NewScanner(out)}
	d.out.Buffer(nil, 1<<20)
	ended := false
	d.end = func() error {
		if ended {
			return nil
		}
		ended = true
		late.Stop()
		in.Close()
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("%w: %s", err, errs.String())
		}
		return nil
	}
	d.kill = func() {
		if !ended {
			cmd.Process.Kill()
			d.end()
		}
	}
	t.Cleanup(d.kill)
	return d
}

// say writes a line.
func (d *dialog) say(t testing.TB, format string, args ...any) {
	t.Helper()
	if _, err := fmt.Fprintf(d.in, format+"\n", args...); err != nil {
		t.Fatal(err)
	}
}

// hear keeps the program's lines up to the one that starts so.
func (d *dialog) hear(t testing.TB, prefix string) {
	t.Helper()
	for d.out.Scan() {
		d.said = append(d.said, d.out.Text())
		if strings.HasPrefix(d.out.Text(), prefix) {
			return
		}
	}
	t.Fatalf("the program ended before it said %q: %v\n%v", prefix, d.end(), d.said[max(0, len(d.said)-20):])
}

// TestNATS has a client whose server ends and starts again, by itself and
// without its knowing.
func TestNATS(t *testing.T) {
	r := rig.New(t)
	at := at4(4222)
	r.Give(t, at.Addr())
	// The server of the moment; a new one is up when it returns.
	serve := func(t testing.TB, stop unix.Signal) (end func()) {
		return r.Daemon(t, exec.Command(tool(t, "nats-server"), "-a", at.Addr().String(), "-p", fmt.Sprint(at.Port())), stop, at)
	}
	messages, rounds := amount(1000, 20_000), amount(3, 12)
	twice(t, r, 1+rounds, func(t testing.TB) []string {
		end := serve(t, unix.SIGTERM)
		d := start(t, r, tool(t, "natsclient"), fmt.Sprintf("nats://%s", at))
		d.hear(t, "connected")
		for round := range rounds {
			d.say(t, "publish %d", messages)
			d.hear(t, fmt.Sprintf("got line %d", messages-1))
			d.say(t, "request %d", messages/10)
			d.hear(t, fmt.Sprintf("answer REQUEST %d", messages/10-1))
			d.say(t, "bytes %d", 1<<20)
			d.hear(t, fmt.Sprintf("got %d bytes", 1<<20))
			end()
			d.hear(t, "disconnected")
			end = serve(t, []unix.Signal{unix.SIGTERM, unix.SIGKILL}[round%2])
			d.hear(t, "reconnected")
		}
		if err := d.end(); err != nil {
			t.Errorf("natsclient: %v", err)
		}
		end()
		if want := 1 + rounds*(messages+messages/10+3); len(d.said) != want {
			t.Errorf("%d events, want %d", len(d.said), want)
		}
		return slices.Clone(d.said)
	})
}
