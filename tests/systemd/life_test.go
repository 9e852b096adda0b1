package systemd

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

const unit = "pillion@shop.service"

// exitExec is systemd's code for a program that cannot be executed.
const exitExec = 203

// TestLife is about what systemd does to the unit, and what the connections of the
// service see of it.
func TestLife(t *testing.T) {
	m := stage(t)
	m.beside(t, "shop", shop)
	m.must(t, "systemctl", "start", "shop.service")
	m.serves(t, "shop")
	for _, tt := range []struct {
		name string
		test func(*testing.T, *machine, client)
	}{
		{"Reloaded", testReloaded},
		{"Refused", testRefused},
		{"Killed", testKilled},
		{"KilledClosed", testKilledClosed},
		{"KilledRenewed", testKilledRenewed},
		{"Stuck", testStuck},
		{"Drained", testDrained},
		{"Cut", testCut},
		{"Broken", testBroken},
		{"Missing", testMissing},
		{"Strict", testStrict},
	} {
		t.Run(tt.name, func(t *testing.T) {
			start := time.Now()
			tt.test(t, m, m.client(t, "shop.service"))
			t.Logf("took %v", time.Since(start).Round(time.Millisecond))
		})
		// As it was, whatever the test did.
		m.write(t, "/etc/pillion/shop.yaml", shop)
		m.override(t)
		if m.show(t, unit, "ActiveState") != "active" {
			m.must(t, "systemctl", "start", unit)
		}
		m.must(t, "systemctl", "reload", unit)
		m.serves(t, "shop")
	}
}

// configure changes the configuration file, which a running instance sees by itself:
// systemctl reload is what says whether it took it.
func (m *machine) configure(t testing.TB, text string) {
	t.Helper()
	m.write(t, "/etc/pillion/shop.yaml", text)
}

// testReloaded: systemctl reload puts a changed file in force before it returns.
func testReloaded(t *testing.T, m *machine, a client) {
	if got := a.Open(t, "old", relayed); got != server(1).String() && got != server(2).String() {
		t.Fatal(got)
	}
	before := m.status(t, "shop")
	m.configure(t, strings.NewReplacer(server(1).String(), server(5).String(), server(2).String(), server(6).String()).Replace(shop))
	m.must(t, "systemctl", "reload", unit)
	a.goes(t, relayed, server(5), server(6))
	if got := a.Talk(t, "old"); got != "" {
		t.Errorf("a connection that was open before the reload: %s", got)
	}
	a.Close(t, "old")
	after := m.status(t, "shop")
	if after.Pid != before.Pid || after.Configuration.Generation <= before.Configuration.Generation {
		t.Errorf("process %d, generation %d; before: %d, %d", after.Pid, after.Configuration.Generation, before.Pid, before.Configuration.Generation)
	}
	m.conserved(t, "shop")
}

// testRefused: a broken file makes systemctl reload fail, says why in the journal, and
// changes nothing else.
func testRefused(t *testing.T, m *machine, a client) {
	before := m.status(t, "shop").Pid
	m.configure(t, shop+"- {name: broken, adress: 10.96.0.3:80}\n")
	if code, out := m.code(t, "systemctl", "reload", unit); code == 0 {
		t.Errorf("systemctl reload took a broken file\n%s", out)
	}
	journal := m.journal(t, unit)
	for _, want := range []string{"/etc/pillion/shop.yaml:5:", "adress: unknown key, did you mean address?", "status=64/USAGE"} {
		if !strings.Contains(journal, want) {
			t.Errorf("%q is not in the journal:\n%s", want, journal)
		}
	}
	if state, pid := m.show(t, unit, "ActiveState"), m.status(t, "shop").Pid; state != "active" || pid != before {
		t.Errorf("the unit is %s, process %d, before %d", state, pid, before)
	}
	a.goes(t, relayed, server(1), server(2))
	if refused := m.status(t, "shop").Configuration.Refused; len(refused) == 0 {
		t.Error("status does not say what was refused")
	}
}

// gate is there when the unit may start again: so there is time to look at what is
// in between.
const gate = "/run/gate"

// hold has the unit not start until release.
func (m *machine) hold(t testing.TB) {
	t.Helper()
	m.must(t, "rm", "-f", gate)
	m.override(t, `ExecStartPre=/bin/sh -c "until test -e `+gate+`; do sleep 0.05; done"`)
}

// killed kills the main process and waits until systemd is about to start another.
func (m *machine) killed(t testing.TB) {
	t.Helper()
	m.must(t, "systemctl", "kill", "--kill-who=main", "--signal=KILL", unit)
	testutil.Eventually(t, rig.Limit, func() bool { return m.show(t, unit, "SubState") == "start-pre" }, "systemd starts the unit again")
}

// release lets the unit start, and waits until another process is ready.
func (m *machine) release(t testing.TB, before int) {
	t.Helper()
	m.write(t, gate, "")
	testutil.Eventually(t, rig.Limit, func() bool {
		s, err := m.instance("shop").Status(context.Background())
		return err == nil && s.Ready && s.State == admin.StateServing && s.Pid != before
	}, "another process is ready")
}

// testKilled: the process is killed. What it carried ends, the rest goes on; in the
// meantime services are balanced in the kernel, and the next process takes over what
// is pinned.
func testKilled(t *testing.T, m *machine, a client) {
	m.hold(t)
	a.Open(t, "relayed", relayed)
	a.Open(t, "direct", direct)
	before := m.status(t, "shop")
	links, restarts := m.links(t), m.show(t, unit, "NRestarts")
	m.killed(t)
	// A reset where bytes were on their way.
	if got := a.EndOf(t, "relayed"); got != "ECONNRESET" && got != "EOF" {
		t.Errorf("a relayed connection ended with %s", got)
	}
	if got := a.Dial(t, relayed); got != server(1).String() && got != server(2).String() {
		t.Errorf("a new connection: %s", got)
	}
	if got := a.Talk(t, "direct"); got != "" {
		t.Errorf("a direct connection: %s", got)
	}
	m.release(t, before.Pid)
	a.goes(t, relayed, server(1), server(2))
	after := m.status(t, "shop")
	if got := m.show(t, unit, "NRestarts"); got == restarts {
		t.Errorf("systemd counts %s restarts, as before", got)
	}
	if got := m.links(t); !slices.Equal(got, links) {
		t.Errorf("the links were %v and are %v", links, got)
	}
	if after.Slots4 != before.Slots4 {
		t.Errorf("slots were %s and are %s", before.Slots4, after.Slots4)
	}
	if n := after.Counters[flow.ReasonHandlerAbsent.String()]; n != before.Counters[flow.ReasonHandlerAbsent.String()]+1 {
		t.Errorf("%d connections found no handler, and one was made meanwhile", n)
	}
	if got := a.Talk(t, "direct"); got != "" {
		t.Errorf("a direct connection: %s", got)
	}
	m.conserved(t, "shop")
}

// testKilledClosed: the same, for who wants no connection rather than one past Pillion.
func testKilledClosed(t *testing.T, m *machine, a client) {
	m.hold(t)
	m.configure(t, "on_failure: closed\n"+shop)
	m.must(t, "systemctl", "reload", unit)
	before := m.status(t, "shop").Pid
	m.killed(t)
	for to, want := range map[netip.AddrPort]string{relayed: "ECONNREFUSED", unnamed: "ECONNREFUSED", direct: "198.51.100."} {
		if got := a.Dial(t, to); !strings.HasPrefix(got, want) {
			t.Errorf("a new connection to %s: %s, want %s", to, got, want)
		}
	}
	m.release(t, before)
	a.goes(t, relayed, server(1), server(2))
	m.conserved(t, "shop")
}

// testKilledRenewed: the service is started again, in another cgroup, while nobody is
// there: the slice stays, and with it what is attached.
func testKilledRenewed(t *testing.T, m *machine, a client) {
	m.override(t, "RestartSec=1h")
	m.configure(t, "on_failure: closed\n"+shop)
	m.must(t, "systemctl", "reload", unit)
	m.must(t, "systemctl", "kill", "--kill-who=main", "--signal=KILL", unit)
	testutil.Eventually(t, rig.Limit, func() bool { return m.show(t, unit, "SubState") == "auto-restart" }, "systemd waits with the next one")
	const dir = "/sys/fs/cgroup/pillion.slice/pillion-shop.slice/shop.service"
	before := m.inode(t, dir)
	// It asks for Pillion, which would be started at once.
	m.must(t, "systemctl", "restart", "--job-mode=ignore-dependencies", "shop.service")
	a = m.client(t, "shop.service")
	if m.inode(t, dir) == before {
		t.Fatal("the service has its old cgroup: the test proves nothing")
	}
	for to, want := range map[netip.AddrPort]string{relayed: "ECONNREFUSED", unnamed: "ECONNREFUSED", direct: "198.51.100."} {
		if got := a.Dial(t, to); !strings.HasPrefix(got, want) {
			t.Errorf("a new connection to %s: %s, want %s", to, got, want)
		}
	}
	if got := m.show(t, unit, "SubState"); got != "auto-restart" {
		t.Fatalf("the unit is %s: the test proves nothing", got)
	}
	m.must(t, "systemctl", "restart", unit)
	m.serves(t, "shop")
	a.goes(t, relayed, server(1), server(2))
	m.conserved(t, "shop")
}

// testStuck: a process that says nothing any more is ended by the watchdog, and
// another one started. One that is only stopped by the test is seen by the hooks long
// before.
func testStuck(t *testing.T, m *machine, a client) {
	if got := m.show(t, unit, "WatchdogUSec"); got != "10s" {
		t.Errorf("the shipped watchdog is %s", got)
	}
	// A process is told of the watchdog when it is started.
	m.override(t, "WatchdogSec=3s")
	m.must(t, "systemctl", "restart", unit)
	m.serves(t, "shop")
	before, restarts := m.status(t, "shop").Pid, m.show(t, unit, "NRestarts")
	// It tells systemd that it works, for longer than the limit.
	told := m.when(t, unit, "Watchdog")
	testutil.Eventually(t, rig.Limit, func() bool { return m.when(t, unit, "Watchdog") > told+6_000_000 }, "the watchdog is told")
	if got := m.show(t, unit, "NRestarts"); got != restarts {
		t.Fatalf("a process that works was started again: %s restarts, then %s", restarts, got)
	}
	m.must(t, "systemctl", "kill", "--kill-who=main", "--signal=STOP", unit)
	start := time.Now()
	testutil.Eventually(t, rig.Limit, func() bool {
		s, err := m.stuckStatus()
		return err == nil && s.Ready && s.State == admin.StateServing && s.Pid != before
	}, "another process is ready")
	t.Logf("another process was ready %v after the first one stopped, with WatchdogSec=3s", time.Since(start).Round(time.Millisecond))
	if got := m.show(t, unit, "NRestarts"); got == restarts {
		t.Errorf("systemd counts %s restarts, as before", got)
	}
	journal := m.journal(t, unit)
	for _, want := range []string{"Watchdog timeout (limit 3s)!", "SIGABRT: abort", "goroutine "} {
		if !strings.Contains(journal, want) {
			t.Errorf("%q is not in the journal:\n%s", want, journal)
		}
	}
	a.goes(t, relayed, server(1), server(2))
	m.conserved(t, "shop")
}

// stuckStatus does not wait for an answer for long.
func (m *machine) stuckStatus() (admin.Status, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return m.instance("shop").Status(ctx)
}

// testDrained: systemctl stop lets open connections end, and new ones go by
// on_failure.
func testDrained(t *testing.T, m *machine, a client) {
	a.Open(t, "open", relayed)
	m.must(t, "systemctl", "stop", "--no-block", unit)
	testutil.Eventually(t, rig.Limit, func() bool {
		s, err := m.instance("shop").Status(context.Background())
		return err == nil && s.State == admin.StateDraining
	}, "it drains")
	if got := a.Talk(t, "open"); got != "" {
		t.Errorf("an open connection while it drains: %s", got)
	}
	if got := a.Dial(t, relayed); got != server(1).String() && got != server(2).String() {
		t.Errorf("a new connection while it drains: %s", got)
	}
	if state := m.show(t, unit, "ActiveState"); state != "deactivating" {
		t.Errorf("the unit is %s while a connection is open", state)
	}
	a.Close(t, "open")
	testutil.Eventually(t, rig.Limit, func() bool { return m.show(t, unit, "ActiveState") == "inactive" }, "it ends with the last connection")
	if result, code := m.show(t, unit, "Result"), m.show(t, unit, "ExecMainStatus"); result != "success" || code != "0" {
		t.Errorf("the unit ended with %s, code %s", result, code)
	}
	m.nothingLeft(t)
}

// testCut: what is open still at the deadline is ended; the exit code tells, and is no
// failure.
func testCut(t *testing.T, m *machine, a client) {
	exec := m.must(t, "systemctl", "cat", unit)
	_, exec, _ = strings.Cut(exec, "ExecStart=")
	exec, _, _ = strings.Cut(exec, "\n")
	m.override(t, "ExecStart=", "ExecStart="+exec+" --drain-timeout 1s")
	m.must(t, "systemctl", "restart", unit)
	a.Open(t, "open", relayed)
	m.must(t, "systemctl", "stop", unit)
	if got := a.EndOf(t, "open"); got != "ECONNRESET" {
		t.Errorf("the connection ended with %s", got)
	}
	for property, want := range map[string]string{"ActiveState": "inactive", "Result": "success", "ExecMainStatus": fmt.Sprint(75)} {
		if got := m.show(t, unit, property); got != want {
			t.Errorf("%s is %s, want %s", property, got, want)
		}
	}
	if journal := m.journal(t, unit); !strings.Contains(journal, "1 connection open still after 1s, and ended") {
		t.Errorf("the journal does not tell:\n%s", journal)
	}
	m.nothingLeft(t)
}

// testBroken: with a broken file it does not start, is not tried again, and says why;
// the service starts all the same.
func testBroken(t *testing.T, m *machine, _ client) {
	m.must(t, "systemctl", "stop", "shop.service", unit)
	m.configure(t, "services: [{address: 10.96.0.1:80, endpoints: [here]}]\n")
	m.must(t, "systemctl", "start", "shop.service")
	for property, want := range map[string]string{"ActiveState": "failed", "Result": "exit-code", "ExecMainStatus": fmt.Sprint(64), "NRestarts": "0"} {
		if got := m.show(t, unit, property); got != want {
			t.Errorf("%s is %s, want %s", property, got, want)
		}
	}
	if journal := m.journal(t, unit); !strings.Contains(journal, "pillion: /etc/pillion/shop.yaml:1:") {
		t.Errorf("the journal does not tell:\n%s", journal)
	}
	a := m.client(t, "shop.service")
	if got := a.Dial(t, unnamed); got != unnamed.String() {
		t.Errorf("a connection of the service: %s", got)
	}
	m.nothingLeft(t)
	m.configure(t, shop)
	m.must(t, "systemctl", "start", unit)
	a.goes(t, relayed, server(1), server(2))
}

// testMissing: the next process cannot be started. What is pinned stays, and on_failure
// decides; a stop finds nobody to take it away, and then unload does.
func testMissing(t *testing.T, m *machine, a client) {
	const binary = "/usr/local/bin/pillion"
	m.configure(t, "on_failure: closed\n"+shop)
	m.must(t, "systemctl", "reload", unit)
	m.must(t, "mv", binary, binary+".away")
	t.Cleanup(func() { m.try("mv", binary+".away", binary) })
	m.must(t, "systemctl", "kill", "--kill-who=main", "--signal=KILL", unit)
	testutil.Eventually(t, rig.Limit, func() bool { return m.show(t, unit, "ExecMainStatus") == fmt.Sprint(exitExec) }, "systemd does not find it")
	if got := a.Dial(t, relayed); got != "ECONNREFUSED" {
		t.Errorf("a new connection: %s", got)
	}
	m.must(t, "systemctl", "stop", unit)
	if got := a.Dial(t, relayed); got != "ECONNREFUSED" {
		t.Errorf("a new connection when it is stopped: %s", got)
	}
	m.must(t, "mv", binary+".away", binary)
	m.must(t, binary, "unload", "shop")
	m.nothingLeft(t)
	if got := a.Dial(t, unnamed); got != unnamed.String() {
		t.Errorf("a new connection when it is unloaded: %s", got)
	}
	m.must(t, "systemctl", "start", unit)
	m.serves(t, "shop")
}

// testStrict: the filter of system calls denies nothing that Pillion asks for: it lives
// with one that kills instead, and does not where that has one call less.
func testStrict(t *testing.T, m *machine, a client) {
	m.override(t, "SystemCallErrorNumber=kill", "SystemCallFilter=~bpf", "Restart=no")
	m.must(t, "systemctl", "stop", unit)
	if code, _ := m.code(t, "systemctl", "start", unit); code == 0 || m.show(t, unit, "ExecMainStatus") != fmt.Sprint(int(unix.SIGSYS)) {
		t.Fatalf("without bpf it ended with %s (%s): the test proves nothing", m.show(t, unit, "ExecMainStatus"), m.show(t, unit, "Result"))
	}
	m.override(t, "SystemCallErrorNumber=kill")
	m.must(t, "systemctl", "restart", unit)
	m.serves(t, "shop")
	pid := m.status(t, "shop").Pid
	a.goes(t, relayed, server(1), server(2))
	a.goes(t, direct, server(3), server(4))
	a.goes(t, unnamed, unnamed)
	m.configure(t, strings.ReplaceAll(shop, server(1).String(), server(5).String()))
	m.must(t, "systemctl", "reload", unit)
	a.goes(t, relayed, server(5), server(2))
	// Much at once is spliced.
	a.load(t, 4, 4, relayed, direct)
	time.Sleep(time.Second) // the load is what is to happen, not waited for
	if sum := a.Unload(t); len(sum.Failed)+len(sum.Broken) > 0 {
		t.Errorf("%v %v", sum.Failed, sum.Broken)
	}
	if _, err := m.instance("shop").Flows(t.Context(), admin.FlowQuery{}); err != nil {
		t.Error(err)
	}
	if _, err := m.instance("shop").Explain(t.Context(), admin.ExplainQuery{Destination: relayed.String()}); err != nil {
		t.Error(err)
	}
	m.conserved(t, "shop")
	if got := m.status(t, "shop").Pid; got != pid {
		t.Errorf("process %d, then %d", pid, got)
	}
	// systemctl is asked, and the store is used.
	a.Open(t, "kept", relayed)
	m.must(t, "systemctl", "restart", unit)
	if got := a.Talk(t, "kept"); got != "" {
		t.Errorf("a connection that was open before the restart: %s", got)
	}
	a.Close(t, "kept")
	m.must(t, "systemctl", "stop", unit)
	if got := m.show(t, unit, "Result"); got != "success" {
		t.Errorf("it ended with %s", got)
	}
	m.nothingLeft(t)
}
