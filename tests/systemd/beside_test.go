package systemd

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig/app"
)

// TestBeside is about the drop-in: what becomes of the connections of a service from
// its first instruction to its last.
func TestBeside(t *testing.T) {
	m := stage(t)
	m.beside(t, "shop", shop, fmt.Sprintf("Environment=%s=%s %s=%s", app.EnvFirst, relayed, app.EnvLast, relayed))
	m.must(t, "systemctl", "start", "shop.service")
	m.serves(t, "shop")
	m.client(t, "shop.service") // it has made its first connection when it listens
	t.Run("Restarted", m.testRestarted)
	t.Run("Stopped", m.testStopped)
	t.Run("Order", m.testOrder)
	t.Run("Dashes", m.testDashes)
	t.Run("Template", m.testTemplate)
	t.Run("TemplateEach", m.testTemplateEach)
	t.Run("Outside", m.testOutside)
}

// testRestarted: a service has a new cgroup whenever it starts. None of its
// connections escapes, from the first instruction on, and Pillion goes on.
func (m *machine) testRestarted(t *testing.T) {
	const times = 10
	before := m.status(t, "shop")
	seen := map[uint64]bool{}
	for range times {
		m.must(t, "systemctl", "restart", "shop.service")
		seen[m.inode(t, "/sys/fs/cgroup/pillion.slice/pillion-shop.slice/shop.service")] = true
		a := m.client(t, "shop.service")
		if got := a.First(t); got != server(1).String() && got != server(2).String() {
			t.Errorf("the first connection of a start: %s", got)
		}
	}
	if len(seen) != times {
		t.Errorf("%d restarts made %d cgroups: the test proves nothing", times, len(seen))
	}
	after := m.status(t, "shop")
	if before.Pid != after.Pid || !before.Started.Equal(after.Started) {
		t.Errorf("Pillion was started again: %+v, then %+v", before, after)
	}
	// The first start's, and then a first and a last one for each restart.
	all := m.records(t, "shop", relayed, 1+2*times)
	groups := map[uint64]bool{}
	for _, r := range all {
		if r.Path != flow.PathRelay || r.Service != "relayed" {
			t.Errorf("a connection went by %s (%s)", r.Path, r.Reason)
		}
		groups[r.Cgroup] = true
	}
	if len(all) != 1+2*times || len(groups) != 1+times {
		t.Errorf("%d connections of %d cgroups are on record, want %d of %d", len(all), len(groups), 1+2*times, 1+times)
	}
	m.conserved(t, "shop")
}

func (m *machine) inode(t testing.TB, name string) uint64 {
	t.Helper()
	info, err := os.Stat(m.path(name))
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Ino
}

// testStopped: while the service is stopped its own cgroup is gone; what Pillion is
// attached to, that of the slice, stays.
func (m *machine) testStopped(t *testing.T) {
	const slice = "/sys/fs/cgroup/pillion.slice/pillion-shop.slice"
	before, links := m.inode(t, slice), m.links(t)
	m.must(t, "systemctl", "stop", "shop.service")
	if got := m.list(t, slice+"/shop.service"); got != nil {
		t.Error("the stopped service still has a cgroup")
	}
	if got := m.show(t, "pillion@shop.service", "ActiveState"); got != "active" {
		t.Errorf("Pillion is %s while the service is stopped", got)
	}
	m.must(t, "systemctl", "start", "shop.service")
	if after := m.inode(t, slice); after != before {
		t.Errorf("the slice's cgroup was %d and is %d", before, after)
	}
	if got := m.links(t); !slices.Equal(got, links) {
		t.Errorf("the links were %v and are %v", links, got)
	}
	m.client(t, "shop.service").goes(t, relayed, server(1), server(2))
	m.conserved(t, "shop")
}

// links are the pins of an instance's links, with their inodes.
func (m *machine) links(t testing.TB) []string {
	t.Helper()
	const dir = "/sys/fs/bpf/pillion/shop"
	var all []string
	for _, name := range m.list(t, dir) {
		if strings.HasPrefix(name, "link_") {
			all = append(all, fmt.Sprintf("%s %d", name, m.inode(t, dir+"/"+name)))
		}
	}
	if len(all) == 0 {
		t.Fatal("no link is pinned")
	}
	return all
}

// testOrder: in one go, as when the machine starts and ends, the service starts after
// Pillion and ends before it: its very last connection, when it was told to end, is
// still captured.
func (m *machine) testOrder(t *testing.T) {
	// Each unit that systemctl is given is a transaction of its own; those of a target
	// are one.
	m.write(t, units+"/all.target", "[Unit]\nWants=pillion@shop.service shop.service\n")
	for _, name := range []string{"pillion@shop", "shop"} {
		m.write(t, units+"/"+name+".service.d/all.conf", "[Unit]\nPartOf=all.target\n")
	}
	m.must(t, "systemctl", "daemon-reload")
	m.must(t, "systemctl", "stop", "shop.service", "pillion@shop.service")
	m.nothingLeft(t)
	if lines := m.journal(t, "shop.service"); !strings.Contains(lines, "last: 198.51.100.") {
		t.Errorf("the last connection is not in the journal:\n%s", lines)
	}
	log := strings.Count(m.read(t, flowLog), "\n")
	m.must(t, "systemctl", "start", "all.target")
	m.client(t, "shop.service")
	m.serves(t, "shop")
	if ready, started := m.when(t, "pillion@shop.service", "ActiveEnter"), m.when(t, "shop.service", "ExecMainStart"); ready > started {
		t.Errorf("Pillion was ready at %d us, the application started at %d us", ready, started)
	}
	m.must(t, "systemctl", "stop", "all.target")
	// The target does not wait for them.
	m.must(t, "systemctl", "stop", "shop.service", "pillion@shop.service")
	if ended, began := m.when(t, "shop.service", "InactiveEnter"), m.when(t, "pillion@shop.service", "ActiveExit"); ended > began {
		t.Errorf("the application had ended at %d us, Pillion began to end at %d us", ended, began)
	}
	// What has ended is in the file when the process is gone.
	lines := strings.Split(strings.TrimSpace(m.read(t, flowLog)), "\n")[log:]
	if len(lines) != 2 {
		t.Errorf("a first and a last connection, and in the flow log:\n%s", strings.Join(lines, "\n"))
	}
	for _, line := range lines {
		if !strings.Contains(line, `"path":"relay"`) {
			t.Errorf("not captured: %s", line)
		}
	}
	m.nothingLeft(t)
}

// testDashes: a dash in the name of a slice makes a level, so that of a service is
// escaped, as the drop-in says. A dot does nothing, nor does the bpf file system mind.
func (m *machine) testDashes(t *testing.T) {
	const name = "my-app.v2"
	m.service(t, name+".service")
	m.ownOf(t, name, `my\x2dapp.v2`)
}

// ownOf puts Pillion beside one service, whose unit is there, by the drop-in with the
// name escaped, and has it work and end.
func (m *machine) ownOf(t *testing.T, name, escaped string) {
	t.Helper()
	if got := strings.TrimSpace(m.must(t, "systemd-escape", name)); got != escaped {
		t.Fatalf("systemd-escape says %s, want %s", got, escaped)
	}
	b, err := os.ReadFile(shipped + "/pillion.conf")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(uncommented(string(b)), "%p"); n != 3 {
		t.Fatalf("the drop-in has %%p in %d lines", n)
	}
	m.write(t, units+"/"+name+".service.d/pillion.conf", strings.ReplaceAll(uncommented(string(b)), "%p", escaped))
	m.write(t, "/etc/pillion/"+name+".yaml", strings.ReplaceAll(shop, "shop.jsonl", name+".jsonl"))
	m.must(t, "systemctl", "daemon-reload")
	m.must(t, "systemctl", "start", name+".service")
	m.serves(t, name)
	if got := m.status(t, name).Scope; got != "/sys/fs/cgroup/pillion.slice/pillion-"+escaped+".slice" {
		t.Errorf("the scope is %s", got)
	}
	tries := m.client(t, name+".service").goes(t, relayed, server(1), server(2))
	m.records(t, name, relayed, tries)
	m.conserved(t, name)
	m.must(t, "systemctl", "stop", name+".service", `pillion@`+escaped+`.service`)
	m.nothingLeft(t)
}

// uncommented is a unit without its comments.
func uncommented(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "#") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// testTemplate: the instances of a template, dashes or not, share one Pillion by the
// drop-in as it is shipped. One that stops leaves it to the others.
func (m *machine) testTemplate(t *testing.T) {
	m.service(t, "web@.service")
	m.copy(t, shipped+"/pillion.conf", units+"/web@.service.d/pillion.conf", 0o644)
	m.write(t, "/etc/pillion/web.yaml", strings.ReplaceAll(shop, "shop.jsonl", "web.jsonl"))
	m.must(t, "systemctl", "daemon-reload")
	instances := []string{"web@1.service", "web@eu-2.service"}
	m.must(t, "systemctl", append([]string{"start"}, instances...)...)
	m.serves(t, "web")
	for _, unit := range instances {
		if ready, started := m.when(t, "pillion@web.service", "ActiveEnter"), m.when(t, unit, "ExecMainStart"); ready == 0 || ready > started {
			t.Errorf("Pillion was ready at %d us, %s started at %d us", ready, unit, started)
		}
	}
	tries := 0
	var last client
	for _, unit := range instances {
		last = m.client(t, unit)
		tries += last.goes(t, relayed, server(1), server(2))
	}
	groups := map[uint64]int{}
	for _, r := range m.records(t, "web", relayed, tries) {
		groups[r.Cgroup]++
	}
	if len(groups) != len(instances) {
		t.Errorf("connections of %d cgroups are on record: %v", len(groups), groups)
	}
	m.must(t, "systemctl", "stop", instances[0])
	last.goes(t, direct, server(3), server(4))
	m.conserved(t, "web")
	m.must(t, "systemctl", "stop", instances[1], "pillion@web.service")
	m.nothingLeft(t)
}

// testTemplateEach: an instance of a template has its own by the escaped name.
func (m *machine) testTemplateEach(t *testing.T) {
	m.service(t, "each@.service")
	m.ownOf(t, "each@eu-1", `each\x40eu\x2d1`)
}

// testOutside: a service without the drop-in is left alone, beside one that has it;
// and each of two has its own.
func (m *machine) testOutside(t *testing.T) {
	m.must(t, "systemctl", "start", "shop.service")
	m.beside(t, "pay", fmt.Sprintf("services: [{address: %q, endpoints: [%q]}]\n", relayed, server(5)))
	m.service(t, "plain.service")
	m.must(t, "systemctl", "daemon-reload")
	m.must(t, "systemctl", "start", "pay.service", "plain.service")
	shop, pay, plain := m.client(t, "shop.service"), m.client(t, "pay.service"), m.client(t, "plain.service")
	shop.goes(t, relayed, server(1), server(2))
	pay.goes(t, relayed, server(5))
	plain.goes(t, unnamed, unnamed)
	for _, name := range []string{"shop", "pay"} {
		for _, r := range m.status(t, name).Services {
			for _, e := range r.Endpoints {
				if at := netip.MustParseAddrPort(e.Address); name == "shop" && at == server(5) || name == "pay" && at != server(5) {
					t.Errorf("%s has the endpoint %s", name, e.Address)
				}
			}
		}
		m.conserved(t, name)
	}
	if n := len(m.records(t, "pay", unnamed, 0)) + len(m.records(t, "shop", unnamed, 0)); n != 0 {
		t.Errorf("%d connections of a service without Pillion are on record", n)
	}
	// One that ends leaves the other's socket and pins.
	m.must(t, "systemctl", "stop", "pay.service", "pillion@pay.service")
	if left := m.list(t, "/run/pillion"); !slices.Contains(left, "shop.sock") || slices.Contains(left, "pay.sock") {
		t.Errorf("in the runtime directory there is %v", left)
	}
	shop.goes(t, relayed, server(1), server(2))
	m.must(t, "systemctl", "stop", "shop.service", "pillion@shop.service", "plain.service")
	m.nothingLeft(t)
}
