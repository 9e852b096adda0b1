package upstream

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/health"
)

func addr6(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: byte(i)}), 80)
}

// zoned is a cluster of six: v4 and v6 in turn, the first four in the zone "here".
func zoned(policy flow.Policy) ClusterSpec {
	s := ClusterSpec{Name: "a", Policy: policy, Hash: flow.HashDestination, Zone: "here"}
	for i := range 6 {
		e := EndpointSpec{Addr: addr(i), Weight: uint32(i + 1), Zone: "here"}
		if i%2 == 1 {
			e.Addr = addr6(i)
		}
		if i >= 4 {
			e.Zone = "there"
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

// What the kernel side gets is one family, with the health of now.
// What never ejects has no waits: those that are left over from the defaults need not
// go together, and the kernel side would refuse them.
func TestSetWithoutEjection(t *testing.T) {
	h := health.Config{Base: time.Minute, Max: 30 * time.Second}
	s := build(t, nil, Options{Health: h}, ClusterSpec{Name: "a", Endpoints: []EndpointSpec{{Addr: netip.MustParseAddrPort("10.0.0.1:80"), Weight: 1}}})
	if set := s.Cluster("a").Set(true); set.Failures != 0 || set.Base != 0 || set.Max != 0 {
		t.Errorf("failures %d, base %s, max %s", set.Failures, set.Base, set.Max)
	}
}

func TestSet(t *testing.T) {
	h := health.Config{Failures: 3, Base: time.Second, Max: time.Minute, Panic: 20}
	for _, policy := range flow.Policies() {
		c := build(t, nil, options(h), zoned(policy)).Cluster("a")
		c.Endpoints[2].SetDown(true)
		c.Endpoints[3].SetDown(true)
		for _, v4 := range []bool{true, false} {
			s := c.Set(v4)
			if s.Policy != policy || s.Hash != flow.HashDestination || s.Failures != 3 || s.Base != time.Second ||
				s.Max != time.Minute || s.Panic != 20 {
				t.Errorf("%s: settings %+v", policy, s)
			}
			if s.Tiers[0].Count != 2 || s.Tiers[1].Count != 1 || len(s.Endpoints) != 3 {
				t.Fatalf("%s: tiers %+v", policy, s.Tiers)
			}
			for i, e := range s.Endpoints {
				of := c.Endpoints[2*i]
				if !v4 {
					of = c.Endpoints[2*i+1]
				}
				if e.Addr != of.Addr || uint32(e.Weight) != of.Weight || e.Down != of.Down() {
					t.Errorf("%s: endpoint %d is %+v, want %+v", policy, i, e, of.State())
				}
			}
			if hasTable := policy == flow.PolicyRoundRobin || policy == flow.PolicyMaglev; hasTable != (len(s.Tiers[0].Table) > 0) {
				t.Errorf("%s: a table of %d", policy, len(s.Tiers[0].Table))
			}
			// Of 1+3 and of 2+4 the first is left.
			can := 1.4 / 4
			if !v4 {
				can = 1.4 * 2 / 6
			}
			if got := float64(s.Spill) / flow.All; math.Abs(got-(1-can)) > 1e-6 {
				t.Errorf("%s: %v spill, want %v", policy, got, 1-can)
			}
		}
		c.Endpoints[2].SetDown(false)
		if s := c.Set(true); s.Endpoints[1].Down || s.Spill != 0 {
			t.Errorf("%s: up again, and yet %+v", policy, s)
		}
	}
}

// A cluster of one family is one arrangement, and the other family has none.
func TestSetOfOneFamily(t *testing.T) {
	c := build(t, nil, options(anHour), spec("a", flow.PolicyMaglev, 4)).Cluster("a")
	if v4 := c.Set(true); &v4.Tiers[0].Table[0] != &c.layout.all.set.Tiers[0].Table[0] {
		t.Error("what is there already is arranged again")
	}
	if v6 := c.Set(false); len(v6.Endpoints) != 0 || v6.Tiers[0].Count != 0 {
		t.Errorf("endpoints of the other family: %+v", v6)
	}
}

// An endpoint on a link is none of the kernel side's, which cannot dial there.
func TestSetWithoutLinks(t *testing.T) {
	s := spec("a", flow.PolicyRandom, 2)
	link := EndpointSpec{Addr: netip.MustParseAddrPort("[fe80::1%eth0]:80"), Weight: 1}
	far := EndpointSpec{Addr: netip.MustParseAddrPort("[2001:db8::1]:80"), Weight: 1}
	s.Endpoints = append(slices.Clone(s.Endpoints), link, far)
	c := build(t, nil, options(anHour), s).Cluster("a")
	if v6 := c.Set(false); len(v6.Endpoints) != 1 || v6.Endpoints[0].Addr != far.Addr || v6.Tiers[0].Count != 1 {
		t.Errorf("the set is %+v", v6)
	}
	if len(c.Endpoints) != 4 {
		t.Errorf("the handler has %d endpoints", len(c.Endpoints))
	}
}

// A reload that changes nothing of a cluster leaves the cluster, and one that
// changes no endpoint leaves the arrangement.
func TestReloadKeeps(t *testing.T) {
	first := build(t, nil, options(anHour), zoned(flow.PolicyMaglev), spec("b", inOrder, 2))
	a := first.Cluster("a")
	table := func(c *Cluster) *uint32 { return &c.Set(true).Tiers[0].Table[0] }
	second := build(t, first, options(anHour), spec("b", inOrder, 3), zoned(flow.PolicyMaglev))
	if second.Cluster("a") != a || second.Cluster("b") == first.Cluster("b") {
		t.Error("the cluster is another, or is the same with other endpoints")
	}
	h := anHour
	h.Panic = 10
	for name, change := range map[string]func(s *ClusterSpec, o *Options){
		"health":   func(_ *ClusterSpec, o *Options) { o.Health = h },
		"hash":     func(s *ClusterSpec, _ *Options) { s.Hash = flow.HashSource },
		"errno":    func(s *ClusterSpec, _ *Options) { s.NoEndpoint = 110 },
		"policy":   func(s *ClusterSpec, _ *Options) { s.Policy = flow.PolicyRoundRobin },
		"zone":     func(s *ClusterSpec, _ *Options) { s.Zone = "there" },
		"endpoint": func(s *ClusterSpec, _ *Options) { s.Endpoints[0].Weight = 9 },
	} {
		s, o := zoned(flow.PolicyMaglev), options(anHour)
		s.Endpoints = slices.Clone(s.Endpoints)
		change(&s, &o)
		c := build(t, second, o, s).Cluster("a")
		arranged := slices.Contains([]string{"policy", "zone", "endpoint"}, name)
		if c == a || (table(c) != table(a)) != arranged {
			t.Errorf("%s: the cluster is the same, or not arranged as it should be", name)
		}
	}
	// Wrong settings are found although the endpoints are old.
	bad := zoned(flow.PolicyMaglev)
	bad.Hash = 9
	if _, err := Build(second, []ClusterSpec{bad}, options(anHour)); err == nil {
		t.Error("no error")
	}
}

// Replaced over and over, a set goes on where it was: the first endpoints do not
// get more than their share, and what is known of each stays known.
func TestReplaced(t *testing.T) {
	s := build(t, nil, options(anHour), spec("a", inOrder, 5))
	counts := make(map[netip.AddrPort]int)
	s.Cluster("a").Endpoints[1].Begin()
	s.Cluster("a").Endpoints[3].SetDown(true)
	fail(s.Cluster("a").Endpoints[4], flow.ReasonDialRefused)
	for i := range 300 {
		// Another endpoint comes and goes.
		n := spec("a", inOrder, 5+i%2)
		s = build(t, s, options(anHour), n)
		for _, e := range attempts(t, s.Cluster("a"), 0, 1) {
			counts[e.Addr]++
		}
	}
	got := s.Cluster("a").Endpoints
	if got[1].Live() != 1 || !got[3].Down() || !got[4].State().Ejected || got[0].Down() {
		t.Errorf("what was known is forgotten: %+v %+v %+v", got[1].State(), got[3].State(), got[4].State())
	}
	for i := range 3 {
		if counts[addr(i)] < 60 {
			t.Errorf("endpoint %d was picked %d times of 300", i, counts[addr(i)])
		}
	}
	if counts[addr(3)]+counts[addr(4)] > 0 {
		t.Errorf("what is out was picked: %v", counts)
	}
}

// What is down is not picked, in panic neither, and counts as no ejection.
func TestDown(t *testing.T) {
	h := anHour
	h.Panic = 50
	for _, h := range []health.Config{anHour, h, {}, {Panic: 50}} {
		for _, policy := range flow.Policies() {
			c := build(t, nil, options(h), spec("a", policy, 4)).Cluster("a")
			for _, e := range c.Endpoints[:3] {
				e.SetDown(true)
				e.SetDown(true)
			}
			for key := range uint32(50) {
				if got := attempts(t, c, flow.Mix(key), 1)[0]; got != c.Endpoints[3] {
					t.Fatalf("%s, %+v: %s is picked", policy, h, got.Addr)
				}
			}
			if c.Wait() != 0 {
				t.Errorf("%s: waits %s", policy, c.Wait())
			}
			c.Endpoints[3].SetDown(true)
			if e, err := c.Pick(0, nil); !errors.Is(err, ErrNoEndpoint) {
				t.Errorf("%s: %v, %v with all down", policy, e, err)
			}
			if got := c.Wait(); got != time.Second {
				t.Errorf("%s: waits %s for somebody to come up", policy, got)
			}
			c.Endpoints[0].SetDown(false)
			if e, err := c.Pick(0, nil); err != nil || e != c.Endpoints[0] || c.Wait() != 0 {
				t.Errorf("%s: %v, %v with one up again", policy, e, err)
			}
			if s := c.Endpoints[1].State(); !s.Down || s.Ejected || s.Ejections != 0 {
				t.Errorf("%s: %+v", policy, s)
			}
		}
	}
}

// The panic threshold is a share of what is not down.
func TestPanicWithoutTheDown(t *testing.T) {
	h := anHour
	h.Panic = 50
	c := build(t, nil, options(h), spec("a", flow.PolicyRandom, 10)).Cluster("a")
	for _, e := range c.Endpoints[:6] {
		e.SetDown(true)
	}
	fail(c.Endpoints[6], flow.ReasonDialRefused)
	if c.Endpoints[6].Available() {
		t.Error("panics with three of four left")
	}
	for _, e := range c.Endpoints[7:9] {
		fail(e, flow.ReasonDialRefused)
	}
	if !c.Endpoints[6].Available() || c.Endpoints[0].Available() {
		t.Error("with one of four left, the ejected may be picked, and the down may not")
	}
	fail(c.Endpoints[9], flow.ReasonDialRefused)
	if c.Wait() != 0 || !c.Endpoints[9].Available() {
		t.Error("with all of the others ejected, they may be picked")
	}
}

// Where ejections hold, the shorter wait counts: for the end of one, or for a check.
func TestWait(t *testing.T) {
	for name, c := range map[string]struct {
		wait time.Duration
		down int
		want time.Duration
	}{
		"all ejected":     {time.Minute, 0, time.Minute},
		"one is down":     {time.Minute, 1, time.Second},
		"ejected shortly": {time.Millisecond, 1, time.Millisecond},
	} {
		o := options(health.Config{Failures: 1, Base: c.wait, Max: c.wait})
		o.Random = func() uint64 { return 0 }
		cl := build(t, nil, o, spec("a", inOrder, 3)).Cluster("a")
		for i, e := range cl.Endpoints {
			if i < c.down {
				e.SetDown(true)
				continue
			}
			fail(e, flow.ReasonDialRefused)
		}
		if got := cl.Wait(); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
	if got := build(t, nil, options(anHour), spec("a", inOrder, 0)).Cluster("a").Wait(); got != time.Second {
		t.Errorf("without endpoints: %s", got)
	}
}

// Spill follows every change: down, ejection, the end of one, and their panic.
func TestSpill(t *testing.T) {
	var now clock
	h := health.Config{Failures: 1, Base: time.Second, Max: time.Second}
	o := options(h)
	o.Now = now.read
	s := ClusterSpec{Name: "a", Policy: flow.PolicyRandom, Zone: "here"}
	for i := range 20 {
		s.Endpoints = append(s.Endpoints, EndpointSpec{Addr: addr(i), Weight: 1, Zone: []string{"here", "there"}[i/10]})
	}
	snapshot := build(t, nil, o, s)
	c := snapshot.Cluster("a")
	check := func(when string, out int) {
		t.Helper()
		want := max(0, 1-float64(10-out)/10*1.4)
		for range 2 { // the second is remembered
			if got := float64(c.Spill()) / flow.All; math.Abs(got-want) > 1e-6 {
				t.Errorf("%s: %v spill, want %v", when, got, want)
			}
		}
		const n = 20000
		remote := 0
		for range n {
			if attempts(t, c, 0, 1)[0].Zone != "here" {
				remote++
			}
		}
		if slack := 5 * math.Sqrt(n*want*(1-want)); math.Abs(float64(remote)-n*want) > slack {
			t.Errorf("%s: %d of %d are picked elsewhere, want %.0f +- %.0f", when, remote, n, n*want, slack)
		}
	}
	check("at first", 0)
	for i := range 2 {
		c.Endpoints[i].SetDown(true)
	}
	check("two down", 2)
	for i := 2; i < 6; i++ {
		fail(c.Endpoints[i], flow.ReasonDialRefused)
	}
	check("and four ejected", 6)
	snapshot = build(t, snapshot, o, s)
	c = snapshot.Cluster("a")
	check("after a reload", 6)
	now.pass(time.Second)
	check("four on trial", 2)
	for i := range 10 {
		c.Endpoints[i].SetDown(true)
	}
	check("all down", 10)
	for i := 10; i < 20; i++ {
		c.Endpoints[i].SetDown(true)
	}
	c.Endpoints[0].SetDown(false)
	for range 50 {
		if e := attempts(t, c, 0, 1)[0]; e != c.Endpoints[0] {
			t.Fatalf("%s is picked, and only one here is up", e.Addr)
		}
	}
	o.Health = health.Config{Failures: 1, Base: time.Hour, Max: time.Hour, Panic: 50}
	c = build(t, snapshot, o, s).Cluster("a")
	for _, e := range c.Endpoints {
		e.SetDown(false)
		fail(e, flow.ReasonDialRefused)
	}
	if c.Spill() != 0 {
		t.Error("in panic the local zone has all")
	}
}

// The key is the hash that the policy goes by, and other policies have none.
func TestKey(t *testing.T) {
	d := &flow.Downstream{
		Source:  netip.MustParseAddrPort("192.0.2.7:4000"),
		OrigDst: flow.OrigDst{AddrPort: netip.MustParseAddrPort("10.0.0.1:80")},
	}
	for _, policy := range flow.Policies() {
		for _, on := range flow.HashOns() {
			s := spec("a", policy, 3)
			s.Hash = on
			var want uint32
			switch {
			case policy != flow.PolicyMaglev:
			case on == flow.HashSource:
				want = flow.Hash(netip.MustParseAddr("192.0.2.7"), 0)
			default:
				want = flow.Hash(netip.MustParseAddr("10.0.0.1"), 80)
			}
			if got := build(t, nil, options(anHour), s).Cluster("a").Key(d); got != want {
				t.Errorf("%s by %s: %#x, want %#x", policy, on, got, want)
			}
		}
	}
}

func TestRemoved(t *testing.T) {
	first := build(t, nil, options(anHour), spec("a", inOrder, 3), spec("b", inOrder, 2), spec("same", byKey, 2))
	next := spec("a", byKey, 3)
	next.Endpoints = next.Endpoints[1:]
	next.Endpoints[0].Weight = 7
	next.Endpoints[1].Addr = addr(9)
	second := build(t, first, options(anHour), next, spec("same", byKey, 2), spec("new", inOrder, 1))
	names := func(gone []Removal) (all []string) {
		for _, r := range gone {
			all = append(all, r.Cluster+" "+r.Endpoint.Addr.String())
		}
		return all
	}
	for name, c := range map[string]struct {
		old, new *Snapshot
		want     []string
	}{
		"reload":  {first, second, []string{"a 192.0.2.0:80", "a 192.0.2.2:80", "b 192.0.2.0:80", "b 192.0.2.1:80"}},
		"none":    {first, first, nil},
		"start":   {nil, first, nil},
		"the end": {second, nil, []string{"a 192.0.2.1:80", "a 192.0.2.9:80", "new 192.0.2.0:80", "same 192.0.2.0:80", "same 192.0.2.1:80"}},
	} {
		if diff := cmp.Diff(c.want, names(Removed(c.old, c.new))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	// Gone and back, it is another one: the old one's connections are to end.
	empty := build(t, first, options(anHour))
	back := build(t, empty, options(anHour), spec("b", inOrder, 2))
	if got := Removed(first, back); !slices.Contains(names(got), "b 192.0.2.0:80") {
		t.Errorf("%v", names(got))
	}
}

// A cluster of another name goes on with what it was.
func TestFormer(t *testing.T) {
	o := options(anHour)
	first := build(t, nil, o, spec("a", inOrder, 3), spec("b", inOrder, 1))
	before := first.Cluster("a").Endpoints
	before[0].SetDown(true)
	fail(before[1], flow.ReasonDialRefused)
	before[2].Begin()
	renamed := spec("c", inOrder, 3)
	renamed.Former = "a"
	second := build(t, first, o, renamed, spec("b", inOrder, 1))
	after := second.Cluster("c").Endpoints
	if !after[0].Down() || after[1].Available() || after[2].Live() != 1 || second.Cluster("c").Name != "c" {
		t.Errorf("%v, %v, %v", after[0].State(), after[1].State(), after[2].State())
	}
	if gone := Removed(first, second); len(gone) > 0 {
		t.Errorf("gone are %v", gone)
	}
	if second.Cluster("b") != first.Cluster("b") || second.Cluster("a") != nil {
		t.Error("the other one is another one, or the old name is there still")
	}
	renamed = spec("d", inOrder, 2)
	renamed.Former = "c"
	third := build(t, second, o, renamed)
	if gone := Removed(second, third); len(gone) != 2 || gone[0].Endpoint != second.Cluster("b").Endpoints[0] || gone[1].Endpoint != after[2] {
		t.Errorf("gone are %v", gone)
	}
}

// What a reload costs: 1,000 services of 100 endpoints of which nothing has
// changed, or one endpoint of one, or everything.
func BenchmarkBuild(b *testing.B) {
	for _, policy := range flow.Policies() {
		for name, change := range map[string]func(i int, specs []ClusterSpec){
			"same": func(int, []ClusterSpec) {},
			"one":  func(i int, specs []ClusterSpec) { specs[0].Endpoints[0].Weight = uint32(i%2 + 1) },
			"all": func(i int, specs []ClusterSpec) {
				for k := range specs {
					specs[k].Endpoints[0].Weight = uint32(i%2 + 1)
				}
			},
		} {
			b.Run(policy.String()+"/"+name, func(b *testing.B) {
				specs := make([]ClusterSpec, 1000)
				for k := range specs {
					specs[k] = spec(fmt.Sprint(k), policy, 100)
				}
				s := build(b, nil, Options{}, specs...)
				for i := 0; b.Loop(); i++ {
					change(i, specs)
					s = build(b, s, Options{}, specs...)
				}
			})
		}
	}
}
