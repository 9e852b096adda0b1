package upstream

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/health"
)

// The policies of which it is easy to foretell something.
const (
	inOrder = flow.PolicyRoundRobin // the available endpoints in order, from the first
	byKey   = flow.PolicyMaglev     // for one key always the same
)

type clock struct{ now atomic.Int64 }

func (c *clock) read() time.Duration  { return time.Duration(c.now.Load()) }
func (c *clock) pass(d time.Duration) { c.now.Add(int64(d)) }

func addr(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 80)
}

// spec describes a cluster of n endpoints at addr(0) and so on.
func spec(name string, policy flow.Policy, n int) ClusterSpec {
	s := ClusterSpec{Name: name, Policy: policy}
	for i := range n {
		s.Endpoints = append(s.Endpoints, EndpointSpec{Addr: addr(i), Weight: 1})
	}
	return s
}

var anHour = health.Config{Failures: 1, Base: time.Hour, Max: time.Hour}

// options have a clock that stands still, and the same numbers in every run.
func options(h health.Config) Options {
	var mu sync.Mutex
	random := rand.New(rand.NewPCG(1, 2))
	return Options{
		Health: h,
		Now:    func() time.Duration { return 1 },
		Random: func() uint64 {
			mu.Lock()
			defer mu.Unlock()
			return random.Uint64()
		},
	}
}

func build(t testing.TB, old *Snapshot, o Options, specs ...ClusterSpec) *Snapshot {
	t.Helper()
	s, err := Build(old, specs, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func fail(e *Endpoint, reason flow.Reason) {
	e.Begin()
	e.Failed(reason)
	e.End()
}

func TestBuildErrors(t *testing.T) {
	twice := spec("twice", inOrder, 2)
	twice.Endpoints[1].Addr = netip.AddrPortFrom(netip.AddrFrom16(addr(0).Addr().As16()), 80)
	weightless := spec("weightless", inOrder, 2)
	weightless.Endpoints[0].Weight = 0
	weightless.Endpoints[1].Weight = 65536
	crowd := spec("crowd", inOrder, 0)
	for i := range flow.SetEndpoints + 1 {
		a := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 80)
		crowd.Endpoints = append(crowd.Endpoints, EndpointSpec{Addr: a, Weight: 1})
	}
	nowhere := spec("nowhere", 99, 2)
	nowhere.Endpoints[0].Addr = netip.AddrPort{}
	nowhere.Endpoints[1].Addr = netip.AddrPortFrom(addr(1).Addr(), 0)

	s, err := Build(nil, []ClusterSpec{twice, weightless, nowhere, spec("twice", inOrder, 0), crowd}, options(health.Config{Panic: 101}))
	if s != nil || err == nil {
		t.Fatalf("%v, %v", s, err)
	}
	want := []string{
		"health: panic 101 is no percentage",
		`cluster "twice": endpoint 192.0.2.0:80: listed twice`,
		`cluster "weightless": endpoint 192.0.2.0:80: weight 0`,
		"endpoint 192.0.2.1:80: weight 65536: want at most 65535",
		`cluster "nowhere": unknown policy(99)`,
		"endpoint invalid AddrPort: not an address and a port",
		"endpoint 192.0.2.1:0: not an address and a port",
		`cluster "twice": the name is taken`,
		`cluster "crowd": 16385 endpoints: want at most 16384`,
	}
	if diff := cmp.Diff(want, strings.Split(err.Error(), "\n")); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestClusters(t *testing.T) {
	s := build(t, nil, options(anHour), spec("c", inOrder, 1), spec("a", inOrder, 0), spec("b", inOrder, 2))
	var names []string
	for _, c := range s.Clusters() {
		names = append(names, c.Name)
		if s.Cluster(c.Name) != c {
			t.Errorf("cluster %s is not found by name", c.Name)
		}
	}
	if diff := cmp.Diff([]string{"a", "b", "c"}, names); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for _, name := range []string{"", "aa", "d"} {
		if c := s.Cluster(name); c != nil {
			t.Errorf("cluster %q is %v", name, c)
		}
	}
	var none *Snapshot
	if none.Cluster("a") != nil || none.Clusters() != nil {
		t.Error("a nil snapshot has clusters")
	}
	if e, err := s.Cluster("a").Pick(0, nil); e != nil || !errors.Is(err, ErrNoEndpoint) {
		t.Errorf("a cluster without endpoints picks %v, %v", e, err)
	}
}

// A snapshot takes over what is known about an endpoint, by cluster and
// address: its load, its health and its counts, whatever else changes.
func TestReload(t *testing.T) {
	first := build(t, nil, options(anHour), spec("a", inOrder, 2), spec("b", inOrder, 1))
	old := first.Cluster("a").Endpoints[0]
	old.Begin()
	old.Connected(time.Millisecond)
	fail(old, flow.ReasonDialTimeout)

	next := spec("a", byKey, 3)
	slices.Reverse(next.Endpoints)
	// The same address in mapped form, and with another weight.
	next.Endpoints[2] = EndpointSpec{Addr: netip.AddrPortFrom(netip.AddrFrom16(addr(0).Addr().As16()), 80), Weight: 5}
	second := build(t, first, options(anHour), next, spec("new", inOrder, 1))

	e := second.Cluster("a").Endpoints[2]
	want := EndpointState{
		Addr: addr(0), Weight: 5, Ejected: true, Live: 1, Connects: 1, Failures: 1, Ejections: 1,
		ConnectTime: time.Millisecond, LastReason: flow.ReasonDialTimeout,
	}
	if diff := cmp.Diff(want, e.State(), equal); diff != "" {
		t.Errorf("after the reload (-want +got):\n%s", diff)
	}
	// The connection began under the first snapshot and ends under it.
	old.End()
	if e.Live() != 0 {
		t.Errorf("%d connections after the last one ended", e.Live())
	}
	for _, fresh := range []*Endpoint{second.Cluster("a").Endpoints[0], second.Cluster("new").Endpoints[0]} {
		if diff := cmp.Diff(EndpointState{Addr: fresh.Addr, Weight: 1}, fresh.State(), equal); diff != "" {
			t.Errorf("%s is not new (-want +got):\n%s", fresh.Addr, diff)
		}
	}
	if second.Cluster("b") != nil || first.Cluster("b") == nil || old.State().Weight != 1 {
		t.Error("the snapshots are not of their own")
	}

	// Gone from its cluster, an endpoint is forgotten.
	third := build(t, build(t, second, options(anHour), spec("a", inOrder, 0)), options(anHour), spec("a", inOrder, 1))
	if diff := cmp.Diff(EndpointState{Addr: addr(0), Weight: 1}, third.Cluster("a").Endpoints[0].State(), equal); diff != "" {
		t.Errorf("back again (-want +got):\n%s", diff)
	}
}

var equal = cmpopts.EquateComparable(netip.AddrPort{})

// A reload keeps the clock of the first snapshot, or ejections would end at
// random.
func TestReloadKeepsTheClock(t *testing.T) {
	var c clock
	o := options(anHour)
	o.Now = c.read
	first := build(t, nil, o, spec("a", inOrder, 1))
	fail(first.Cluster("a").Endpoints[0], flow.ReasonDialRefused)

	o.Now = func() time.Duration { return 1000 * time.Hour }
	second := build(t, first, o, spec("a", inOrder, 1))
	if !second.Cluster("a").Endpoints[0].State().Ejected {
		t.Error("the reload brought a new clock")
	}
	c.pass(2 * time.Hour)
	if second.Cluster("a").Endpoints[0].State().Ejected {
		t.Error("the clock of the first snapshot is not asked")
	}
}

// A reload that never ejects frees whoever was, and the other way round.
func TestReloadChangesHealth(t *testing.T) {
	first := build(t, nil, options(anHour), spec("a", inOrder, 1))
	fail(first.Cluster("a").Endpoints[0], flow.ReasonDialRefused)
	second := build(t, first, options(health.Config{}), spec("a", inOrder, 1))
	e := second.Cluster("a").Endpoints[0]
	if !e.Available() || e.State().Ejected || first.Cluster("a").Endpoints[0].Available() {
		t.Error("a snapshot does not go by its own configuration")
	}
	third := build(t, second, options(anHour), spec("a", inOrder, 1))
	if third.Cluster("a").Endpoints[0].Available() {
		t.Error("the ejection is forgotten")
	}
}

// Only what says something about the endpoint counts towards its ejection.
func TestFailedReasons(t *testing.T) {
	counted := []flow.Reason{flow.ReasonDialRefused, flow.ReasonDialTimeout, flow.ReasonDialUnreachable}
	for _, reason := range flow.Reasons() {
		e := build(t, nil, options(anHour), spec("a", inOrder, 1)).Cluster("a").Endpoints[0]
		fail(e, reason)
		want := EndpointState{Addr: addr(0), Weight: 1, Failures: 1, LastReason: reason}
		if slices.Contains(counted, reason) {
			want.Ejected, want.Ejections = true, 1
		}
		if diff := cmp.Diff(want, e.State(), equal); diff != "" {
			t.Errorf("%s (-want +got):\n%s", reason, diff)
		}
	}
}

func TestState(t *testing.T) {
	e := build(t, nil, options(anHour), spec("a", inOrder, 1)).Cluster("a").Endpoints[0]
	for range 3 {
		e.Begin()
	}
	e.Connected(2 * time.Second)
	e.Connected(time.Second)
	e.End() // given up: neither connected nor failed
	want := EndpointState{Addr: addr(0), Weight: 1, Live: 2, Connects: 2, ConnectTime: time.Second}
	if diff := cmp.Diff(want, e.State(), equal); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// attempts picks for one connection n times, as the handler does.
func attempts(t *testing.T, c *Cluster, key uint32, n int) []*Endpoint {
	t.Helper()
	var tried []*Endpoint
	for range n {
		e, err := c.Pick(key, tried)
		if err != nil {
			t.Fatal(err)
		}
		tried = append(tried, e)
	}
	return tried
}

// Whatever the policy, the attempts of a connection go to different endpoints
// as long as there are any.
func TestRetriesDiffer(t *testing.T) {
	for _, policy := range flow.Policies() {
		for n := 1; n <= 6; n++ {
			c := build(t, nil, options(anHour), spec("a", policy, n)).Cluster("a")
			for key := range uint32(100) {
				seen := make(map[*Endpoint]bool)
				for _, e := range attempts(t, c, key, n) {
					seen[e] = true
				}
				if len(seen) != n {
					t.Errorf("%s: %d endpoints in %d attempts", policy, len(seen), n)
				}
				// With all of them tried, any will do, but there is one.
				attempts(t, c, key, n+3)
			}
		}
	}
}

// Another snapshot's endpoint of the same address was tried as well.
func TestRetryAfterReload(t *testing.T) {
	first := build(t, nil, options(anHour), spec("a", byKey, 2))
	again := spec("a", byKey, 2)
	slices.Reverse(again.Endpoints)
	second := build(t, first, options(anHour), again)
	for key := range uint32(100) {
		tried := attempts(t, first.Cluster("a"), key, 1)
		e, err := second.Cluster("a").Pick(key, tried)
		if err != nil || e.Addr == tried[0].Addr {
			t.Errorf("%v, %v: the reload made a new endpoint", e, err)
		}
	}
}

// In panic the first attempt may go to an ejected endpoint, a retry goes to one
// that is not, and to an ejected one when nothing else is left. One that is down
// gets neither.
func TestRetryInPanic(t *testing.T) {
	h := anHour
	h.Panic = 100
	c := build(t, nil, options(h), spec("a", byKey, 5)).Cluster("a")
	for _, e := range c.Endpoints[:2] {
		fail(e, flow.ReasonDialRefused)
	}
	c.Endpoints[4].SetDown(true)
	ejected := 0
	for key := range uint32(200) {
		got := attempts(t, c, key, 4)
		if got[0].ejected() {
			ejected++
		}
		rest := slices.DeleteFunc(slices.Clone(got[1:]), func(e *Endpoint) bool { return e.ejected() })
		if slices.Contains(got, c.Endpoints[4]) {
			t.Fatal("it goes to one that is down")
		}
		if want := 2; got[0].ejected() && (got[1].ejected() || got[2].ejected() || len(rest) != want) {
			t.Fatalf("the retries go to %s, %s and %s", got[1].Addr, got[2].Addr, got[3].Addr)
		}
		if !got[0].ejected() && (got[1].ejected() || !got[2].ejected()) {
			t.Fatalf("the retries go to %s, %s and %s", got[1].Addr, got[2].Addr, got[3].Addr)
		}
		slices.SortFunc(got, func(a, b *Endpoint) int { return a.Addr.Compare(b.Addr) })
		if len(slices.Compact(got)) != 4 {
			t.Fatalf("of four attempts two go to the same")
		}
	}
	// The policy is asked first: half of those that are up are ejected.
	if ejected < 60 || ejected > 140 {
		t.Errorf("%d of 200 first attempts go to an ejected endpoint", ejected)
	}
}

// Where ejections always hold, a retry does not break them either: it would
// rather try the same endpoint again.
func TestRetryNeverPanics(t *testing.T) {
	c := build(t, nil, options(anHour), spec("a", inOrder, 3)).Cluster("a")
	fail(c.Endpoints[0], flow.ReasonDialRefused)
	fail(c.Endpoints[1], flow.ReasonDialRefused)
	for _, e := range attempts(t, c, 0, 4) {
		if e != c.Endpoints[2] {
			t.Errorf("%s is ejected", e.Addr)
		}
	}
	fail(c.Endpoints[2], flow.ReasonDialRefused)
	if e, err := c.Pick(0, c.Endpoints[2:]); e != nil || !errors.Is(err, ErrNoEndpoint) {
		t.Errorf("with all ejected: %v, %v", e, err)
	}
}

// The neighbour of a dead endpoint does not get all of its connections.
func TestRetriesAreSpread(t *testing.T) {
	for _, policy := range []flow.Policy{flow.PolicyMaglev, flow.PolicyRandom, flow.PolicyLeastConnections} {
		c := build(t, nil, options(anHour), spec("a", policy, 5)).Cluster("a")
		const n = 4000
		counts := make(map[*Endpoint]int)
		for key := uint32(0); len(counts) == 0 || counts[c.Endpoints[0]] < n; key++ {
			got := attempts(t, c, flow.Mix(key), 2)
			if got[0] == c.Endpoints[0] {
				counts[c.Endpoints[0]]++
				counts[got[1]]++
			}
		}
		for i, e := range c.Endpoints[1:] {
			if got := counts[e]; got < n/4-150 || got > n/4+150 {
				t.Errorf("%s: endpoint %d has %d of %d retries, want about %d", policy, i+1, got, n, n/4)
			}
		}
	}
}

// What the policies do not find is found by looking at every one.
func TestRetryFindsTheLast(t *testing.T) {
	for _, policy := range flow.Policies() {
		c := build(t, nil, options(anHour), spec("a", policy, 100)).Cluster("a")
		for i := range 20 {
			tried := slices.Delete(slices.Clone(c.Endpoints), i, i+1)
			if e, err := c.Pick(uint32(i), tried); err != nil || e != c.Endpoints[i] {
				t.Errorf("%s: %v, %v, want %d", policy, e, err, i)
			}
		}
	}
}

func TestPickDoesNotAllocate(t *testing.T) {
	zoned := spec("a", byKey, 4)
	zoned.Zone, zoned.Endpoints[3].Zone = "here", "here"
	c := build(t, nil, options(anHour), zoned).Cluster("a")
	tried := c.Endpoints[:3]
	c.Endpoints[3].SetDown(true)
	if n := testing.AllocsPerRun(1000, func() {
		if _, err := c.Pick(1, tried); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Workers connect while the configuration is reloaded. What they began is what
// they ended, in every snapshot.
func TestRaceWithReloads(t *testing.T) {
	var c clock
	o := options(health.Config{Failures: 2, Base: time.Second, Max: 4 * time.Second, Panic: 50})
	o.Now = c.read
	var current atomic.Pointer[Snapshot]
	current.Store(build(t, nil, o, spec("a", inOrder, 4)))

	var workers sync.WaitGroup
	for w := range 8 {
		workers.Go(func() { connectAround(t, &current, rand.New(rand.NewPCG(uint64(w), 4))) })
	}
	for i := range 200 {
		c.pass(time.Second / 4)
		policy := inOrder
		if i%2 == 0 {
			policy = byKey
		}
		a := spec("a", policy, 4)
		a.Endpoints[i%4].Weight = uint32(i%3 + 1)
		a.Zone, a.Endpoints[i%4].Zone = "here", "here"
		current.Store(build(t, current.Load(), o, a, spec(fmt.Sprint("other", i), policy, 2)))
		c := current.Load().Cluster("a")
		c.Endpoints[0].SetDown(i%5 == 0)
		for _, e := range c.Endpoints {
			e.State()
		}
		c.Set(true)
	}
	workers.Wait()

	var connects, failures uint64
	for i, e := range current.Load().Cluster("a").Endpoints {
		s := e.State()
		if s.Live != 0 {
			t.Errorf("endpoint %d has %d connections left", i, s.Live)
		}
		connects += s.Connects
		failures += s.Failures
	}
	if connects+failures != 8*1000*2 {
		t.Errorf("%d dials connected and %d failed, want %d together", connects, failures, 8*1000*2)
	}
}

// connectAround makes 1000 connections of two attempts each.
func connectAround(t *testing.T, current *atomic.Pointer[Snapshot], random *rand.Rand) {
	for range 1000 {
		var tried []*Endpoint
		for len(tried) < 2 {
			e, err := current.Load().Cluster("a").Pick(random.Uint32(), tried)
			if errors.Is(err, ErrNoEndpoint) {
				continue // all of them were ejected between two looks
			}
			if err != nil {
				t.Error(err)
				return
			}
			tried = append(tried, e)
			e.Begin()
			if random.IntN(3) == 0 {
				e.Failed(flow.ReasonDialRefused)
			} else {
				e.Connected(time.Microsecond)
			}
			e.End()
		}
	}
}
