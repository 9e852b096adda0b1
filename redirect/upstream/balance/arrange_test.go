package balance_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/balance"
)

// endpoints makes endpoints of these weights, without zones.
func endpoints(weights ...uint32) []balance.Endpoint {
	all := make([]balance.Endpoint, len(weights))
	for i, w := range weights {
		all[i] = balance.Endpoint{
			Addr:   netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}), 80),
			Weight: w,
		}
	}
	return all
}

// equal returns n weights of 1.
func equal(n int) []uint32 { return slices.Repeat([]uint32{1}, n) }

// lists are weights that are hard on somebody.
func lists() [][]uint32 {
	steps := make([]uint32, 300)
	for i := range steps {
		steps[i] = uint32(i + 1)
	}
	return [][]uint32{
		nil, {1}, {65535}, {1, 1, 1}, {2, 2, 2}, {1, 2}, {5, 1, 1}, {3, 5, 7}, {4, 6, 8}, {100, 1}, {1, 100},
		{1, 1, 1, 10}, {6, 4, 3, 9, 9}, {65535, 1}, {1, 65535}, {65535, 65535, 1, 1}, {65535, 65534, 65533},
		equal(1000), steps, append(equal(1000), 65535), slices.Repeat([]uint32{65535}, 5000),
		slices.Repeat([]uint32{65535}, flow.SetEndpoints),
	}
}

func name(weights []uint32) string {
	return fmt.Sprintf("%d of %v", len(weights), weights[:min(len(weights), 6)])
}

// Everything a draw can come to, counted: it is the weights, but for what does not
// divide 2^32.
func TestAlias(t *testing.T) {
	for _, weights := range lists() {
		set, _ := balance.Arrange(flow.PolicyRandom, "", endpoints(weights...))
		got, sum := make([]float64, len(weights)), 0.0
		for i, e := range set.Endpoints {
			stays := float64(e.Cut) / (1 << 32)
			if e.Cut == flow.All {
				stays = 1
			}
			got[i] += stays
			got[e.Alias] += 1 - stays
			sum += float64(weights[i])
		}
		n := float64(len(weights))
		for i, w := range weights {
			if want := float64(w) / sum * n; math.Abs(got[i]-want) > n/(1<<32) {
				t.Fatalf("%s: endpoint %d has %v columns, want %v", name(weights), i, got[i], want)
			}
		}
		if set.Tiers[0].Table != nil {
			t.Errorf("%s: a draw needs no table", name(weights))
		}
	}
}

// stride is what spread is to come to: the plain form of the scheduler.
func stride(turns []uint32) []uint32 {
	var table []uint32
	most := uint64(slices.Max(append(turns, 0)))
	for g := range most {
		for i, n := range turns {
			if (uint64(n)*g+uint64(i)*(most/2+1))%most < uint64(n) {
				table = append(table, uint32(i))
			}
		}
	}
	return table
}

// A table of turns has each endpoint as often as its weight says, where they are:
// the sequence of the scheduler that goes by generations.
func TestTurns(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	all := [][]uint32{{1}, {1, 2}, {5, 1, 1}, {3, 5, 7}, {100, 1}, {1, 100}, {6, 5, 3, 9, 9}, {1000, 999, 1, 1}}
	for range 100 {
		w := make([]uint32, random.IntN(12)+1)
		for i := range w {
			w[i] = uint32(random.IntN(40) + 1)
		}
		w[0] = 1 // no divisor
		all = append(all, w)
	}
	for _, weights := range all {
		set, _ := balance.Arrange(flow.PolicyRoundRobin, "", endpoints(weights...))
		if diff := cmp.Diff(stride(weights), set.Tiers[0].Table); diff != "" {
			t.Fatalf("%v (-want +got):\n%s", weights, diff)
		}
	}
}

// A table is as long as it has to be, and never longer than the kernel side has
// room for. Where it rounds, it is right within one turn, and everybody has one.
func TestTurnsAreFew(t *testing.T) {
	for _, weights := range lists() {
		set, _ := balance.Arrange(flow.PolicyRoundRobin, "", endpoints(weights...))
		table := set.Tiers[0].Table
		counts, sum := make([]int, len(weights)), 0.0
		for _, i := range table {
			counts[i]++
		}
		for _, w := range weights {
			sum += float64(w)
		}
		if len(table) > 65536+len(weights) || len(table) > flow.SetTable {
			t.Errorf("%s: %d turns", name(weights), len(table))
		}
		rounded := sum > 65536
		for i, w := range weights {
			want := float64(w) / sum * min(sum, 65536)
			if counts[i] == 0 || rounded && math.Abs(float64(counts[i])-max(want, 1)) > 0.5+1e-9 {
				if len(table) != len(weights) { // all weigh the same
					t.Fatalf("%s: endpoint %d has %d turns of %d, want %v", name(weights), i, counts[i], len(table), want)
				}
			}
		}
	}
	for want, weights := range map[int][]uint32{7: {65535, 65535, 65535, 65535, 65535, 65535, 65535}, 3: {2, 4}, 9: {4, 6, 8}} {
		set, _ := balance.Arrange(flow.PolicyRoundRobin, "", endpoints(weights...))
		if got := len(set.Tiers[0].Table); got != want {
			t.Errorf("%v: %d turns, want %d", weights, got, want)
		}
	}
}

func isPrime(n int) bool {
	for d := 2; d*d <= n; d++ {
		if n%d == 0 {
			return false
		}
	}
	return n > 1
}

// A Maglev table has a prime length, 100 entries for each endpoint or as many as
// fit, and everybody has what the weight says, within one.
func TestMaglevShares(t *testing.T) {
	for _, weights := range lists() {
		set, _ := balance.Arrange(flow.PolicyMaglev, "", endpoints(weights...))
		table := set.Tiers[0].Table
		n := len(weights)
		if n == 0 && table == nil {
			continue
		}
		if len(table) < 100*n && len(table) != 131071 || len(table) > flow.SetTable || !isPrime(len(table)) {
			t.Errorf("%s: %d entries", name(weights), len(table))
		}
		counts, sum := make([]int, n), 0.0
		for _, i := range table {
			counts[i]++
		}
		for _, w := range weights {
			sum += float64(w)
		}
		for i, w := range weights {
			want := float64(w) / sum * float64(len(table))
			if math.Abs(float64(counts[i])-want) > 1 {
				t.Fatalf("%s: endpoint %d has %d entries, want %.2f", name(weights), i, counts[i], want)
			}
		}
	}
}

// When one of n goes, its entries go to the others, and of the rest few: the
// paper's figure 12 has about as much.
func TestMaglevDisruption(t *testing.T) {
	for _, c := range []struct {
		weights []uint32
		most    float64 // of the entries that could have stayed
	}{
		{equal(5), 0.05}, {equal(10), 0.05}, {equal(100), 0.05}, {equal(1000), 0.05},
		{[]uint32{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 0.05},
		{append(equal(50), slices.Repeat([]uint32{3}, 50)...), 0.05},
	} {
		before := endpoints(c.weights...)
		old, _ := balance.Arrange(flow.PolicyMaglev, "", before)
		for _, gone := range []int{0, len(before) / 2, len(before) - 1} {
			after := slices.Delete(slices.Clone(before), gone, gone+1)
			new, _ := balance.Arrange(flow.PolicyMaglev, "", after)
			if len(new.Tiers[0].Table) != len(old.Tiers[0].Table) {
				t.Fatalf("%s: the length changes with one endpoint: choose other numbers", name(c.weights))
			}
			moved, stayed := 0, 0
			for k, i := range old.Tiers[0].Table {
				switch was, is := old.Endpoints[i].Addr, new.Endpoints[new.Tiers[0].Table[k]].Addr; {
				case was == before[gone].Addr: // has to move
				case was == is:
					stayed++
				default:
					moved++
				}
			}
			if share := float64(moved) / float64(moved+stayed); share > c.most {
				t.Errorf("%s: without %d, %.1f%% of what could have stayed has moved", name(c.weights), gone, 100*share)
			}
		}
	}
}

// The table goes by addresses, not by their order: two instances that were told the
// same endpoints agree.
func TestMaglevOrder(t *testing.T) {
	list := endpoints(3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)
	named := func(list []balance.Endpoint) (names []string) {
		set, _ := balance.Arrange(flow.PolicyMaglev, "", list)
		for _, i := range set.Tiers[0].Table {
			names = append(names, set.Endpoints[i].Addr.String())
		}
		return names
	}
	want := named(list)
	random := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		random.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		if !slices.Equal(want, named(list)) {
			t.Fatalf("another table for %v", list)
		}
	}
}

func TestZones(t *testing.T) {
	for name, c := range map[string]struct {
		zone  string
		zones []string
		order []int
		local int
	}{
		"no endpoints":      {"a", nil, []int{}, 0},
		"no zones":          {"", []string{"a", "b", ""}, []int{0, 1, 2}, 3},
		"local first":       {"a", []string{"b", "a", "", "a", "c"}, []int{1, 3, 0, 2, 4}, 2},
		"all local":         {"a", []string{"a", "a"}, []int{0, 1}, 2},
		"none local":        {"a", []string{"b", "c", ""}, []int{0, 1, 2}, 3},
		"zone is not known": {"a", []string{"", "", ""}, []int{0, 1, 2}, 3},
	} {
		for _, p := range flow.Policies() {
			list := endpoints(equal(len(c.zones))...)
			for i, z := range c.zones {
				list[i].Zone = z
			}
			set, order := balance.Arrange(p, c.zone, list)
			if diff := cmp.Diff(c.order, order); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
			a, b := set.Tiers[0], set.Tiers[1]
			if a.First != 0 || a.Count != c.local || b.First != c.local || b.Count != len(list)-c.local {
				t.Errorf("%s: tiers %+v", name, set.Tiers)
			}
			for i, from := range order {
				if set.Endpoints[i].Addr != list[from].Addr {
					t.Errorf("%s: endpoint %d is %s", name, i, set.Endpoints[i].Addr)
				}
			}
			for _, tier := range set.Tiers {
				for _, i := range tier.Table {
					if int(i) >= tier.Count {
						t.Errorf("%s, %s: entry %d of %d", name, p, i, tier.Count)
					}
				}
				for _, e := range set.Endpoints[tier.First:][:tier.Count] {
					if int(e.Alias) >= tier.Count {
						t.Errorf("%s, %s: alias %d of %d", name, p, e.Alias, tier.Count)
					}
				}
			}
		}
	}
}

func BenchmarkArrange(b *testing.B) {
	mixed := make([]uint32, 10000)
	for i := range mixed {
		mixed[i] = uint32(i%10 + 1)
	}
	for _, p := range flow.Policies() {
		for kind, weights := range map[string][]uint32{"equal": equal(10000), "mixed": mixed, "heavy": append(equal(9999), 65535)} {
			b.Run(p.String()+"/"+kind, func(b *testing.B) {
				list := endpoints(weights...)
				for b.Loop() {
					balance.Arrange(p, "", list)
				}
			})
		}
	}
}
