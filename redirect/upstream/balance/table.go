package balance

import (
	"cmp"
	"slices"

	"github.com/pillion-project/pillion/redirect/flow"
)

// turnsMax is how long a table of turns is to be, at most. Where weights need more
// they are rounded, to one turn at least: so a table may have some more.
const turnsMax = 65536

// roundRobinTable returns the endpoints of a tier in turn: each as often as its
// weight says, evenly spread, in the order of the list where they are equal.
func roundRobinTable(endpoints []flow.SetEndpoint) []uint32 {
	turns := make([]uint32, len(endpoints))
	var divisor, sum uint64
	for i := range endpoints {
		w := uint64(endpoints[i].Weight)
		divisor = gcd(divisor, w)
		sum += w
	}
	for i := range endpoints {
		w := uint64(endpoints[i].Weight)
		if sum/max(divisor, 1) <= turnsMax {
			turns[i] = uint32(w / divisor)
		} else {
			turns[i] = uint32(max(1, (w*turnsMax+sum/2)/sum))
		}
	}
	most := uint64(slices.Max(append(turns, 0)))
	// The index moves the start, so that endpoints of one small weight do not all
	// take their turns in the same generation.
	return spread(turns, func(i int) uint64 { return uint64(i) * (most/2 + 1) })
}

func gcd(a, b uint64) uint64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// spread returns a table in which i has turns[i] entries. It is that of a static
// stride scheduler: generations go by, as many as the most turns are; in each,
// every i may have one entry, in order, and i has one in generation g if
// turns[i]*g + offset(i) has passed a multiple of that number since the last one.
//
// nginx's smooth round robin was rejected: its table takes a time that grows with
// the product of endpoints and turns.
func spread(turns []uint32, offset func(i int) uint64) []uint32 {
	var most, sum uint64
	for _, n := range turns {
		most = max(most, uint64(n))
		sum += uint64(n)
	}
	// Sorted by generation, by counting: how many entries are in each, ...
	start := make([]uint32, most+1)
	each := func(f func(i int, generation uint64)) {
		for i, n := range turns {
			n := uint64(n)
			if n == 0 {
				continue
			}
			past := offset(i) % most
			k := uint64(0)
			if past >= n {
				k = 1
			}
			for last := k + n; k < last; k++ {
				f(i, (max(k*most, past)-past+n-1)/n)
			}
		}
	}
	each(func(_ int, g uint64) { start[g+1]++ })
	for g := range most {
		start[g+1] += start[g]
	}
	// ... and then each to its place.
	table := make([]uint32, sum)
	each(func(i int, g uint64) {
		table[start[g]] = uint32(i)
		start[g]++
	})
	return table
}

// maglevPrimes are the lengths that a Maglev table may have: the largest primes
// below powers of two.
func maglevPrimes() []int {
	return []int{127, 251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071}
}

// maglevPerEndpoint is how many entries an endpoint has, if a table may be so long.
// With 100 of them the shares are right within a percent.
const maglevPerEndpoint = 100

// maglevTable returns the look-up table of Google's Maglev (Eisenbud et al., NSDI
// 2016, section 3.4), with weights: each endpoint has a preference list of all
// entries, from a hash of its address, and in turn they take the first of their
// list that is free, each as often as its weight says. When one goes, its entries
// are taken by the others, and hardly any other entry changes.
//
// It does not depend on the order of the endpoints.
func maglevTable(endpoints []flow.SetEndpoint) []uint32 {
	if len(endpoints) == 0 {
		return nil
	}
	primes := maglevPrimes()
	size := primes[len(primes)-1]
	if i, _ := slices.BinarySearch(primes, maglevPerEndpoint*len(endpoints)); i < len(primes) {
		size = primes[i]
	}
	sorted := make([]uint32, len(endpoints))
	for i := range sorted {
		sorted[i] = uint32(i)
	}
	slices.SortFunc(sorted, func(a, b uint32) int { return endpoints[a].Addr.Compare(endpoints[b].Addr) })

	m := uint32(size)
	type preference struct{ next, skip uint32 }
	preferences := make([]preference, len(sorted))
	offsets := make([]uint64, len(sorted))
	for i, e := range sorted {
		addr := endpoints[e].Addr
		words := flow.Words(flow.Hash(addr.Addr(), addr.Port()))
		preferences[i] = preference{next: words.Next() % m, skip: words.Next()%(m-1) + 1}
		offsets[i] = uint64(words.Next())
	}
	table := make([]uint32, m)
	const free = ^uint32(0)
	for i := range table {
		table[i] = free
	}
	turns := shares(endpoints, sorted, size)
	for _, i := range spread(turns, func(i int) uint64 { return offsets[i] }) {
		p := &preferences[i]
		for table[p.next] != free {
			if p.next += p.skip; p.next >= m { // cheaper than a division
				p.next -= m
			}
		}
		table[p.next] = sorted[i]
	}
	return table
}

// shares divides total by weight, without a rest: the largest remainders get what
// rounding down leaves. The result is in the order of sorted.
func shares(endpoints []flow.SetEndpoint, sorted []uint32, total int) []uint32 {
	var sum uint64
	for i := range endpoints {
		sum += uint64(endpoints[i].Weight)
	}
	counts := make([]uint32, len(sorted))
	rests := make([]uint64, len(sorted))
	byRest := make([]int, len(sorted))
	left := total
	for i, e := range sorted {
		exact := uint64(endpoints[e].Weight) * uint64(total)
		counts[i], rests[i], byRest[i] = uint32(exact/sum), exact%sum, i
		left -= int(counts[i])
	}
	slices.SortStableFunc(byRest, func(a, b int) int { return cmp.Compare(rests[b], rests[a]) })
	for _, i := range byRest[:left] {
		counts[i]++
	}
	return counts
}
