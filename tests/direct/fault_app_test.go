package direct

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// acting is what an application does: each line from stdin is an expression or a
// statement, and its value or its error one line of stdout.
const acting = `
import errno, os, socket, struct, sys
from socket import *
kept = {}

def dial(a, port, name=None, opts=(), wait=20):
    "what connect says; a connection with a name is kept"
    s = socket(AF_INET6 if ":" in a else AF_INET, SOCK_STREAM)
    for level, option, value in opts: s.setsockopt(level, option, value)
    try:
        s.settimeout(wait)
        s.connect((a, port))
        if name is not None: kept[name] = s
        return "ok"
    except TimeoutError: return "ETIMEDOUT"
    except OSError as e: return errno.errorcode[e.errno]
    finally:
        if name not in kept: s.close()

def ask(name):
    "whether a connection still serves"
    try:
        kept[name].sendall(b"s")
        return kept[name].recv(5).decode() or "EOF"
    except OSError as e: return errno.errorcode.get(e.errno, str(e))

def peer(name): return "%s %d" % kept[name].getpeername()[:2]
def source(name): return kept[name].getsockname()[1]
def cookie(name): return int.from_bytes(kept[name].getsockopt(SOL_SOCKET, 57, 8), sys.byteorder)
def drop(name): kept.pop(name).close()

print("here", flush=True)
for line in sys.stdin:
    try:
        try: v = eval(line)
        except SyntaxError: v = exec(line)
    except Exception as e: v = "%s: %s" % (type(e).__name__, e)
    print(str(v).replace("\n", " "), flush=True)
`

// app is an application that does what it is told.
type app struct {
	t   testing.TB
	in  io.WriteCloser
	out *bufio.Reader
	err rig.Log
}

// newApp starts an application. It ends with the test.
func newApp(t testing.TB, place testutil.Place) *app {
	t.Helper()
	testutil.Need(t, "python3")
	// What is in PATH may be a shell script that takes its time.
	python, err := exec.Command("python3", "-c", "import sys; print(sys.executable)").Output()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(strings.TrimSpace(string(python)), "-c", acting)
	a := &app{t: t}
	cmd.Stderr = &a.err
	in, out := testutil.Pipes(t, cmd)
	a.in = in
	a.out = bufio.NewReader(out)
	if err := place.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.in.Close()
		cmd.Wait()
	})
	if got := a.line(); got != "here" {
		t.Fatalf("application: %q\n%s", got, a.err.String())
	}
	return a
}

// captive starts an application in the scope of a rig.
func captive(t testing.TB, r *rig.Rig) *app {
	t.Helper()
	return newApp(t, testutil.Place{NS: r.App, Cgroup: r.Scope})
}

func (a *app) line() string {
	a.t.Helper()
	text, err := a.out.ReadString('\n')
	if err != nil {
		a.t.Fatalf("application: %v\n%s", err, a.err.String())
	}
	return strings.TrimSpace(text)
}

// do has the application do something, and returns the value of it.
func (a *app) do(format string, args ...any) string {
	a.t.Helper()
	fmt.Fprintf(a.in, format+"\n", args...)
	return a.line()
}

// wants fails the test unless what the application does has this value.
func (a *app) wants(want, format string, args ...any) {
	a.t.Helper()
	if got := a.do(format, args...); got != want {
		a.t.Errorf("%s: %q, want %q", fmt.Sprintf(format, args...), got, want)
	}
}

// crowd is applications that connect to a service all the time.
type crowd struct {
	t       testing.TB
	cmds    []*exec.Cmd
	stops   []io.Closer
	outputs []*strings.Builder
	errs    []*rig.Log
}

// press starts n of them. The caller ends them by end.
func press(t testing.TB, r *rig.Rig, program string, n int, service netip.AddrPort) *crowd {
	t.Helper()
	l := &crowd{t: t}
	family := "4"
	if service.Addr().Is6() {
		family = "6"
	}
	for range n {
		cmd := r.Command(program, "load", family, fmt.Sprint(service.Port()), service.Addr().String())
		out, log := &strings.Builder{}, &rig.Log{}
		cmd.Stdout, cmd.Stderr = out, log
		stop, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Start(cmd); err != nil {
			t.Fatal(err)
		}
		l.cmds, l.stops, l.outputs, l.errs = append(l.cmds, cmd), append(l.stops, stop), append(l.outputs, out), append(l.errs, log)
	}
	return l
}

// end ends them, fails the test if any connection failed, and returns how many
// there were.
func (l *crowd) end() (done int) {
	l.t.Helper()
	for n, cmd := range l.cmds {
		l.stops[n].Close()
		if err := cmd.Wait(); err != nil {
			l.t.Errorf("load: %v", err)
			continue
		}
		text, failed, _ := strings.Cut(strings.TrimSpace(l.outputs[n].String()), " ")
		if failed != "0" {
			l.t.Errorf("of %s connections %s failed:\n%s", text, failed, l.errs[n])
		}
		k, err := strconv.Atoi(text)
		if err != nil {
			l.t.Error(err)
		}
		done += k
	}
	return done
}

// addrs are ports of an address.
func addrs(a netip.Addr, ports ...uint16) (all []netip.AddrPort) {
	for _, p := range ports {
		all = append(all, netip.AddrPortFrom(a, p))
	}
	return all
}

// put replaces a file of endpoints in one step.
func put(t testing.TB, path string, endpoints ...netip.AddrPort) {
	t.Helper()
	targets := make([]string, len(endpoints))
	for n, e := range endpoints {
		targets[n] = e.String()
	}
	text, err := json.Marshal([]any{map[string]any{"targets": targets}})
	if err != nil {
		t.Fatal(err)
	}
	replace(t, path, string(text))
}

// replace replaces a file in one step.
func replace(t testing.TB, path, text string) {
	t.Helper()
	next := filepath.Join(filepath.Dir(path), ".next")
	if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, path); err != nil {
		t.Fatal(err)
	}
}

// logged reads a flow log.
func logged(t testing.TB, path string) (all []flow.Record) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for d := json.NewDecoder(f); ; {
		var r flow.Record
		err := d.Decode(&r)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return all // who was killed may have written half a line
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
}
