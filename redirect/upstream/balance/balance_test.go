package balance_test

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream"
	"github.com/pillion-project/pillion/redirect/upstream/balance"
	"github.com/pillion-project/pillion/redirect/upstream/health"
)

var policies = map[string]upstream.NewPicker{
	balance.NameRoundRobin:       balance.RoundRobin,
	balance.NameLeastConnections: balance.LeastConnections,
}

// random gives the same numbers in every run. It is not safe for concurrent use.
func random() func() uint64 { return rand.New(rand.NewPCG(1, 2)).Uint64 }

// lockedRandom is random for many goroutines.
func lockedRandom() func() uint64 {
	var mu sync.Mutex
	next := random()
	return func() uint64 {
		mu.Lock()
		defer mu.Unlock()
		return next()
	}
}

// never lets an ejected endpoint be picked again, however few are left: the
// clock of these tests stands still.
var never = health.Config{Failures: 1, Base: time.Hour, Max: time.Hour}

// cluster makes a cluster whose endpoints have these weights.
func cluster(t testing.TB, policy upstream.NewPicker, h health.Config, random func() uint64, weights ...uint32) *upstream.Cluster {
	t.Helper()
	spec := upstream.ClusterSpec{Name: "c", Policy: policy}
	for i, w := range weights {
		addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), 80)
		spec.Endpoints = append(spec.Endpoints, upstream.EndpointSpec{Addr: addr, Weight: w})
	}
	s, err := upstream.Build(nil, []upstream.ClusterSpec{spec}, upstream.Options{
		Health: h,
		Now:    func() time.Duration { return 1 },
		Random: random,
	})
	if err != nil {
		t.Fatal(err)
	}
	return s.Cluster("c")
}

func eject(e *upstream.Endpoint) {
	e.Begin()
	e.Failed(flow.ReasonDialRefused)
	e.End()
}

// pick picks n times and counts by the endpoint's index.
func pick(t testing.TB, c *upstream.Cluster, n int) []int {
	t.Helper()
	counts := make([]int, len(c.Endpoints))
	for range n {
		e, err := c.Pick(0, nil)
		if err != nil {
			t.Fatal(err)
		}
		counts[position(c, e)]++
	}
	return counts
}

func position(c *upstream.Cluster, e *upstream.Endpoint) int {
	for i := range c.Endpoints {
		if c.Endpoints[i] == e {
			return i
		}
	}
	return -1
}

// checkShares compares counts with the shares of weights, which may be 0. The
// random is seeded, so five standard deviations are not a matter of luck.
func checkShares(t *testing.T, counts []int, weights []float64) {
	t.Helper()
	n, sum := 0, 0.0
	for i := range counts {
		n += counts[i]
		sum += weights[i]
	}
	for i, got := range counts {
		share := weights[i] / sum
		slack := 5 * math.Sqrt(float64(n)*share*(1-share))
		if math.Abs(float64(got)-float64(n)*share) > slack {
			t.Errorf("endpoint %d was picked %d times of %d, want %.0f +- %.0f", i, got, n, float64(n)*share, slack)
		}
	}
}

func TestByName(t *testing.T) {
	if diff := cmp.Diff([]string{"least_connections", "round_robin"}, balance.Names()); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	for _, name := range balance.Names() {
		p, err := balance.ByName(name)
		if err != nil || p == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"", "random", "Round_Robin"} {
		if p, err := balance.ByName(name); err == nil || p != nil {
			t.Errorf("%q is a policy", name)
		}
	}
	if _, err := balance.ByName("x"); err.Error() != `unknown policy "x": want one of least_connections, round_robin` {
		t.Error(err)
	}
}

func TestNoEndpoint(t *testing.T) {
	for name, policy := range policies {
		for n := range 4 {
			c := cluster(t, policy, never, random(), make1(n)...)
			for _, e := range c.Endpoints {
				eject(e)
			}
			e, err := c.Pick(0, nil)
			if e != nil || !errors.Is(err, upstream.ErrNoEndpoint) || flow.ReasonOf(err) != flow.ReasonNoEndpoint {
				t.Errorf("%s of %d ejected: %v, %v", name, n, e, err)
			}
		}
	}
}

// make1 returns n weights of 1.
func make1(n int) []uint32 {
	w := make([]uint32, n)
	for i := range w {
		w[i] = 1
	}
	return w
}

// Whichever one is left is found, and nothing else is picked.
func TestOneAvailable(t *testing.T) {
	for name, policy := range policies {
		for _, weights := range [][]uint32{{1}, {1, 1}, {1, 65535}, {65535, 1}, {1, 2, 3, 4, 5}, {65535, 1, 1, 65535}} {
			for left := range weights {
				c := cluster(t, policy, never, random(), weights...)
				for i, e := range c.Endpoints {
					if i != left {
						eject(e)
					}
				}
				if counts := pick(t, c, 200); counts[left] != 200 {
					t.Errorf("%s of %v with only %d left: %v", name, weights, left, counts)
				}
			}
		}
	}
}

// In panic the ejected are picked like the others.
func TestPanic(t *testing.T) {
	h := never
	h.Panic = 51
	for name, policy := range policies {
		t.Run(name, func(t *testing.T) {
			c := cluster(t, policy, h, random(), 1, 1, 1, 1)
			eject(c.Endpoints[0])
			if counts := pick(t, c, 400); counts[0] != 0 {
				t.Errorf("an ejected endpoint is picked: %v", counts)
			}
			eject(c.Endpoints[1])
			checkShares(t, pick(t, c, 4000), []float64{1, 1, 1, 1})
		})
	}
}

// Over a full cycle the shares of round robin are those of the weights exactly.
func TestRoundRobinIsExact(t *testing.T) {
	for _, weights := range [][]uint32{{1}, {1, 1, 1}, {1, 2}, {5, 1, 1}, {3, 5, 7}, {4, 6, 8}, {100, 1}, {1, 100}, {1, 1, 1, 10}, {6, 4, 3, 9, 9}} {
		c := cluster(t, balance.RoundRobin, never, random(), weights...)
		want, sum := make([]int, len(weights)), 0
		for i, w := range weights {
			want[i] = int(w)
			sum += int(w)
		}
		for cycle := range 3 {
			if diff := cmp.Diff(want, pick(t, c, sum)); diff != "" {
				t.Errorf("%v, cycle %d (-want +got):\n%s", weights, cycle, diff)
			}
		}
	}
}

// Equal endpoints take turns in order.
func TestRoundRobinOrder(t *testing.T) {
	c := cluster(t, balance.RoundRobin, never, random(), 2, 2, 2)
	for i := range 30 {
		e, err := c.Pick(0, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := position(c, e); got != i%3 {
			t.Fatalf("pick %d is endpoint %d, want %d", i, got, i%3)
		}
	}
}

// The turns of an endpoint are spread: between two of them there is never much
// more than its share of the others'.
func TestRoundRobinIsSpread(t *testing.T) {
	weights := []uint32{8, 2, 2, 4}
	const sum = 16
	c := cluster(t, balance.RoundRobin, never, random(), weights...)
	last := []int{-1, -1, -1, -1}
	for i := range 10 * sum {
		e, err := c.Pick(0, nil)
		if err != nil {
			t.Fatal(err)
		}
		at := position(c, e)
		if last[at] >= 0 {
			if gap, most := i-last[at], 2*sum/int(weights[at]); gap > most {
				t.Errorf("endpoint %d waits %d picks, want at most %d", at, gap, most)
			}
		}
		last[at] = i
	}
}

// An endpoint that is left out leaves the shares of the others as they were.
func TestRoundRobinPassesOver(t *testing.T) {
	c := cluster(t, balance.RoundRobin, never, random(), 1, 2, 3)
	eject(c.Endpoints[1])
	if diff := cmp.Diff([]int{100, 0, 300}, pick(t, c, 400)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// With the heaviest ones gone, the turns of the rest are generations away: the
// pick falls back to a draw by weight.
func TestRoundRobinWithoutTheHeavy(t *testing.T) {
	c := cluster(t, balance.RoundRobin, never, random(), 65535, 1, 3)
	eject(c.Endpoints[0])
	checkShares(t, pick(t, c, 4000), []float64{0, 1, 3})
}

// Workers that share the counter get the same exact shares.
func TestRoundRobinIsExactForAll(t *testing.T) {
	weights := []uint32{1, 2, 5}
	const workers, picks = 8, 1000
	c := cluster(t, balance.RoundRobin, never, lockedRandom(), weights...)
	var counts [3]atomic.Int64
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for range picks {
				e, err := c.Pick(0, nil)
				if err != nil {
					t.Error(err)
					return
				}
				counts[position(c, e)].Add(1)
			}
		})
	}
	all.Wait()
	for i, w := range weights {
		if got, want := counts[i].Load(), int64(w)*workers*picks/8; got != want {
			t.Errorf("endpoint %d was picked %d times, want %d", i, got, want)
		}
	}
}

// Without load the shares of least connections are those of the weights.
func TestLeastConnectionsIdle(t *testing.T) {
	for _, weights := range [][]uint32{{1, 1}, {1, 3}, {1, 1, 1, 1, 1}, {1, 99}, {65535, 65535, 1}, {5, 3, 2}} {
		t.Run(fmt.Sprint(weights), func(t *testing.T) {
			c := cluster(t, balance.LeastConnections, never, random(), weights...)
			shares := make([]float64, len(weights))
			for i, w := range weights {
				shares[i] = float64(w)
			}
			checkShares(t, pick(t, c, 20000), shares)
		})
	}
}

// Of two, the one with the fewer connections for its weight is taken.
func TestLeastConnectionsOfTwo(t *testing.T) {
	for _, c := range []struct {
		weights [2]uint32
		live    [2]int
		want    int // -1: either
	}{
		{[2]uint32{1, 1}, [2]int{0, 1}, 0},
		{[2]uint32{1, 1}, [2]int{7, 6}, 1},
		{[2]uint32{1, 1}, [2]int{3, 3}, -1},
		{[2]uint32{1, 3}, [2]int{2, 5}, 1},
		{[2]uint32{1, 3}, [2]int{2, 6}, -1},
		{[2]uint32{1, 3}, [2]int{2, 7}, 0},
		{[2]uint32{65535, 1}, [2]int{1000, 1}, 0},
	} {
		cl := cluster(t, balance.LeastConnections, never, random(), c.weights[:]...)
		for i, n := range c.live {
			for range n {
				cl.Endpoints[i].Begin()
			}
		}
		counts := pick(t, cl, 2000)
		if c.want >= 0 && counts[c.want] != 2000 || c.want < 0 && (counts[0] == 0 || counts[1] == 0) {
			t.Errorf("weights %v, live %v: %v, want all on %d", c.weights, c.live, counts, c.want)
		}
	}
}

// Connections that stay open spread by weight, more evenly than chance would.
func TestLeastConnectionsFills(t *testing.T) {
	weights := []uint32{1, 2, 3, 4}
	c := cluster(t, balance.LeastConnections, never, random(), weights...)
	const n = 10000
	for range n {
		e, err := c.Pick(0, nil)
		if err != nil {
			t.Fatal(err)
		}
		e.Begin()
	}
	for i, e := range c.Endpoints {
		want := float64(n) * float64(weights[i]) / 10
		if got := float64(e.Live()); math.Abs(got-want) > want*0.02 {
			t.Errorf("endpoint %d has %.0f of %d connections, want %.0f +- 2%%", i, got, n, want)
		}
	}
}

// An endpoint that holds on to its connections gets no more of them.
func TestLeastConnectionsAvoidsTheSlow(t *testing.T) {
	c := cluster(t, balance.LeastConnections, never, random(), 1, 1, 1)
	for range 3000 {
		e, err := c.Pick(0, nil)
		if err != nil {
			t.Fatal(err)
		}
		e.Begin()
		if position(c, e) != 0 {
			e.End()
		}
	}
	if got := c.Endpoints[0].Live(); got > 2 {
		t.Errorf("the slow endpoint has %d connections", got)
	}
}

// With some ejected, the others share by weight.
func TestLeastConnectionsPassesOver(t *testing.T) {
	c := cluster(t, balance.LeastConnections, never, random(), 1, 2, 1, 3, 1, 1, 1, 1)
	shares := []float64{1, 2, 0, 3, 0, 0, 0, 0}
	for i, s := range shares {
		if s == 0 {
			eject(c.Endpoints[i])
		}
	}
	checkShares(t, pick(t, c, 20000), shares)
}

// What any policy promises while endpoints come, go and fill up.
func TestRace(t *testing.T) {
	for name, policy := range policies {
		t.Run(name, func(t *testing.T) {
			h := health.Config{Failures: 2, Base: 1, Max: 4, Panic: 50}
			var now atomic.Int64
			specs := []upstream.ClusterSpec{{Name: "c", Policy: policy}}
			for i := range 5 {
				addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 80)
				specs[0].Endpoints = append(specs[0].Endpoints, upstream.EndpointSpec{Addr: addr, Weight: uint32(i + 1)})
			}
			s, err := upstream.Build(nil, specs, upstream.Options{
				Health: h,
				Now:    func() time.Duration { return time.Duration(now.Add(1) / 64) },
			})
			if err != nil {
				t.Fatal(err)
			}
			c := s.Cluster("c")
			var workers sync.WaitGroup
			for w := range 8 {
				workers.Go(func() { dialAround(t, c, rand.New(rand.NewPCG(uint64(w), 3))) })
			}
			workers.Wait()
			for i, e := range c.Endpoints {
				if e.Live() != 0 {
					t.Errorf("endpoint %d has %d connections left", i, e.Live())
				}
			}
		})
	}
}

// dialAround is a worker whose dials fail as often as not.
func dialAround(t *testing.T, c *upstream.Cluster, random *rand.Rand) {
	for range 2000 {
		e, err := c.Pick(random.Uint64(), nil)
		if errors.Is(err, upstream.ErrNoEndpoint) {
			continue // each was ejected at the moment it was looked at
		}
		if err != nil {
			t.Error(err)
			return
		}
		e.Begin()
		if random.IntN(2) == 0 {
			e.Connected(time.Millisecond)
		} else {
			e.Failed(flow.ReasonDialRefused)
		}
		e.End()
	}
}

func TestPickDoesNotAllocate(t *testing.T) {
	for name, policy := range policies {
		c := cluster(t, policy, never, random(), 1, 2, 3, 65535)
		eject(c.Endpoints[3])
		if n := testing.AllocsPerRun(1000, func() {
			if _, err := c.Pick(7, nil); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func BenchmarkPick(b *testing.B) {
	for name, policy := range policies {
		b.Run(name, func(b *testing.B) {
			c := cluster(b, policy, never, rand.Uint64, 1, 2, 3, 4, 5, 6, 7, 8)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := c.Pick(0, nil); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}
