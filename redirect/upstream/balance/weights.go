package balance

import (
	"slices"

	"github.com/pillion-project/pillion/redirect/upstream"
)

// weights draws endpoints at random, each by its share of the weight.
type weights struct {
	endpoints []*upstream.Endpoint
	// sums[i] is the weight of endpoints 0 to i together.
	sums []uint64
}

func newWeights(endpoints []*upstream.Endpoint) weights {
	w := weights{endpoints: endpoints, sums: make([]uint64, len(endpoints))}
	var sum uint64
	for i, e := range endpoints {
		sum += uint64(e.Weight)
		w.sums[i] = sum
	}
	return w
}

// draw returns the index of one endpoint, available or not. There must be one.
func (w weights) draw(random uint64) int {
	n := len(w.sums)
	i, found := slices.BinarySearch(w.sums, random%w.sums[n-1])
	if found {
		i++ // a sum is the first value of the next endpoint's range
	}
	return i
}

// drawAvailable returns an available endpoint, in time linear in the number of
// endpoints. It is what policies fall back to when their short cuts meet
// unavailable endpoints only.
func (w weights) drawAvailable(random uint64) (*upstream.Endpoint, error) {
	var sum uint64
	for _, e := range w.endpoints {
		if e.Available() {
			sum += uint64(e.Weight)
		}
	}
	if sum == 0 {
		return nil, upstream.ErrNoEndpoint
	}
	left := random % sum
	var last *upstream.Endpoint
	for _, e := range w.endpoints {
		if !e.Available() {
			continue
		}
		last = e
		if left < uint64(e.Weight) {
			return e, nil
		}
		left -= uint64(e.Weight)
	}
	// Some were ejected between the two loops. If all were, the first loop's
	// answer is as good as none.
	if last == nil {
		return nil, upstream.ErrNoEndpoint
	}
	return last, nil
}
