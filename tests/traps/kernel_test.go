package traps

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// kernelTraps are those of programs in the kernel: who else is there, what they
// hang on, and what they need.
var kernelTraps = []trap{
	{
		number: 5, title: "Two agents on one socket stall it, or shut each other out",
		how: "Another agent counts the application's connects at the same cgroup and puts its sockets into a sockmap with an sk_msg " +
			"program: both work, and bytes are exact. So do two Pillions, one inside the other.",
		links:  []string{"grafana/beyla/issues/2691", "open-telemetry/opentelemetry-ebpf-instrumentation/pull/2542", "kmesh-net/kmesh/issues/774"},
		notFor: notForPeers(noKernel),
		run:    twoAgents,
	},
	{
		number: 9, title: "A stable kernel takes a helper away, and nothing loads",
		how:    "No program calls a helper of tracing, which kernels allow or forbid by type and version; doctor finds nothing missing.",
		links:  []string{"daeuniverse/dae/pull/912"},
		notFor: notForPeers(noKernel),
		run:    helpers,
	},
	{
		number: 30, title: "Programs hang on the wrong cgroup, or on one that is dying",
		how: "A process three cgroups below the scope is captured, on a machine with cgroup v1 and v2; when the scope is removed, " +
			"Pillion ends, or says that something is wrong, and does not go on as if nothing were.",
		links:  []string{"cilium/cilium/issues/15137", "cilium/cilium/issues/16259", "cilium/cilium/issues/16078", "cilium/cilium/issues/48420"},
		notFor: notForPeers(noKernel),
		run:    cgroups,
	},
	{
		number: 31, title: "Attachments are doubled or stale after a crash",
		how: "Three times killed and started again, each hook has one program of Pillion's, the running one's; one that ends leaves none.",
		links: []string{"cilium/cilium/issues/24118", "cilium/cilium/issues/23557", "cilium/cilium/issues/10067", "cilium/cilium/issues/46065",
			"cilium/cilium/issues/46389", "cilium/cilium/issues/43877", "cilium/cilium/issues/44194", "kmesh-net/kmesh/issues/700",
			"kmesh-net/kmesh/issues/665", "kmesh-net/kmesh/issues/1346", "cilium/ebpf/issues/1994", "cilium/ebpf/issues/980", "aya-rs/aya/issues/1687"},
		notFor: notForPeers(noKernel),
		run:    attachments,
	},
	{
		number: 34, title: "The cgroup of a socket is that of its maker",
		how: "A socket that was made in the scope is captured whoever connects it; one that was made outside is left alone altogether, " +
			"and nothing is unaccounted for.",
		notFor: notForPeers("it does not go by cgroups"),
		run:    makers,
	},
	{
		number: 45, title: "A full buffer of events loses verdicts",
		how:    "20,000 denied connects while nobody reads the events: every one is refused, and counted; what is lost of the records is counted too.",
		notFor: notForPeers(noKernel),
		run:    fullBuffer,
	},
	{
		number: 46, title: "Older and spliced connections are misread by who watches",
		how: "A connection that is older than Pillion is reported as such and not taken for another; the record of one that is moved by " +
			"splice(2) has its bytes exactly.",
		links:  []string{"open-telemetry/opentelemetry-ebpf-instrumentation/issues/3250", "open-telemetry/opentelemetry-ebpf-instrumentation/pull/1571"},
		notFor: notForPeers("it sees only what it carries"),
		run:    watched,
	},
	{
		number: 48, title: "The service manager attaches programs to the same cgroup",
		how: "Programs that were there before keep working: one that asks the kernel for round-trip samples still gets them, one that " +
			"forbids is obeyed (EPERM) and accounted for; all are still there after Pillion has gone.",
		links:  []string{"systemd/systemd/issues/13496"},
		notFor: notForPeers(noKernel),
		run:    serviceManager,
	},
	{
		number: 50, title: "It needs more privilege than a pod may have",
		how: "Pillion relays and ends cleanly with CAP_BPF and CAP_NET_ADMIN alone; the others with no capability at all (who redirects to " +
			"them needs CAP_NET_ADMIN once).",
		links: []string{"istio/istio/issues/54968", "istio/istio/issues/8271"},
		run:   privileges,
	},
}

// twoAgents lets Pillion meet an agent that is there before it.
func twoAgents(t testing.TB, s *site) {
	at := s.server(at4(7000), echo)
	other := newForeign(t, s)
	other.watch(s.Scope)
	enrolled := newForeign(t, s)
	enrolled.enrol(s.Scope)
	s.start()
	for range 10 {
		c := s.dial(t, at)
		echoes(t, c, noise(1<<20))
		c.Close()
	}
	if n := other.seen(); n != 10 {
		t.Errorf("the other agent has seen %d connects of 10", n)
	}
	if enrolled.seen() == 0 {
		t.Error("the other agent's sk_msg program has seen nothing")
	}
	s.relayed(t, 10)
	// A second Pillion, around the first one's scope: the inner one has decided.
	around := *s.Rig
	around.Scope = s.outer
	second := around.Run(s.t, "")
	c := s.dial(t, at)
	echoes(t, c, noise(1<<20))
	c.Close()
	s.relayed(t, 11)
	if n := second.Reasons(s.t)["foreign_slot"]; n != 1 {
		t.Errorf("the outer Pillion leaves %d connections to the inner one, want 1", n)
	}
}

// tracing are helpers that need CAP_PERFMON, and whose availability to a type of
// program has changed between kernels.
var tracing = []asm.BuiltinFunc{asm.FnGetCurrentTask, asm.FnGetCurrentTaskBtf, asm.FnProbeRead, asm.FnProbeReadKernel, asm.FnProbeReadUser,
	asm.FnProbeReadStr, asm.FnProbeReadKernelStr, asm.FnTracePrintk, asm.FnTraceVprintk, asm.FnGetStack, asm.FnGetStackid}

func helpers(t testing.TB, s *site) {
	at := s.server(at4(7000), echo)
	programs := 0
	specs, err := bpf.Specs()
	if err != nil {
		t.Fatal(err)
	}
	for _, spec := range specs {
		for name, p := range spec.Programs {
			programs++
			for _, ins := range p.Instructions {
				if ins.IsBuiltinCall() && slices.Contains(tracing, asm.BuiltinFunc(ins.Constant)) {
					t.Errorf("program %s calls %v", name, asm.BuiltinFunc(ins.Constant))
				}
			}
		}
	}
	if programs < 9 {
		t.Errorf("only %d programs were looked at", programs)
	}
	s.start()
	c := s.dial(t, at)
	echoes(t, c, []byte("x"))
	s.relayedAfter(t, c)
	out, err := s.Pillion(s.t, "doctor")
	if err != nil {
		t.Errorf("doctor: %v\n%s", err, out)
	}
}

func cgroups(t testing.TB, s *site) {
	at := s.server(at4(7000), says("here"))
	s.start()
	deep := s.Scope.Child(s.t, "a").Child(s.t, "b").Child(s.t, "c")
	var out bytes.Buffer
	cmd := exec.Command(self(t), roleApp, at.String())
	cmd.Stdout, cmd.Stderr = &out, &out
	err := testutil.Place{NS: s.App, Cgroup: deep}.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil || out.String() != "here\n" {
		t.Errorf("the application below: %q, %v", out.String(), err)
	}
	s.relayed(t, 1)
	if r := s.Ended(s.t, 1); r[0].Cgroup != deep.ID {
		t.Errorf("the record is one of cgroup %d, want %d", r[0].Cgroup, deep.ID)
	}
	// The scope goes, as a container's does that ends. Whoever is in it too.
	if err := s.Scope.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"/a/b/c", "/a/b", "/a", ""} {
		if err := os.Remove(s.Scope.Path + dir); err != nil {
			t.Fatal(err)
		}
	}
	testutil.Eventually(t, rig.Limit, func() bool {
		st, err := s.Status(context.Background())
		said := strings.Contains(s.Log(), "cannot keep the programs attached")
		return err != nil || len(st.Problems) > 0 || st.State != admin.StateServing || said || wait()
	}, "Pillion notices that its scope is gone")
}

// hooks are those that Pillion has programs at.
var hooks = map[string]ebpf.AttachType{
	"connect4": ebpf.AttachCGroupInet4Connect, "connect6": ebpf.AttachCGroupInet6Connect,
	"getpeername4": ebpf.AttachCgroupInet4GetPeername, "getpeername6": ebpf.AttachCgroupInet6GetPeername,
	"sockops": ebpf.AttachCGroupSockOps,
}

func attachments(t testing.TB, s *site) {
	at := s.server(at4(7000), echo)
	s.start()
	for n := range 4 {
		c := s.dial(t, at)
		echoes(t, c, []byte("x"))
		c.Close()
		for name, hook := range hooks {
			if ids := attachedTo(t, s.Scope, hook); len(ids) != 1 {
				t.Errorf("started %d times, %s has %d programs", n+1, name, len(ids))
			}
		}
		s.relayed(t, 1)
		if n < 3 {
			s.kill()
			s.again()
		}
	}
	if err := s.Stop(s.t); err != nil {
		t.Errorf("run: %v", err)
	}
	for name, hook := range hooks {
		if ids := attachedTo(t, s.Scope, hook); len(ids) != 0 {
			t.Errorf("ended, %s has %d programs", name, len(ids))
		}
	}
}

// whom is a server that says whom it sees.
func whom(c net.Conn) { fmt.Fprintf(c, "%s\n", c.RemoteAddr()) }

// direct tells whether nobody stands between a connection and a server that is
// whom. It closes the connection.
func direct(t testing.TB, c *net.TCPConn) bool {
	t.Helper()
	defer c.Close()
	got := line(c)
	if _, err := netip.ParseAddrPort(got); err != nil {
		t.Fatalf("the server says %s", got)
	}
	return got == c.LocalAddr().String()
}

// isCaptured ends the test unless the system stands between a new connection and
// a server that is whom.
func (s *site) isCaptured(t testing.TB, what string, c *net.TCPConn) {
	t.Helper()
	if direct(t, c) {
		t.Fatalf("%s is not captured", what)
	}
}

func makers(t testing.TB, s *site) {
	at := s.server(at4(7000), whom)
	s.start()
	// The test is not in the scope, and connects what was made there.
	s.isCaptured(t, "a socket of the scope", s.app.dial(t, at))
	outside := startApplication(s.t, testutil.Place{NS: s.App})
	if !direct(t, outside.dial(t, at)) {
		t.Error("a socket from outside is captured")
	}
	s.Conserved(s.t)
}

func fullBuffer(t testing.TB, s *site) {
	const connects = 20000
	s.extra = "deny: [203.0.113.0/24]"
	s.start()
	s.Halt(s.t)
	refused := 0
	for n := range connects {
		fd := s.app.socket(unix.AF_INET, 0)
		to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(n)}), 80)
		if unix.Connect(fd, sockaddr(to)) == unix.ECONNREFUSED {
			refused++
		}
		unix.Close(fd)
	}
	s.Signal(s.t, unix.SIGCONT)
	if refused != connects {
		t.Errorf("%d of %d are refused", refused, connects)
	}
	testutil.Eventually(t, rig.Limit, func() bool {
		return s.Reasons(s.t)["denied"] == connects || wait()
	}, "all are counted")
	s.Conserved(s.t)
}

func watched(t testing.TB, s *site) {
	at := s.server(at4(7000), echo)
	old := s.dial(t, at)
	fmt.Fprintln(old, "before")
	line(old)
	s.start()
	sent := noise(8 << 20)
	c := s.dial(t, at)
	echoed := make(chan error, 1)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	go func() {
		defer w.Close()
		echoed <- spliceAll(c, w)
	}()
	go func() {
		c.Write(sent)
		c.CloseWrite()
	}()
	var got bytes.Buffer
	if _, err := got.ReadFrom(r); err != nil || <-echoed != nil || got.Len() != len(sent) {
		t.Errorf("%d of %d bytes came back, %v", got.Len(), len(sent), err)
	}
	c.Close()
	fmt.Fprintln(old, "after")
	if got := line(old); got != "after" {
		t.Errorf("the older connection says %s", got)
	}
	s.relayed(t, 1)
	records := s.Ended(s.t, 1)
	if n := uint64(len(sent)); len(records) != 1 || records[0].Sent != n || records[0].Received != n || records[0].End != flow.ReasonClosed {
		t.Errorf("records %+v, want one with %d bytes each way", records, n)
	}
	if n := s.Metric(s.t, "pillion_escapes_total"); n != 1 {
		t.Errorf("%d connections are reported as escaped, want the older one", n)
	}
}

func serviceManager(t testing.TB, s *site) {
	at := s.server(at4(7000), echo)
	samples := newForeign(t, s)
	samples.roundTrips(s.Scope)
	s.start()
	c := s.dial(t, at)
	echoes(t, c, noise(1<<20))
	c.Close()
	if samples.seen() == 0 {
		t.Error("who asks for round-trip samples gets none")
	}
	s.relayed(t, 1)
	policy := newForeign(t, s)
	policy.forbid(s.outer)
	if c, err := s.app.try(at); err != unix.EPERM {
		t.Errorf("a policy forbids, and connect says %v", err)
		if err == nil {
			c.Close()
		}
	}
	s.Conserved(s.t)
	if err := s.Stop(s.t); err != nil {
		t.Errorf("run: %v", err)
	}
	if n := len(attachedTo(t, s.Scope, ebpf.AttachCGroupSockOps)); n != 1 {
		t.Errorf("%d programs of others at sockops, want 1", n)
	}
	if n := len(attachedTo(t, s.outer, ebpf.AttachCGroupInet4Connect)); n != 1 {
		t.Errorf("%d programs of others at connect4, want 1", n)
	}
}

func privileges(t testing.TB, s *site) {
	at := s.server(at4(7000), echo)
	s.Home = testutil.Place{}.With(unix.CAP_BPF, unix.CAP_NET_ADMIN)
	s.bare = true
	s.start()
	c := s.dial(t, at)
	echoes(t, c, noise(1<<20))
	s.relayedAfter(t, c)
	if s.sys == pillion {
		if err := s.Stop(s.t); err != nil {
			t.Errorf("run: %v", err)
		}
	}
}
