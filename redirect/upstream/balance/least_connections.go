package balance

import "github.com/pillion-project/pillion/redirect/upstream"

// leastConnections draws two endpoints and takes the one with the fewer live
// connections for its weight. Looking at all of them was rejected: workers that
// look at the same moment all see the same least loaded one, and rush to it.
type leastConnections struct {
	weights
	random func() uint64
}

// draws is how many endpoints are drawn to find two available ones. With half
// of a cluster ejected (more is panic) it finds none once in 2^6 picks.
const draws = 6

// LeastConnections takes the less loaded of two endpoints drawn at random.
func LeastConnections(endpoints []*upstream.Endpoint, random func() uint64) upstream.Picker {
	return &leastConnections{weights: newWeights(endpoints), random: random}
}

// Pick implements upstream.Picker.
func (l *leastConnections) Pick(uint64) (*upstream.Endpoint, error) {
	switch len(l.endpoints) {
	case 0:
		return nil, upstream.ErrNoEndpoint
	case 1:
		if e := l.endpoints[0]; e.Available() {
			return e, nil
		}
		return nil, upstream.ErrNoEndpoint
	default:
	}
	// The first is drawn by weight and the second is any other. Without load
	// the first is taken, which makes the shares those of the weights; two
	// draws by weight would be the same endpoint too often when one is heavy.
	first := -1
	for range draws {
		if first < 0 {
			if i := l.draw(l.random()); l.endpoints[i].Available() {
				first = i
			}
			continue
		}
		second := int(l.random() % uint64(len(l.endpoints)-1))
		if second >= first {
			second++
		}
		if l.endpoints[second].Available() {
			return less(l.endpoints[first], l.endpoints[second]), nil
		}
	}
	if first >= 0 {
		return l.endpoints[first], nil
	}
	return l.drawAvailable(l.random())
}

// less returns the endpoint with the fewer live connections for its weight, and
// a when they are equal. It compares live, not live+1: with the connection to
// come counted in, the heavier of two idle endpoints would always win, and a
// light one would get nothing from an application that connects now and then.
func less(a, b *upstream.Endpoint) *upstream.Endpoint {
	if b.Live()*int64(a.Weight) < a.Live()*int64(b.Weight) {
		return b
	}
	return a
}
