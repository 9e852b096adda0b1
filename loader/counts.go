package loader

import (
	"maps"
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
	before map[uint32]miscount // when last looked
	mended atomic.Uint64
}

// miscount is a count that is not that of the sockets. What stands in it is the
// same the next time only if nobody connected or left in between.
type miscount struct {
	live             uint32
	connects, failed uint64
	sockets          map[uint64]bool // by cookie
}

func (m *miscount) same(other *miscount) bool {
	return m.live == other.live && m.connects == other.connects && m.failed == other.failed &&
		maps.Equal(m.sockets, other.sockets)
}

// due tells whether it is time to compare.
func (c *counts) due(now time.Time) bool {
	if now.Sub(c.last) < countEvery {
		return false
	}
	c.last = now
	return true
}

// recount mends counts of open connections that are wrong: sockops keeps them, and
// another agent may have cleared its flags on a socket. A dump of the sockets is no
// snapshot, so only what is wrong in the same way twice, with nothing going on, is
// wrong. Called with d.mu.
func (d *Datapath) recount() error {
	before := d.sets.activity()
	if len(before) == 0 {
		return nil // nobody ever had endpoints
	}
	found := map[uint32]map[uint64]bool{}
	err := d.decided(func(s *socket, v *bpf.Decision) {
		if v.Counted == 0 || flow.Path(v.Path) != flow.PathDirect {
			return
		}
		if found[v.Endpoint] == nil {
			found[v.Endpoint] = map[uint64]bool{}
		}
		found[v.Endpoint][s.cookie()] = true
	})
	if err != nil {
		return err
	}
	wrong := map[uint32]miscount{}
	for n, m := range before {
		i := uint32(n)
		m.sockets = found[i]
		if int(m.live) != len(m.sockets) {
			wrong[i] = m
		}
	}
	for i, m := range wrong {
		if old, ok := d.counts.before[i]; ok && old.same(&m) && d.mend(i, &m) {
			delete(wrong, i)
		}
	}
	d.counts.before = wrong
	return nil
}

// activity is what the hooks have counted, by index.
func (s *setTable) activity() []miscount {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]miscount, s.table.next)
	for i := range all {
		v := s.table.at(uint32(i)).load()
		all[i] = miscount{live: v.Live, connects: v.Connects, failed: v.Failed}
	}
	return all
}

// mend adds what is missing to a count, unless something went on since.
func (d *Datapath) mend(i uint32, m *miscount) bool {
	s := &d.sets
	s.mu.Lock()
	defer s.mu.Unlock()
	own, addr := s.who(i)
	if own == nil {
		return false
	}
	e := s.table.at(i)
	if v := e.load(); v.Live != m.live || v.Connects != m.connects || v.Failed != m.failed {
		return false
	}
	// Added, not written: a hook may count at this very moment.
	e.live().Add(uint32(len(m.sockets)) - m.live)
	d.counts.mended.Add(1)
	d.options.Log.Warn("mended a count of open connections", "service", own.addr, "endpoint", addr,
		"counted", m.live, "open", len(m.sockets))
	return true
}

// who tells whose an index is.
func (s *setTable) who(i uint32) (*serviceSet, netip.AddrPort) {
	for _, own := range s.byID {
		for addr, n := range own.endpoints {
			if n == i {
				return own, addr
			}
		}
	}
	return nil, netip.AddrPort{}
}
