package direct

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// swapped is the world of tests in which endpoint sets are replaced under load.
type swapped struct {
	*rig.Rig
	program, file, config, log string
	service                    netip.AddrPort
	// two sets, without an endpoint in common
	sets [2][]netip.AddrPort
}

func newSwapped(t testing.TB) *swapped {
	t.Helper()
	dir := t.TempDir()
	s := &swapped{
		Rig: rig.New(t), program: ends(t), service: netip.AddrPortFrom(vip4, 80),
		file: filepath.Join(dir, "endpoints.json"), config: filepath.Join(dir, "p.yaml"), log: filepath.Join(dir, "flows.jsonl"),
	}
	other := netip.MustParseAddr("198.51.100.8")
	s.Give(t, rig.Far4)
	s.Give(t, other)
	// An endpoint that is half of one and half of another refuses.
	serveEnds(t, s.Rig, s.program, fmt.Sprintf("%s:8001", rig.Far4), fmt.Sprintf("%s:8002", rig.Far4), "198.51.100.8:8003", "198.51.100.8:8004")
	s.sets = [2][]netip.AddrPort{addrs(rig.Far4, 8001, 8002), addrs(other, 8003, 8004)}
	put(t, s.file, s.sets[0]...)
	return s
}

// write writes the configuration with a set, which is one of its endpoints or, of
// nil, in the file.
func (s *swapped) write(t testing.TB, set []netip.AddrPort) {
	t.Helper()
	text := fmt.Sprintf("path: direct\nflow_log: %s\nservices:\n", s.log)
	if set == nil {
		text += fmt.Sprintf("  - {name: %q, address: %q, discover: {file: %s}, policy: random}\n", s.service, s.service, s.file)
	} else {
		text += service(s.service, ", policy: random", set...)
	}
	replace(t, s.config, text)
}

// run starts Pillion with what was written.
func (s *swapped) run(t testing.TB) *rig.Instance {
	t.Helper()
	return s.Run(t, "", "--config", s.config)
}

// endpointsOf are the endpoints of a service by status.
func endpointsOf(t testing.TB, i *rig.Instance, name string) (all []admin.EndpointStatus, source admin.SourceStatus) {
	t.Helper()
	s, err := i.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range s.Services {
		if v.Name == name {
			return v.Endpoints, v.Source
		}
	}
	t.Fatalf("there is no service %s", name)
	return nil, source
}

// swap replaces the set by reloads, a hundred times a second as far as they go that
// fast, until done, and leaves the first one.
func (s *swapped) swap(t testing.TB, i *rig.Instance, done func(swaps int) bool) (swaps int) {
	t.Helper()
	start := time.Now()
	for !done(swaps) || swaps%2 != 0 {
		swaps++
		// What took longer is made up for.
		time.Sleep(time.Until(start.Add(time.Duration(swaps) * 10 * time.Millisecond)))
		s.write(t, s.sets[swaps%2])
		r, err := i.Reload(context.Background())
		if err != nil || len(r.Refused) > 0 {
			t.Fatalf("reload: %+v, %v", r, err)
		}
	}
	return swaps
}

// only fails the test if a connection went anywhere but to the sets, and returns
// how many there are on record.
func (s *swapped) only(t testing.TB) (to map[netip.AddrPort]int) {
	t.Helper()
	to = map[netip.AddrPort]int{}
	for _, r := range logged(t, s.log) {
		if r.OrigDst != s.service {
			continue
		}
		if r.Path != flow.PathDirect || !slices.Contains(slices.Concat(s.sets[0], s.sets[1]), r.Endpoint) {
			t.Errorf("%+v", r)
		}
		to[r.Endpoint]++
	}
	return to
}

// TestFaultSwap replaces the endpoint set a hundred times a second during 20,000
// connects: none fails, none goes anywhere else, and when it is told that a set
// holds nobody goes to the other.
func TestFaultSwap(t *testing.T) {
	const connects, swaps = 20_000, 300
	s := newSwapped(t)
	s.write(t, s.sets[0])
	i := s.run(t)
	l := press(t, s.Rig, s.program, 2, s.service)
	began := time.Now()
	done := s.swap(t, i, func(n int) bool {
		return n >= swaps && n%50 == 0 && (int(i.Series(t)["pillion_connects_total"]) >= connects || time.Since(began) > 2*rig.Limit)
	})
	took := time.Since(began)
	conns := l.end()
	t.Logf("%d connections, %d swaps in %v: %.0f a second", conns, done, took, float64(done)/took.Seconds())
	if conns < connects {
		t.Errorf("%d connects, want %d", conns, connects)
	}
	m := i.Series(t)
	var before map[netip.AddrPort]int
	recorded := func() bool {
		sum := int(m[`pillion_records_lost_total{where="ring"}`] + m[`pillion_records_lost_total{where="flowlog"}`])
		before = s.only(t)
		for _, k := range before {
			sum += k
		}
		return sum >= conns
	}
	testutil.Eventually(t, rig.Limit, recorded, "every connection is on record")
	for _, e := range slices.Concat(s.sets[0], s.sets[1]) {
		if before[e] == 0 {
			t.Errorf("nobody went to %s", e)
		}
	}
	// The set that is told is the one that holds.
	for n, set := range [][]netip.AddrPort{s.sets[1], s.sets[0], s.sets[1]} {
		s.write(t, set)
		if _, err := i.Reload(context.Background()); err != nil {
			t.Fatal(err)
		}
		for range 10 {
			if x := explained(t, i, s.service.String()); !slices.Contains(set, x.Pick) {
				t.Errorf("round %d: %s is picked, want one of %v", n, x.Pick, set)
			}
		}
	}
}

// explained asks about one destination.
func explained(t testing.TB, i *rig.Instance, dst string) admin.Explanation {
	t.Helper()
	all, err := i.Explain(context.Background(), admin.ExplainQuery{Destination: dst})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 1 {
		t.Fatalf("%s: %d answers", dst, len(all))
	}
	return all[0]
}
