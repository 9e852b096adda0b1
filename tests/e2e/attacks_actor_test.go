package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// actor is a process that does what it is told: an application, another
// container, or somebody from outside.
type actor struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
	err rig.Log
}

// acting is what an actor runs: each line from stdin is an expression or a
// statement, and its value or its error one line of stdout.
const acting = `
import array, ctypes, errno, os, select, struct, sys, time, socket as so
from socket import *
IP_FREEBIND, IP_TRANSPARENT, IPV6_FREEBIND, IPV6_TRANSPARENT = 15, 19, 78, 75
kept = []

def family(a): return AF_INET6 if ":" in a else AF_INET

def new(a, kind=SOCK_STREAM, opts=()):
    s = so.socket(family(a), kind)
    s.settimeout(10)
    for level, name, value in opts: s.setsockopt(level, name, value)
    return s

def dial(a, port, kind=SOCK_STREAM, opts=(), source=None, keep=False):
    "what connect says, and then the first line of the server"
    s = new(a, kind, opts)
    try:
        if source: s.bind(source)
        s.connect((a, port))
        if keep:
            kept.append(s)
            return "ok"
        if kind == SOCK_DGRAM:
            s.send(b"x")
            s.settimeout(0.2)
        return s.makefile("rb").readline().decode().strip() if kind == SOCK_STREAM else s.recv(100).decode()
    except TimeoutError: return "timeout"
    except OSError as e: return errno.errorcode[e.errno]
    finally:
        if not keep: s.close()

def begin(a, port, opts=(), source=None):
    "a connect that does not wait: ok when it is on its way"
    s = new(a, SOCK_STREAM, opts)
    s.setblocking(False)
    if source: s.bind(source)
    e = s.connect_ex((a, port))
    if e in (0, errno.EINPROGRESS):
        kept.append(s)
        return "ok"
    s.close()
    return errno.errorcode[e]

def peer(s):
    try: return s.getpeername()[0]
    except OSError as e: return errno.errorcode[e.errno]

def bind(a, port, kind=SOCK_STREAM, opts=()):
    s = new(a, kind, opts)
    try:
        s.bind((a, port))
        if kind == SOCK_STREAM: s.listen()
        kept.append(s)
        return "ok"
    except OSError as e: return errno.errorcode[e.errno]

def tell(a, port):
    "an unconnected datagram"
    s = new(a, SOCK_DGRAM)
    try:
        s.sendto(b"x", (a, port))
        return "ok"
    except OSError as e: return errno.errorcode[e.errno]
    finally: s.close()

def ask(s, text="ping"):
    try:
        s.sendall(text.encode() + b"\n")
        got = b""
        while not got.endswith(b"\n"):
            b = s.recv(1000)
            if not b: return "EOF"
            got += b
        return got.decode().split("\n")[-2]
    except OSError as e: return errno.errorcode.get(e.errno, str(e))

def attempts(addrs, port):
    "connects to all of them at once, and lets go"
    n = {}
    for a in addrs:
        s = so.socket(family(a), SOCK_STREAM)
        s.setblocking(False)
        e = s.connect_ex((a, port))
        n[errno.errorcode.get(e, "ok")] = n.get(errno.errorcode.get(e, "ok"), 0) + 1
        s.close()
    return n

def let_go():
    for s in kept: s.close()
    kept.clear()

print("here", flush=True)
for line in sys.stdin:
    try:
        try: v = eval(line)
        except SyntaxError: v = exec(line)
    except Exception as e: v = "%s: %s" % (type(e).__name__, e)
    print(str(v).replace("\n", " "), flush=True)
`

// newActor starts an actor. It ends with the test.
func newActor(t testing.TB, place testutil.Place, attr *syscall.SysProcAttr) *actor {
	t.Helper()
	testutil.Need(t, "python3")
	python, err := exec.Command("python3", "-c", "import sys; print(sys.executable)").Output()
	if err != nil {
		t.Fatal(err)
	}
	a := &actor{t: t, cmd: exec.Command(strings.TrimSpace(string(python)), "-c", acting)}
	a.cmd.Stderr, a.cmd.SysProcAttr = &a.err, attr
	in, out := testutil.Pipes(t, a.cmd)
	a.in = in
	a.out = bufio.NewReader(out)
	if err := place.Start(a.cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.end)
	if got := a.line(); got != "here" {
		t.Fatalf("actor: %q\n%s", got, a.err.String())
	}
	return a
}

// captive starts an application in a container of its own, or in the scope itself.
func captive(t testing.TB, r *rig.Rig, container *testutil.Cgroup) *actor {
	t.Helper()
	if container == nil {
		container = r.Scope
	}
	return newActor(t, testutil.Place{NS: r.App, Cgroup: container}, nil)
}

// outsider starts a process beside the applications, but not in the scope.
func outsider(t testing.TB, r *rig.Rig) *actor {
	t.Helper()
	return newActor(t, testutil.Place{NS: r.App}, nil)
}

func (a *actor) line() string {
	text, err := a.out.ReadString('\n')
	if err != nil {
		a.t.Fatalf("actor: %v\n%s", err, a.err.String())
	}
	return strings.TrimSpace(text)
}

// do has the actor do something, and returns the value of it.
func (a *actor) do(format string, args ...any) string {
	a.t.Helper()
	a.start(format, args...)
	return a.line()
}

// start has the actor do something; line is the end of it.
func (a *actor) start(format string, args ...any) {
	fmt.Fprintf(a.in, format+"\n", args...)
}

// wants ends the test unless what the actor does has this value.
func (a *actor) wants(want, format string, args ...any) {
	a.t.Helper()
	if got := a.do(format, args...); got != want {
		a.t.Fatalf("%s: %q, want %q", fmt.Sprintf(format, args...), got, want)
	}
}

// number is do for a value that is a number.
func (a *actor) number(format string, args ...any) int {
	a.t.Helper()
	text := a.do(format, args...)
	n, err := strconv.Atoi(text)
	if err != nil {
		a.t.Fatalf("%s: %q, want a number", fmt.Sprintf(format, args...), text)
	}
	return n
}

// learn teaches the actor what to do.
func (a *actor) learn(code string, args ...any) {
	a.t.Helper()
	a.wants("None", "exec(%q, globals())", fmt.Sprintf(code, args...))
}

// drop makes the actor a user without any right.
func (a *actor) drop() {
	a.t.Helper()
	a.wants("None", "(os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534))[0]")
}

func (a *actor) end() {
	a.in.Close()
	if a.cmd.ProcessState == nil {
		a.cmd.Wait()
	}
}

// named is a server that says its name, and then repeats what it hears.
func named(name string) func(net.Conn) {
	return func(c net.Conn) {
		fmt.Fprintf(c, "%s\n", name)
		io.Copy(c, c)
	}
}

// slotRange is the slots of an instance.
type slotRange struct{ v4, v6 netip.Prefix }

func slotsAt(t testing.TB, i *rig.Instance) slotRange {
	t.Helper()
	s, err := i.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return slotRange{netip.MustParsePrefix(s.Slots4), netip.MustParsePrefix(s.Slots6)}
}

// forms returns slot n as applications may write it.
func (r slotRange) forms(n uint16) []string {
	four, six := r.v4.Addr().As4(), r.v6.Addr().As16()
	four[2], four[3] = byte(n>>8), byte(n)
	six[14], six[15] = byte(n>>8), byte(n)
	v4 := netip.AddrFrom4(four).String()
	return []string{v4, netip.AddrFrom16(six).String(), "::ffff:" + v4}
}

// pinned opens a map of an instance. The caller closes it.
func pinned(t testing.TB, i *rig.Instance, name string) *ebpf.Map {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join("/sys/fs/bpf/pillion", i.Name, name), nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// slotFor returns the number of the slot that an address has.
func slotFor(t testing.TB, i *rig.Instance, orig netip.Addr) uint16 {
	t.Helper()
	m := pinned(t, i, "slot_by_orig")
	defer m.Close()
	var n uint32
	if err := m.Lookup(bpf.FromAddr(orig), &n); err != nil {
		t.Fatalf("slot of %s: %v", orig, err)
	}
	return uint16(n)
}

// usageOf returns the account of a container, empty if there is none.
func usageOf(t testing.TB, i *rig.Instance, container *testutil.Cgroup) bpf.Usage {
	t.Helper()
	m := pinned(t, i, "usage_by_group")
	defer m.Close()
	var u bpf.Usage
	_ = m.Lookup(container.ID, &u)
	return u
}

// stale waits until the hooks take a process that has been stopped for hung.
func stale(t testing.TB, i *rig.Instance) {
	t.Helper()
	m := pinned(t, i, "beat")
	defer m.Close()
	testutil.Eventually(t, rig.Limit, func() bool {
		var b bpf.Beat
		if err := m.Lookup(uint32(0), &b); err != nil {
			t.Fatal(err)
		}
		return uint64(now()) > b.Stamp+b.MaxAge
	}, "the last sign of life is too old")
}

// counted tells how much the counters of some reasons have grown since before,
// and fails the test unless it is that.
func counted(t testing.TB, i *rig.Instance, before map[string]uint64, want map[string]uint64) {
	t.Helper()
	after := i.Reasons(t)
	for name, n := range want {
		if got := after[name] - before[name]; got != n {
			t.Errorf("%s: %d more, want %d", name, got, n)
		}
	}
}

// arrived is how many connections the handler has ever carried: none of its own
// tests is among them.
func arrived(t testing.TB, i *rig.Instance) float64 {
	t.Helper()
	m := i.Series(t)
	return m["pillion_relay_ended_total"] + m["pillion_relay_connections"]
}
