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
	if len(r.endpoints) == 0 {
		return nil, upstream.ErrNoEndpoint
	}
	for {
		turn := r.turn.Load()
		e, past := r.next(turn)
		if e == nil {
			return r.drawAvailable(r.random())
		}
		// Add was rejected: a worker's turns are then not in sequence, and it
		// may meet 2n that nobody takes while the others get those between. If
		// the swap fails, another worker has picked.
		if r.turn.CompareAndSwap(turn, past) {
			return e, nil
		}
	}
}

// next returns the available endpoint that takes the first turn from turn on,
// and the turn after that one; or nil if there is none near. In 2n turns the
// heaviest endpoint has one at least. If it is not available, the others' turns
// may be a thousand generations away.
func (r *roundRobin) next(turn uint64) (e *upstream.Endpoint, past uint64) {
	n := uint64(len(r.endpoints))
	for range 2 * n {
		i := turn % n
		e := r.endpoints[i]
		if r.takes(uint64(e.Weight), i, turn/n) && e.Available() {
			return e, turn + 1
		}
		turn++
	}
	return nil, turn
}

// takes reports whether the endpoint of that weight and index takes its turn in
// the generation: it does when weight*generation passes a multiple of max. The
// index moves the start, so that endpoints of one small weight do not all take
// their turns in the same generation.
func (r *roundRobin) takes(weight, index, generation uint64) bool {
	offset := index * (r.max/2 + 1)
	return (weight*(generation%r.max)+offset)%r.max < weight
}
