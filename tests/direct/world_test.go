package direct

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// appLimit is how long an application may take.
const appLimit = 90 * time.Second

// talk are the steps of an application that has a word echoed, and talked what
// it sees.
const (
	talk    = "connect send=hello recv"
	talked  = "connect=0, send=5, recv=5 hello"
	refused = "connect=-1 ECONNREFUSED"
)

// mapped is an IPv4 address and a port as sockets of IPv6 have them.
func mapped(at netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(at.Addr().As16()), at.Port())
}

// at reads an address with its port.
func at(text string) netip.AddrPort { return netip.MustParseAddrPort(text) }

// world is a rig with the application of package connect.
type world struct {
	*rig.Rig
	app string
}

func newWorld(t testing.TB) *world {
	t.Helper()
	testutil.Need(t, "gcc")
	w := &world{Rig: rig.New(t), app: filepath.Join(t.TempDir(), "app")}
	out, err := exec.Command("gcc", "-O1", "-Wall", "-Werror", "-pthread", "-o", w.app, "../connect/testdata/app.c").CombinedOutput()
	if err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	return w
}

// echo sends back what it gets, and ends when the client does.
func echo(c net.Conn) { io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) }

// command runs a program in a namespace. It must succeed.
func (w *world) command(t testing.TB, ns *testutil.NS, name string, args ...string) {
	t.Helper()
	testutil.Need(t, name)
	cmd := exec.Command(name, args...)
	var log rig.Log
	cmd.Stdout, cmd.Stderr = &log, &log
	err := ns.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, log.String())
	}
}

// with starts Pillion, which must end as quiet as it begins.
func (w *world) with(t testing.TB, config string) *rig.Instance {
	t.Helper()
	i := w.Run(t, config)
	return i
}

// run has an application do its steps, and returns what it saw, a call after the
// other, and how it failed.
func (w *world) run(limit time.Duration, to netip.AddrPort, steps string) (string, error) {
	cmd := exec.Command(w.app, append([]string{to.Addr().String(), fmt.Sprint(to.Port())}, strings.Fields(steps)...)...)
	var out, errs rig.Log
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := w.Start(cmd); err != nil {
		return "", err
	}
	late := time.AfterFunc(limit, func() { cmd.Process.Kill() })
	err := cmd.Wait()
	late.Stop()
	if err != nil {
		err = fmt.Errorf("%s to %s: %w: %s", steps, to, err, errs.String())
	}
	var calls []string
	for lines := bufio.NewScanner(strings.NewReader(out.String())); lines.Scan(); {
		var r struct {
			Call, Errno, Note string
			Ret               int
		}
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return "", fmt.Errorf("%q: %w", lines.Text(), err)
		}
		calls = append(calls, strings.Join(strings.Fields(fmt.Sprintf("%s=%d %s %s", r.Call, r.Ret, r.Errno, r.Note)), " "))
	}
	return strings.Join(calls, ", "), err
}

// do is run for steps that end.
func (w *world) do(t testing.TB, to netip.AddrPort, steps string) string {
	t.Helper()
	saw, err := w.run(appLimit, to, steps)
	if err != nil {
		t.Error(err)
	}
	return saw
}

// wants fails the test unless an application sees this.
func (w *world) wants(t testing.TB, to netip.AddrPort, steps, want string) {
	t.Helper()
	if saw := w.do(t, to, steps); saw != want {
		t.Errorf("%s to %s: %s, want %s", steps, to, saw, want)
	}
}

// nobody waits until no endpoint has an open connection.
func nobody(t testing.TB, i *rig.Instance) {
	t.Helper()
	live := map[string]int64{}
	testutil.Eventually(t, rig.Limit, func() bool {
		s, err := i.Status(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		clear(live)
		for _, service := range s.Services {
			for _, e := range service.Endpoints {
				if e.Live != 0 {
					live[service.Address+" at "+e.Address] = e.Live
				}
			}
		}
		return len(live) == 0
	}, "no endpoint has a connection, still: ", live)
}

// recordsOf waits until so many connections to an address have ended, and returns
// their records, oldest first.
func recordsOf(t testing.TB, i *rig.Instance, to netip.AddrPort, want int) []flow.Record {
	t.Helper()
	var of []flow.Record
	testutil.Eventually(t, rig.Limit, func() bool {
		all, err := i.Flows(context.Background(), admin.FlowQuery{})
		if err != nil {
			t.Fatal(err)
		}
		of = of[:0]
		for _, r := range all {
			if r.OrigDst == netip.AddrPortFrom(to.Addr().Unmap(), to.Port()) {
				of = append(of, r)
			}
		}
		return len(of) >= want
	}, "ended connections to ", to, ": want ", want)
	if len(of) != want {
		t.Errorf("%d connections to %s, want %d: %+v", len(of), to, want, of)
	}
	return of
}

// answer has a server say who it is, and wait for the client's end.
func answer(who string) func(net.Conn) {
	return func(c net.Conn) {
		io.WriteString(c, who)
		io.Copy(io.Discard, c)
	}
}
