package direct

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// crowdOf writes a file of n endpoints.
func crowdOf(t testing.TB, path string, n int) {
	t.Helper()
	targets := make([]string, n)
	for k := range targets {
		targets[k] = fmt.Sprintf("10.%d.%d.%d:80", 100+k>>16, k>>8&255, k&255)
	}
	text, err := json.Marshal([]any{map[string]any{"targets": targets}})
	if err != nil {
		t.Fatal(err)
	}
	replace(t, path, string(text))
}

// trouble waits until status says what is wrong, in some words.
func trouble(t testing.TB, i *rig.Instance, words ...string) {
	t.Helper()
	var text string
	testutil.Eventually(t, 2*rig.Limit, func() bool {
		s, err := i.Status(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		text = ""
		for _, r := range s.Configuration.Refused {
			text += r.Text + "\n"
		}
		for _, w := range words {
			if !strings.Contains(text, w) {
				return false
			}
		}
		return true
	}, "status says ", words, ", but: ", (*told)(&text))
}

// told is a text that is printed as it is then.
type told string

func (s *told) String() string { return string(*s) }

// TestFaultFull has more endpoints and services than there is room for: what is
// wrong is told, what was there stays, and connections go on.
func TestFaultFull(t *testing.T) {
	t.Parallel()
	r, program := rig.New(t), ends(t)
	r.Give(t, rig.Far4)
	serveEnds(t, r, program, ":8001")
	dir := t.TempDir()
	file, many := filepath.Join(dir, "p.yaml"), filepath.Join(dir, "many.json")
	vip := netip.AddrPortFrom(vip4, 80)
	write := func(more string) {
		t.Helper()
		replace(t, file, "path: direct\nservices:\n"+service(vip, "", addrs(rig.Far4, 8001)...)+more)
	}
	found := func(n int) (text string) {
		for k := range n {
			text += fmt.Sprintf("  - {name: s%d, address: \"10.97.0.1:%d\", policy: random, discover: {file: %s}}\n", k, 1000+k, many)
		}
		return text
	}
	crowdOf(t, many, 3)
	write(found(1))
	i := r.Run(t, "", "--config", file)
	a := captive(t, r)
	rest := func() {
		t.Helper()
		a.wants("ok", "dial(%q, 80)", vip4)
		if x := explained(t, i, vip.String()); x.Path != flow.PathDirect {
			t.Errorf("%+v", x)
		}
	}

	// Of one service.
	crowdOf(t, many, bpf.SetEndpoints+1)
	testutil.Eventually(t, 2*rig.Limit, func() bool {
		_, source := endpointsOf(t, i, "s0")
		return source.Stale && strings.Contains(source.Error, fmt.Sprintf("%d endpoints: want at most %d", bpf.SetEndpoints+1, bpf.SetEndpoints))
	}, "the source has told too many endpoints")
	rest()
	if x := explained(t, i, "s0"); !x.Pick.IsValid() || x.Pick.Addr().As4()[3] > 2 {
		t.Errorf("the set of before is gone: pick %s", x.Pick)
	}
	// Another one is not the worse for it.
	other := netip.AddrPortFrom(vip4, 81)
	write(found(1) + service(other, "", addrs(rig.Far4, 8001)...))
	if _, err := i.Reload(context.Background()); err != nil {
		t.Fatal(err)
	}
	rest()
	a.wants("ok", "dial(%q, 81)", vip4)

	// Of all services.
	crowdOf(t, many, bpf.SetEndpoints)
	write(found(bpf.Endpoints/bpf.SetEndpoints + 1))
	if _, err := i.Reload(context.Background()); err != nil {
		t.Fatal(err)
	}
	trouble(t, i, "too many endpoints", fmt.Sprint(bpf.Endpoints))
	// The same file again: what of it is not in force is told.
	if result, err := i.Reload(context.Background()); err != nil || !result.Earlier || len(result.Refused) == 0 || !strings.Contains(result.Refused[0].Text, "too many endpoints") {
		t.Errorf("%+v, %v", result, err)
	}
	rest()

	// More services than sets.
	crowdOf(t, many, 3)
	text := ""
	for k := range bpf.Sets {
		text += service(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 98, byte(k >> 8), byte(k)}), 80), "", addrs(rig.Far4, 8001)...)
	}
	write(text)
	result, err := i.Reload(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	one := fmt.Sprintf("services[%d]: %d services that have endpoints are before this one", bpf.Sets, bpf.Sets)
	if len(result.Refused) != 1 || !strings.Contains(result.Refused[0].Text, one) {
		t.Errorf("%+v", result.Refused)
	}
	// For some others there is room when the sets of before are gone.
	trouble(t, i, one)
	if s, err := i.Status(context.Background()); err != nil || slices.ContainsFunc(s.Configuration.Refused, func(r admin.Refusal) bool {
		return !strings.Contains(r.Text, one) && !strings.Contains(r.Text, "too many services have endpoints")
	}) {
		t.Errorf("%+v, %v", s.Configuration.Refused, err)
	}
	rest()

	// And all is well again.
	write(found(2))
	if result, err = i.Reload(context.Background()); err != nil || len(result.Refused) > 0 {
		t.Errorf("%+v, %v", result.Refused, err)
	}
	rest()
	testutil.Eventually(t, rig.Limit, func() bool { return explained(t, i, "s1").Pick.IsValid() }, "a new service has endpoints")
}

// TestFaultNoStorage: a socket without room for the decision goes by on_failure.
func TestFaultNoStorage(t *testing.T) {
	t.Parallel()
	r, program := rig.New(t), ends(t)
	r.Give(t, rig.Far4)
	serveEnds(t, r, program, ":8001")
	open, closed := netip.AddrPortFrom(vip4, 80), netip.AddrPortFrom(vip4, 81)
	i := r.Run(t, "path: direct\nservices:\n"+service(open, "", addrs(rig.Far4, 8001)...)+service(closed, ", on_failure: closed", addrs(rig.Far4, 8001)...))
	a := captive(t, r)
	a.wants("ok", "dial(%q, 80)", vip4)
	r.App.Sysctl(t, "net/core/optmem_max", "1")
	a.wants("ok", "dial(%q, 81)", vip4) // there are cells
	i.OccupyCells(t, 1)
	for range 5 {
		a.wants("ok", "dial(%q, 80)", vip4)
		a.wants("ECONNREFUSED", "dial(%q, 81)", vip4)
	}
	if n := i.Reasons(t)["no_memory"]; n != 10 {
		t.Errorf("%d connects without memory, want 10", n)
	}
	m := i.Series(t)
	if m["pillion_escapes_total"] != 5 || m["pillion_denials_total"] != 5 {
		t.Errorf("%v escapes and %v denials, want 5 each", m["pillion_escapes_total"], m["pillion_denials_total"])
	}
	i.Conserved(t)
}

// TestFaultRing stops the reader: connects go on, and what is lost is counted.
func TestFaultRing(t *testing.T) {
	t.Parallel()
	r, program := rig.New(t), ends(t)
	r.Give(t, rig.Far4)
	serveEnds(t, r, program, ":8001")
	vip := netip.AddrPortFrom(vip4, 80)
	i := r.Run(t, "path: direct\nservices:\n"+service(vip, "", addrs(rig.Far4, 8001)...))
	i.Halt(t)
	cmd := r.Command(program, "load", "4", "80", vip4.String())
	stop, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	cmd.Stdout = &out
	if err := r.Start(cmd); err != nil {
		t.Fatal(err)
	}
	ended := pinnedTally(t, i)
	testutil.Eventually(t, rig.Limit, func() bool { return ended() > 0 }, "events are lost")
	stop.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	i.Signal(t, unix.SIGCONT)
	var done, failed int
	fmt.Sscan(out.String(), &done, &failed)
	if done == 0 || failed != 0 {
		t.Errorf("%d connections, %d of them failed", done, failed)
	}
	recorded := 0
	testutil.Eventually(t, rig.Limit, func() bool {
		recorded = int(i.Series(t)[`pillion_records_lost_total{where="ring"}`])
		for _, total := range i.Totals(t) {
			recorded += total.Count
		}
		return recorded == done
	}, "of ", done, " connections are on record or counted as lost: ", number{&recorded})
	s, err := i.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(strings.Join(s.Problems, "\n"), "lost") {
		t.Errorf("status says %q", s.Problems)
	}
	if n := liveOf(t, i, vip.String()); n != 0 {
		t.Errorf("%d are counted as open", n)
	}
}

// TestFaultDiscovery: who tells the endpoints is gone, the endpoints stay.
func TestFaultDiscovery(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "dnsmasq")
	r, program := rig.New(t), ends(t)
	r.Give(t, rig.Far4)
	serveEnds(t, r, program, ":8001")
	file := filepath.Join(t.TempDir(), "endpoints.json")
	put(t, file, addrs(rig.Far4, 8001)...)
	cmd := exec.Command("dnsmasq", "--no-daemon", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--user=root",
		"--listen-address="+testutil.WorldV4.Addr().String(), "--bind-interfaces", "--local-ttl=1", "--host-record=shop.test,"+rig.Far4.String())
	p := rig.StartProcess(t, r.World, cmd, unix.SIGTERM)
	testutil.Eventually(t, rig.Limit, func() bool { p.Running(t); return strings.Contains(p.Log.String(), "started") }, "dnsmasq listens")
	config := "path: direct\nservices:\n" +
		fmt.Sprintf("  - {name: file, address: \"10.96.0.12:80\", discover: {file: %s}}\n", file) +
		fmt.Sprintf("  - {name: dns, address: \"10.96.0.12:81\", discover: {dns: {name: shop.test., port: 8001, min_ttl: 1s, max_ttl: 1s, servers: [%s]}}}\n", testutil.WorldV4.Addr())
	i := r.Run(t, config)
	a := captive(t, r)
	a.wants("ok", "dial(%q, 80)", vip4)
	a.wants("ok", "dial(%q, 81)", vip4)
	p.Kill(t)
	if err := unix.Unlink(file); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"file", "dns"} {
		testutil.Eventually(t, 2*rig.Limit, func() bool {
			_, source := endpointsOf(t, i, name)
			return source.Stale && source.Error != ""
		}, name, " is stale")
		all, source := endpointsOf(t, i, name)
		if len(all) != 1 || all[0].State != "available" {
			t.Errorf("%s: %+v", name, all)
		}
		t.Logf("%s: %s", name, source.Error)
		if n := i.Series(t)[fmt.Sprintf(`pillion_discovery_stale{service=%q,source=%q}`, name, name)]; n != 1 {
			t.Errorf("%s: pillion_discovery_stale is %v", name, n)
		}
	}
	a.wants("ok", "dial(%q, 80)", vip4)
	a.wants("ok", "dial(%q, 81)", vip4)
	for _, f := range i.Ended(t, 4) {
		if f.Path != flow.PathDirect || f.Endpoint != netip.AddrPortFrom(rig.Far4, 8001) {
			t.Errorf("%+v", f)
		}
	}
	// A process that starts without any of them adopts no set: on_failure decides.
	put(t, file, addrs(rig.Far4, 8001)...)
	testutil.Eventually(t, rig.Limit, func() bool { _, source := endpointsOf(t, i, "file"); return !source.Stale }, "the file is back")
}
