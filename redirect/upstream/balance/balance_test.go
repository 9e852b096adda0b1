package balance_test

import (
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/balance"
	"github.com/pillion-project/pillion/redirect/upstream/balance/balancetest"
)

func TestNames(t *testing.T) {
	if diff := cmp.Diff([]string{"least_connections", "round_robin", "random", "maglev"}, balance.Names()); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	named := []string{balance.NameLeastConnections, balance.NameRoundRobin, balance.NameRandom, balance.NameMaglev}
	if diff := cmp.Diff(balance.Names(), named); diff != "" {
		t.Errorf("constants (-want +got):\n%s", diff)
	}
	for i, name := range balance.Names() {
		p, err := balance.ByName(name)
		if err != nil || p != flow.Policies()[i] {
			t.Errorf("%s: %v, %v", name, p, err)
		}
	}
	for _, name := range []string{"", "x", "Round_Robin"} {
		if _, err := balance.ByName(name); err == nil {
			t.Errorf("%q is a policy", name)
		}
	}
	if _, err := balance.ByName("x"); err.Error() != `unknown policy "x": want one of least_connections, round_robin, random, maglev` {
		t.Error(err)
	}
}

// pick picks once for each seed and counts by endpoint; what is out is an error.
func pick(t *testing.T, c *balancetest.Case, turns *balance.Turns, seeds []uint32) []int {
	t.Helper()
	counts := make([]int, len(c.Set.Endpoints))
	for _, seed := range seeds {
		i := balance.Pick(&c.Set, c.Set.Spill, turns, c, seed)
		if i < 0 || !c.Available(i) {
			t.Fatalf("picks %d", i)
		}
		counts[i]++
	}
	return counts
}

func none(c *balancetest.Case) bool {
	return !slices.ContainsFunc(c.Want, func(w float64) bool { return w > 0 })
}

// Each policy with each list of weights, state of health and division into zones.
func TestShares(t *testing.T) {
	for _, c := range balancetest.Cases() {
		t.Run(c.Name, func(t *testing.T) {
			if none(c) {
				for _, seed := range c.Seeds(50) {
					if i := balance.Pick(&c.Set, c.Set.Spill, new(balance.Turns), c, seed); i >= 0 {
						t.Fatalf("picks %d of none", i)
					}
				}
				return
			}
			if err := c.Check(pick(t, c, new(balance.Turns), c.Seeds(8000))); err != nil {
				t.Error(err)
			}
			if c.Cycle == 0 {
				return
			}
			var turns balance.Turns
			for range 3 {
				if err := c.CheckCycle(pick(t, c, &turns, c.Seeds(c.Cycle))); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// A pick is a function of what it is given.
func TestPickIsAFunction(t *testing.T) {
	for _, c := range balancetest.Cases() {
		var a, b balance.Turns
		for _, seed := range c.Seeds(200) {
			i := balance.Pick(&c.Set, c.Set.Spill, &a, c, seed)
			if j := balance.Pick(&c.Set, c.Set.Spill, &b, c, seed); i != j {
				t.Fatalf("%s: %d and then %d", c.Name, i, j)
			}
		}
	}
}

// find returns the case of that name.
func find(t *testing.T, name string) *balancetest.Case {
	t.Helper()
	for _, c := range balancetest.Cases() {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("no case %s", name)
	return nil
}

// Equal endpoints take turns in order.
func TestRoundRobinOrder(t *testing.T) {
	c := find(t, "round_robin/five/all up")
	var turns balance.Turns
	for i, seed := range c.Seeds(30) {
		if got := balance.Pick(&c.Set, 0, &turns, c, seed); got != i%5 {
			t.Fatalf("pick %d is endpoint %d", i, got)
		}
	}
}

// The turns of an endpoint are spread: between two of them there is never much
// more than its share of the others'.
func TestRoundRobinIsSpread(t *testing.T) {
	weights := []uint32{8, 2, 2, 4}
	const sum = 16
	set, _ := balance.Arrange(flow.PolicyRoundRobin, "", endpoints(weights...))
	last := []int{-1, -1, -1, -1}
	table := slices.Repeat(set.Tiers[0].Table, 20)
	for i, at := range table {
		if last[at] >= 0 {
			if gap, most := i-last[at], 2*sum/int(weights[at]); gap > most {
				t.Errorf("endpoint %d waits %d picks, want at most %d", at, gap, most)
			}
		}
		last[at] = i
	}
}

// Workers that share the counter get the same exact shares.
func TestRoundRobinIsExactForAll(t *testing.T) {
	c := find(t, "round_robin/4:6:8:2/first out")
	const workers, cycles = 8, 1500
	var turns balance.Turns
	counts := make([][]int, workers)
	seeds := c.Seeds(cycles * c.Cycle)
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() { counts[w] = pick(t, c, &turns, seeds) })
	}
	all.Wait()
	got := make([]int, 4)
	for _, each := range counts {
		for i, n := range each {
			got[i] += n
		}
	}
	if diff := cmp.Diff([]int{0, 3 * workers * cycles, 4 * workers * cycles, workers * cycles}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// What a key had stays with it for as long as it is available, and comes back when
// it is again; the keys of one that is out are spread over all others. The same
// with zones: when connections spill over, those that do not stay where they are.
func TestMaglevIsConsistent(t *testing.T) {
	for _, name := range []string{"maglev/hundred/all up", "maglev/many/all up/even local", "maglev/five/all up"} {
		c := find(t, name)
		seeds := c.Seeds(20000)
		at := func() []int {
			picks := make([]int, len(seeds))
			for k, seed := range seeds {
				picks[k] = balance.Pick(&c.Set, c.Set.Overflow(c.Available), idle(), c, seed)
			}
			return picks
		}
		before := at()
		lost, moved := 0, 0
		heirs := map[int]bool{}
		// A third of the local zone: some spills.
		for i := range (c.Set.Tiers[0].Count + 2) / 3 {
			c.Ejected[i] = true
		}
		during := at()
		spill := float64(c.Set.Overflow(c.Available)) / flow.All
		for k := range seeds {
			switch {
			case c.Ejected[before[k]]:
				lost++
				heirs[during[k]] = true
			case before[k] != during[k]:
				moved++
			default:
			}
		}
		if most := spill*float64(len(seeds)) + 5*math.Sqrt(float64(len(seeds))); spill == 0 && moved > 0 || float64(moved) > most {
			t.Errorf("%s: %d keys of available endpoints have moved", name, moved)
		}
		left := 0
		for i := range c.Set.Tiers[0].Count {
			if !c.Ejected[i] {
				left++
			}
		}
		if lost == 0 || len(heirs) < left {
			t.Errorf("%s: %d keys went to %d endpoints of %d", name, lost, len(heirs), left)
		}
		clear(c.Ejected)
		if !slices.Equal(before, at()) {
			t.Errorf("%s: they do not come back", name)
		}
	}
}

// idle returns turns that nobody looks at.
func idle() *balance.Turns { return new(balance.Turns) }

// A zone takes everything while 1/1.4 of its weight is available, then its share.
func TestOverflow(t *testing.T) {
	const n = 100
	list := endpoints(equal(2 * n)...)
	for i := range list {
		list[i].Zone = []string{"a", "b"}[i%2]
	}
	set, _ := balance.Arrange(flow.PolicyRandom, "a", list)
	last := uint32(0)
	for out := range n + 1 {
		got := set.Overflow(func(i int) bool { return i >= out })
		can := float64(n-out) / n * 1.4
		want := max(0, 1-can) * flow.All
		if math.Abs(float64(got)-want) > 2 || can >= 1 && got != 0 || got < last {
			t.Errorf("%d of %d out: %d spill, want %.0f", out, n, got, want)
		}
		last = got
	}
	if last != flow.All {
		t.Errorf("with none left, %d spill", last)
	}
	if got := set.Overflow(func(i int) bool { return i < n }); got != 0 {
		t.Errorf("what is out elsewhere lets %d spill", got)
	}
	// The largest numbers that there are.
	heavy := slices.Repeat([]uint32{65535}, flow.SetEndpoints)
	list = endpoints(heavy...)
	for i := range list[1:] {
		list[i].Zone = "a"
	}
	set, _ = balance.Arrange(flow.PolicyRandom, "a", list)
	got := set.Overflow(func(i int) bool { return i%2 == 0 })
	if share := float64(got) / flow.All; math.Abs(share-0.3) > 0.001 {
		t.Errorf("with half of the largest set out, %v spill", share)
	}
	if got := set.Overflow(func(i int) bool { return i == 0 }); got == flow.All || got == 0 {
		t.Errorf("with one left, %d spill", got)
	}
}

// full is a cluster that fills up.
type full []int64

func (f full) Available(int) bool { return true }
func (f full) Live(i int) int64   { return f[i] }

// Connections that stay open spread by weight, more evenly than chance would.
func TestLeastConnectionsFills(t *testing.T) {
	weights := []uint32{1, 2, 3, 4}
	set, _ := balance.Arrange(flow.PolicyLeastConnections, "", endpoints(weights...))
	live := make(full, len(weights))
	random := rand.New(rand.NewPCG(1, 2))
	const n = 10000
	for range n {
		live[balance.Pick(&set, 0, idle(), live, random.Uint32())]++
	}
	for i, got := range live {
		want := float64(n) * float64(weights[i]) / 10
		if math.Abs(float64(got)-want) > want*0.02 {
			t.Errorf("endpoint %d has %d of %d connections, want %.0f +- 2%%", i, got, n, want)
		}
	}
}

// An endpoint that holds on to its connections gets no more of them.
func TestLeastConnectionsAvoidsTheSlow(t *testing.T) {
	set, _ := balance.Arrange(flow.PolicyLeastConnections, "", endpoints(1, 1, 1))
	live := make(full, 3)
	random := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		if i := balance.Pick(&set, 0, idle(), live, random.Uint32()); i == 0 {
			live[i]++
		}
	}
	if live[0] > 2 {
		t.Errorf("the slow endpoint has %d connections", live[0])
	}
}

func TestPickDoesNotAllocate(t *testing.T) {
	for _, c := range balancetest.Cases() {
		var turns balance.Turns
		if n := testing.AllocsPerRun(20, func() { balance.Pick(&c.Set, c.Set.Spill, &turns, c, 7) }); n != 0 {
			t.Errorf("%s: %v allocations", c.Name, n)
		}
	}
}

// The time to pick does not grow with the number of endpoints.
func BenchmarkPick(b *testing.B) {
	for _, p := range flow.Policies() {
		for size, n := range map[string]int{"10": 10, "10000": 10000} {
			b.Run(p.String()+"/"+size, func(b *testing.B) {
				set, _ := balance.Arrange(p, "", endpoints(equal(n)...))
				live := make(full, n)
				var turns balance.Turns
				var seed uint32
				for b.Loop() {
					seed++
					balance.Pick(&set, 0, &turns, live, flow.Mix(seed))
				}
			})
		}
	}
}
