package balancetest

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/balance"
)

// zone is where the instance of all cases is.
const zone = "a"

// weights are what the endpoints of a case weigh.
func weights() map[string][]uint32 {
	many := make([]uint32, 50)
	for i := range many {
		many[i] = uint32(i%7 + 1)
	}
	return map[string][]uint32{
		"one": {1}, "two": {1, 1}, "five": equal(5), "hundred": equal(100),
		"1:3": {1, 3}, "4:6:8:2": {4, 6, 8, 2}, "heavy": {65535, 1, 3, 65535}, "many": many,
		// Without the first, no draw finds anybody.
		"giant": {65535, 1, 3},
	}
}

// equal returns n weights of 1.
func equal(n int) []uint32 {
	all := make([]uint32, n)
	for i := range all {
		all[i] = 1
	}
	return all
}

// states say which endpoints are out, by index in the list.
func states() map[string]func(i, n int) bool {
	return map[string]func(i, n int) bool{
		"all up":       func(int, int) bool { return false },
		"first out":    func(i, _ int) bool { return i == 0 },
		"half out":     func(i, n int) bool { return i < n/2 },
		"last is left": func(i, n int) bool { return i != n-1 },
		"none left":    func(int, int) bool { return true },
	}
}

// zones say which endpoints are local, by index in the list.
func zones() map[string]func(i, n int) bool {
	return map[string]func(i, n int) bool{
		"even local":  func(i, _ int) bool { return i%2 == 0 },
		"first local": func(i, n int) bool { return i < (n+2)/3 },
		"all local":   func(int, int) bool { return true },
		"none local":  func(int, int) bool { return false },
		"last remote": func(i, n int) bool { return i < n-1 },
	}
}

// Cases returns every case, by name: each policy with each list of weights and state
// of health, without zones and with each division into some, and
// PolicyLeastConnections under load too.
func Cases() []*Case {
	var all []*Case
	for _, p := range flow.Policies() {
		for wname, w := range weights() {
			for sname, out := range states() {
				name := fmt.Sprintf("%s/%s/%s", p, wname, sname)
				all = append(all, newCase(name, p, w, out, nil))
				if len(w) < 4 {
					continue // zones of one
				}
				for zname, local := range zones() {
					all = append(all, newCase(name+"/"+zname, p, w, out, local))
				}
			}
		}
	}
	all = append(all, loaded()...)
	slices.SortFunc(all, func(a, b *Case) int { return strings.Compare(a.Name, b.Name) })
	return all
}

func newCase(name string, p flow.Policy, weights []uint32, out, local func(i, n int) bool) *Case {
	n := len(weights)
	endpoints := make([]balance.Endpoint, n)
	for i, w := range weights {
		endpoints[i] = balance.Endpoint{
			Addr:   netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 80),
			Weight: w, Zone: "b",
		}
		if local != nil && local(i, n) {
			endpoints[i].Zone = zone
		}
	}
	where := zone
	if local == nil {
		where = ""
	}
	set, order := balance.Arrange(p, where, endpoints)
	// An ejection holds: there is no panic, and the wait is long.
	set.Failures, set.Base, set.Max = 1, 1<<40, 1<<40
	c := &Case{Name: name, Set: set, Down: make([]bool, n), Ejected: make([]bool, n), Load: make([]uint32, n)}
	for i, from := range order {
		if out(from, n) {
			c.Down[i] = from%2 == 0
			c.Ejected[i] = from%2 == 1
		}
		c.Set.Endpoints[i].Down = c.Down[i]
	}
	c.Set.Spill = c.Set.Overflow(c.Available)
	c.expect()
	return c
}

// expect sets what is to come of an idle set. No policy's shares are others than
// those of the weights.
func (c *Case) expect() {
	c.Want = make([]float64, len(c.Set.Endpoints))
	var sums [2]float64
	for t := range sums {
		c.eachAvailable(t, func(_ int, weight float64) { sums[t] += weight })
		if size := len(c.Set.Tiers[t].Table); size > 0 {
			c.Slack = max(c.Slack, 1/float64(size))
		}
	}
	spill := float64(c.Set.Spill) / flow.All
	shares := [2]float64{1 - spill, spill}
	for t := range sums {
		if sums[t] == 0 { // the other takes over
			shares[1-t], shares[t] = shares[0]+shares[1], 0
		}
	}
	for t, sum := range sums {
		c.eachAvailable(t, func(i int, weight float64) { c.Want[i] = shares[t] * weight / sum })
	}
	if c.Set.Policy == flow.PolicyRoundRobin && c.Set.Spill == 0 {
		c.expectCycle()
	}
}

func (c *Case) eachAvailable(tier int, f func(i int, weight float64)) {
	t := c.Set.Tiers[tier]
	for i := t.First; i < t.First+t.Count; i++ {
		if c.Available(i) {
			f(i, float64(c.Set.Endpoints[i].Weight))
		}
	}
}

// expectCycle finds after how many picks everyone has had its turns, if the table
// does not round and nowhere are too many turns of endpoints that are out.
func (c *Case) expectCycle() {
	t := c.Set.Tiers[0]
	var sum uint64
	for _, e := range c.Set.Endpoints[:t.Count] {
		sum += uint64(e.Weight)
	}
	if len(t.Table) == 0 || sum%uint64(len(t.Table)) != 0 {
		return
	}
	c.Slack = 0
	picks, run := 0, 0
	for range 2 { // round the end too
		picks = 0
		for _, i := range t.Table {
			if c.Available(int(i)) {
				picks, run = picks+1, 0
				continue
			}
			if run++; run >= flow.PickTurns {
				return
			}
		}
	}
	c.Cycle = picks
}

// loaded are cases of PolicyLeastConnections with connections open.
func loaded() []*Case {
	var all []*Case
	for name, c := range map[string]struct {
		weights, live []uint32
	}{
		"fewer":               {[]uint32{1, 1}, []uint32{0, 1}},
		"fewer, second":       {[]uint32{1, 1}, []uint32{7, 6}},
		"as many":             {[]uint32{1, 1}, []uint32{3, 3}},
		"by weight":           {[]uint32{1, 3}, []uint32{2, 5}},
		"as many by weight":   {[]uint32{1, 3}, []uint32{2, 6}},
		"more by weight":      {[]uint32{1, 3}, []uint32{2, 7}},
		"far apart":           {[]uint32{65535, 1}, []uint32{1000, 1}},
		"one of five is idle": {equal(5), []uint32{9, 9, 0, 9, 9}},
		"all differ":          {[]uint32{4, 3, 2, 1}, []uint32{4, 6, 1, 9}},
	} {
		for oname, out := range map[string]int{"": -1, "/last out": len(c.weights) - 1} {
			if out >= 0 && len(c.weights) < 4 {
				continue
			}
			made := newCase("least_connections/loaded/"+name+oname, flow.PolicyLeastConnections, c.weights,
				func(i, _ int) bool { return i == out }, nil)
			made.Load = c.live
			made.expectOfTwo()
			all = append(all, made)
		}
	}
	return all
}

// expectOfTwo sets what is to come of a set under load: the first is drawn by
// weight, the second is any other, and the one with less for its weight wins.
func (c *Case) expectOfTwo() {
	var sum, n float64
	c.eachAvailable(0, func(_ int, weight float64) { sum, n = sum+weight, n+1 })
	clear(c.Want)
	c.eachAvailable(0, func(a int, wa float64) {
		c.eachAvailable(0, func(b int, wb float64) {
			if a == b {
				return
			}
			winner := a
			if float64(c.Load[b])*wa < float64(c.Load[a])*wb {
				winner = b
			}
			c.Want[winner] += wa / sum / (n - 1)
		})
	})
}
