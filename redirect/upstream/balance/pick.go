package balance

import (
	"sync/atomic"

	"github.com/pillion-project/pillion/redirect/flow"
)

// Members is what a pick asks about the endpoints of a set, by their index in it.
type Members interface {
	// Available reports whether the endpoint may be picked.
	Available(i int) bool
	// Live returns how many connections it has.
	Live(i int) int64
}

// Turns counts the turns of PolicyRoundRobin, by tier. It is to outlive a set that
// is replaced, or the first endpoints would have more than their share.
type Turns [2]atomic.Uint32

// Pick returns the index of an endpoint for one connection, or -1 when none may
// be picked. seed is the connection's hash for PolicyMaglev and a random word for
// the others, spill the set's Spill as it is now.
//
// It takes no lock, allocates nothing, and is safe for concurrent use. The C twin
// takes the same words in the same order.
func Pick(s *flow.Set, spill uint32, turns *Turns, m Members, seed uint32) int {
	p := pick{set: s, members: m, words: flow.Words(seed)}
	tier := 0
	if s.Tiers[1].Count > 0 && p.chance(spill) {
		tier = 1
	}
	i := p.tier(tier, &turns[tier], seed)
	if i < 0 && s.Tiers[1].Count > 0 {
		tier = 1 - tier
		i = p.tier(tier, &turns[tier], seed)
	}
	if i < 0 {
		return -1
	}
	return s.Tiers[tier].First + i
}

type pick struct {
	set     *flow.Set
	members Members
	words   flow.Words
}

// chance is true for share of 2^32 draws.
func (p *pick) chance(share uint32) bool { return share == flow.All || p.words.Next() < share }

// below returns a number less than n, which is at most 2^32.
func (p *pick) below(n int) int { return int(uint64(p.words.Next()) * uint64(n) >> 32) }

// tier picks in one tier: an index in it, or -1.
func (p *pick) tier(number int, turn *atomic.Uint32, seed uint32) int {
	t := &p.set.Tiers[number]
	if t.Count == 0 {
		return -1
	}
	switch p.set.Policy {
	case flow.PolicyRoundRobin:
		return p.roundRobin(t, turn)
	case flow.PolicyMaglev:
		return p.maglev(t, seed)
	case flow.PolicyRandom:
		return p.random(t)
	default:
		return p.leastConnections(t)
	}
}

func (p *pick) available(t *flow.Tier, i int) bool { return p.members.Available(t.First + i) }

// draw returns one endpoint by weight, available or not.
func (p *pick) draw(t *flow.Tier) int {
	i := p.below(t.Count)
	if e := &p.set.Endpoints[t.First+i]; !p.chance(e.Cut) {
		return int(e.Alias)
	}
	return i
}

func (p *pick) random(t *flow.Tier) int {
	for range flow.PickDraws {
		if i := p.draw(t); p.available(t, i) {
			return i
		}
	}
	return p.search(t)
}

// roundRobin uses up a turn with each look, so that an endpoint that is passed
// over leaves the shares of the others as they were.
func (p *pick) roundRobin(t *flow.Tier, turn *atomic.Uint32) int {
	for range flow.PickTurns {
		now := turn.Add(1) - 1
		if i := int(t.Table[now%uint32(len(t.Table))]); p.available(t, i) {
			return i
		}
	}
	return p.random(t)
}

// maglev goes on with words that follow from the hash, so that connections whose
// endpoint is out stay together too, and are spread over all others.
func (p *pick) maglev(t *flow.Tier, hash uint32) int {
	for range flow.PickDraws {
		if i := int(t.Table[hash%uint32(len(t.Table))]); p.available(t, i) {
			return i
		}
		hash = p.words.Next()
	}
	return p.search(t)
}

// leastConnections takes the less loaded of two. Looking at all of them was
// rejected: workers that look at the same moment all see the same least loaded
// one, and rush to it.
//
// The first is drawn by weight and the second is any other. Without load the
// first is taken, which makes the shares those of the weights; two draws by weight
// would be the same endpoint too often when one is heavy.
func (p *pick) leastConnections(t *flow.Tier) int {
	if t.Count == 1 {
		return p.search(t)
	}
	first := -1
	for range flow.PickDraws {
		if first < 0 {
			if i := p.draw(t); p.available(t, i) {
				first = i
			}
			continue
		}
		second := p.below(t.Count - 1)
		if second >= first {
			second++
		}
		if p.available(t, second) {
			return p.less(t, first, second)
		}
	}
	if first >= 0 {
		return first
	}
	return p.search(t)
}

// less returns which of two has the fewer connections for its weight, and a when
// they are equal. It compares live, not live+1: with the connection to come counted
// in, the heavier of two idle endpoints would always win, and a light one would
// get nothing from an application that connects now and then.
func (p *pick) less(t *flow.Tier, a, b int) int {
	ea, eb := &p.set.Endpoints[t.First+a], &p.set.Endpoints[t.First+b]
	if p.members.Live(t.First+b)*int64(ea.Weight) < p.members.Live(t.First+a)*int64(eb.Weight) {
		return b
	}
	return a
}

// search looks at every endpoint of the tier and returns an available one, each by
// its weight, or -1: the newcomer replaces what was found before by its share of
// the weight so far. It is for when the short cuts have met unavailable endpoints
// only, and takes a time linear in their number.
func (p *pick) search(t *flow.Tier) int {
	found := -1
	var sum uint64
	for i := range t.Count {
		if !p.available(t, i) {
			continue
		}
		weight := uint64(p.set.Endpoints[t.First+i].Weight)
		sum += weight
		if uint64(p.words.Next())*sum>>32 < weight {
			found = i
		}
	}
	return found
}
