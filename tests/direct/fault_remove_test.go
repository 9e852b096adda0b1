package direct

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// TestFaultRemove takes an endpoint away, by a rule for its connections each: only
// those end that Pillion sent there.
func TestFaultRemove(t *testing.T) {
	t.Parallel()
	r, program := rig.New(t), ends(t)
	r.Give(t, rig.Far4)
	serveEnds(t, r, program, ":8001", ":8002")
	file := filepath.Join(t.TempDir(), "p.yaml")
	gone := netip.AddrPortFrom(rig.Far4, 8001)
	hows := map[uint16]string{80: "keep", 81: "reset", 82: "close, remove_after: 500ms", 83: "reset"}
	write := func(endpoint netip.AddrPort) {
		t.Helper()
		text := fmt.Sprintf("path: direct\nexclude: [%q]\nservices:\n", gone)
		for port := uint16(80); port < 84; port++ {
			to := endpoint
			if port == 83 {
				to = gone // it stays
			}
			text += service(netip.AddrPortFrom(vip4, port), ", on_remove: "+hows[port], to)
		}
		replace(t, file, text)
	}
	write(gone)
	i := r.Run(t, "", "--config", file)
	a, stranger := captive(t, r), newApp(t, testutil.Place{NS: r.App, Cgroup: testutil.NewCgroup(t)})
	for port := range hows {
		a.wants("ok", "dial(%q, %d, %d)", vip4, port, port)
	}
	a.wants("ok", "dial(%q, 8001, 'passed')", rig.Far4)
	stranger.wants("ok", "dial(%q, 8001, 'own')", rig.Far4)
	write(netip.AddrPortFrom(rig.Far4, 8002))
	if out, err := i.Reload(context.Background()); err != nil || len(out.Refused) > 0 {
		t.Fatalf("%+v, %v", out, err)
	}
	a.wants("ECONNABORTED", "ask(81)")
	testutil.Eventually(t, rig.Limit, func() bool { return a.do("ask(82)") == "ECONNABORTED" }, "a connection is closed after its time")
	for _, name := range []string{"80", "83", "'passed'"} {
		a.wants("hello", "ask(%s)", name)
	}
	stranger.wants("hello", "ask('own')")
	// A new one goes to where the service is now.
	a.wants("ok", "dial(%q, 81, 'new')", vip4)
	if got := endpointOf(t, i, a, "'new'"); got.Port() != 8002 {
		t.Errorf("a new connection goes to %s", got)
	}
	// The endpoint is told for as long as somebody is there.
	all, _ := endpointsOf(t, i, netip.AddrPortFrom(vip4, 80).String())
	removed := 0
	for _, e := range all {
		if e.Address == gone.String() && e.State == admin.EndpointRemoved && e.Live == 1 {
			removed++
		}
	}
	if removed != 1 {
		t.Errorf("endpoints with a connection to one that is removed: %+v", all)
	}
	if n := i.Series(t)["pillion_endpoint_removed_connections_total"]; n != 2 {
		t.Errorf("%v connections were ended, want 2", n)
	}
	for _, f := range i.Ended(t, 2) {
		if f.Endpoint != gone || f.Path != flow.PathDirect {
			t.Errorf("%+v", f)
		}
	}
}

// TestFaultTwoInstances: two scopes with the same services, on the fewest
// capabilities, do not disturb each other.
func TestFaultTwoInstances(t *testing.T) {
	t.Parallel()
	r, program := rig.New(t), ends(t)
	r.Home = testutil.Place{}.With(unix.CAP_BPF, unix.CAP_NET_ADMIN)
	other := r.Beside(t)
	r.Give(t, rig.Far4)
	serveEnds(t, r, program, ":8001", ":8002", ":8003")
	vip := netip.AddrPortFrom(vip4, 80)
	dir := t.TempDir()
	one, two := filepath.Join(dir, "one.yaml"), filepath.Join(dir, "two.yaml")
	write := func(file string, endpoints ...netip.AddrPort) {
		t.Helper()
		replace(t, file, "path: direct\nservices:\n"+service(vip, ", on_remove: reset, policy: round_robin", endpoints...))
	}
	write(one, addrs(rig.Far4, 8001, 8003)...)
	write(two, addrs(rig.Far4, 8002, 8003)...)
	i, j := r.Run(t, "", "--config", one), other.Run(t, "", "--config", two)
	a, b := captive(t, r), captive(t, other)
	for n := range 4 {
		a.wants("ok", "dial(%q, 80, %d)", vip4, n)
		b.wants("ok", "dial(%q, 80, %d)", vip4, n)
	}
	at := func(i *rig.Instance, port uint16) (live int64) {
		all, _ := endpointsOf(t, i, vip.String())
		for _, e := range all {
			if e.Address == netip.AddrPortFrom(rig.Far4, port).String() {
				live += e.Live
			}
		}
		return live
	}
	counted := func(what string, want ...int64) {
		t.Helper()
		got := []int64{at(i, 8001), at(i, 8003), at(j, 8002), at(j, 8003)}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: %v are open, want %v", what, got, want)
		}
	}
	counted("at first", 2, 2, 2, 2)
	if n := at(i, 8002) + at(j, 8001); n != 0 {
		t.Errorf("%d connections went to the other's endpoint", n)
	}
	// The one takes an endpoint away that both have.
	write(one, addrs(rig.Far4, 8001)...)
	if _, err := i.Reload(context.Background()); err != nil {
		t.Fatal(err)
	}
	counted("after a removal", 2, 0, 2, 2)
	for n := range 4 {
		b.wants("hello", "ask(%d)", n)
	}
	flows, err := i.Flows(context.Background(), admin.FlowQuery{Live: true})
	if err != nil {
		t.Fatal(err)
	}
	if len(flows) != 2 {
		t.Errorf("the one has %d live flows, want its own 2", len(flows))
	}
	// The one is killed, and taken over, and ends.
	i.Kill(t)
	b.wants("ok", "dial(%q, 80, 'meanwhile')", vip4)
	a.wants("ok", "dial(%q, 80, 'meanwhile')", vip4)
	i.Launch(t)
	if got := at(i, 8001); got != 3 {
		t.Errorf("after a crash %d are open, want 3", got)
	}
	if x := explained(t, i, vip.String()); x.Pick.Port() != 8001 {
		t.Errorf("%+v", x)
	}
	i.Conserved(t)
	if err := i.Stop(t); err != nil {
		t.Errorf("run: %v", err)
	}
	b.wants("ok", "dial(%q, 80, 'after')", vip4)
	b.wants("hello", "ask('after')")
	if got := endpointOf(t, j, b, "'after'"); got.Port() == 8001 {
		t.Errorf("it went to %s", got)
	}
}
