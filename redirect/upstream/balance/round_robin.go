package balance

import (
	"sync/atomic"

	"github.com/pillion-project/pillion/redirect/upstream"
)

// roundRobin is a static stride scheduler. Generations of turns go by; in each,
// every endpoint has one turn, in order, and takes it in as many of max
// generations as its weight says, evenly spread. One counter is all of its
// state, so the sequence is exact however many workers share it, and an
// endpoint that is passed over leaves the shares of the others as they were.
//
// nginx's smooth round robin was rejected: it needs a lock, or a table as long
// as the sum of the weights.
type roundRobin struct {
	weights
	random func() uint64
	max    uint64 // the largest weight
	turn   atomic.Uint64
}

// RoundRobin takes endpoints in turn, by weight, as evenly spread as they go.
func RoundRobin(endpoints []*upstream.Endpoint, random func() uint64) upstream.Picker {
	r := &roundRobin{weights: newWeights(endpoints), random: random}
	for _, e := range endpoints {
		r.max = max(r.max, uint64(e.Weight))
	}
	return r
}

// Pick implements upstream.Picker.
func (r *roundRobin) Pick(uint64) (*upstream.Endpoint, error) {
	n := uint64(len(r.endpoints))
	if n == 0 {
		return nil, upstream.ErrNoEndpoint
	}
	// In 2n turns the heaviest endpoint had one at least. If it is not
	// available the others' turns may be a thousand generations away.
	for range 2 * n {
		turn := r.turn.Add(1) - 1
		i := turn % n
		e := r.endpoints[i]
		if r.takes(uint64(e.Weight), i, turn/n) && e.Available() {
			return e, nil
		}
	}
	return r.drawAvailable(r.random())
}

// takes reports whether the endpoint of that weight and index takes its turn in
// the generation: it does when weight*generation passes a multiple of max. The
// index moves the start, so that endpoints of one small weight do not all take
// their turns in the same generation.
func (r *roundRobin) takes(weight, index, generation uint64) bool {
	offset := index * (r.max/2 + 1)
	return (weight*(generation%r.max)+offset)%r.max < weight
}
