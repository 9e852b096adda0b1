package loader

import (
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

// countEvery is how often the counts of open connections are compared with the
// sockets.
const countEvery = time.Minute

// counts compares what hooks count as open with what is.
type counts struct {
	last   time.Time
	off    map[uint32]int // when last looked: by how much counts were too high
	mended atomic.Uint64
}

// activity is what hooks have counted of an endpoint.
type activity struct {
	live             uint32
	connects, failed uint64
}

// due tells whether it is time to compare: a count that was wrong is looked at again
// without delay.
func (c *counts) due(now time.Time) bool {
	if len(c.off) == 0 && now.Sub(c.last) < countEvery {
		return false
	}
	c.last = now
	return true
}

// recount mends counts of open connections that are wrong: sockops keeps them, and
// another agent may have cleared its flags on a socket. A dump of the sockets is no
// snapshot, so it tells only of endpoints at which nothing was counted while it was
// made, and only what it tells twice is so: a connect that is given up at once is
// counted up and down. Called with d.mu.
func (d *Datapath) recount() error {
	if d.moving.Load() != nil {
		return nil // hooks of both layouts may count at this moment
	}
	before := d.sets.activity()
	open := make([]int, len(before))
	err := d.decided(func(s *socket, v *bpf.Decision) {
		if v.Counted != 0 && flow.Path(v.Path) == flow.PathDirect && int(v.Endpoint) < len(open) {
			open[v.Endpoint]++
		}
	})
	if err != nil {
		return err
	}
	after := d.sets.activity()
	off := map[uint32]int{}
	for n, a := range before {
		i := uint32(n)
		last, known := d.counts.off[i]
		if after[n] != a {
			if known {
				off[i] = last // it tells nothing new
			}
			continue
		}
		switch now := int(int32(a.live)) - open[n]; {
		case now == 0:
		case known && now == last:
			d.mend(i, now)
		default:
			off[i] = now
		}
	}
	d.counts.off = off
	return nil
}

// activity is what the hooks have counted, by index.
func (s *setTable) activity() []activity {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]activity, s.table.next)
	for i := range all {
		v := s.table.at(uint32(i)).load()
		all[i] = activity{live: v.Live, connects: v.Connects, failed: v.Failed}
	}
	return all
}

// mend takes from a count what is too much.
func (d *Datapath) mend(i uint32, off int) {
	s := &d.sets
	s.mu.Lock()
	defer s.mu.Unlock()
	own, addr := s.who(i)
	if own == nil {
		return // it was forgotten meanwhile
	}
	// Added, not written: a hook may count at this very moment.
	s.table.at(i).live().Add(uint32(-off))
	d.counts.mended.Add(1)
	d.options.Log.Warn("mended a count of open connections", "service", own.addr, "endpoint", addr, "off", off)
}

// who tells whose an index is.
func (s *setTable) who(i uint32) (*serviceSet, netip.AddrPort) {
	for _, own := range s.byID {
		for _, e := range own.endpoints {
			if e.index == i {
				return own, e.addr()
			}
		}
	}
	return nil, netip.AddrPort{}
}
