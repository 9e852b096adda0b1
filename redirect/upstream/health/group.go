package health

import (
	"math"
	"sync/atomic"
	"time"
)

// Group is the endpoints of one cluster in one snapshot: the unit of the panic
// threshold.
type Group struct {
	Config  Config
	monitor *Monitor
	members []*Ejector
	verdict atomic.Pointer[verdict]
}

// verdict is the last answer of Panicking and how long it holds: until an
// endpoint is ejected or connects (changes), or the next wait is over (expires).
type verdict struct {
	changes uint64
	expires time.Duration
	panics  bool
}

// NewGroup returns a group of members, which it keeps and does not change.
func NewGroup(m *Monitor, c Config, members []*Ejector) *Group {
	return &Group{Config: c, monitor: m, members: members}
}

// Available reports whether member may be picked: it is not ejected, or too
// many of the group are.
func (g *Group) Available(member *Ejector) bool {
	return g.Config.Failures == 0 || !member.Ejected() || g.Panicking()
}

// Panicking reports whether so few members are left that their ejections are
// ignored. It looks at all members only after a change, so that a pick that
// meets many ejected endpoints does bounded work.
func (g *Group) Panicking() bool {
	if g.Config.Panic == 0 || g.Config.Failures == 0 {
		return false
	}
	// Before the members are looked at: a change in between is then seen as
	// one by the next caller.
	changes := g.monitor.changes.Load()
	now := g.monitor.now()
	if v := g.verdict.Load(); v != nil && v.changes == changes && now < v.expires {
		return v.panics
	}
	v := g.judge(changes, now)
	g.verdict.Store(v)
	return v.panics
}

func (g *Group) judge(changes uint64, now time.Duration) *verdict {
	next := time.Duration(math.MaxInt64)
	available := 0
	for _, e := range g.members {
		left := e.left(now)
		if left == 0 {
			available++
			continue
		}
		// left is at most MaxInt64 - now, so this does not overflow.
		next = min(next, now+left)
	}
	return &verdict{
		changes: changes,
		expires: next,
		panics:  available*100 < g.Config.Panic*len(g.members),
	}
}

// Wait returns 0 if a member is available, and else after how long one is again.
func (g *Group) Wait() time.Duration {
	if g.Config.Failures == 0 || g.Config.Panic > 0 {
		return 0
	}
	now := g.monitor.now()
	next := time.Duration(math.MaxInt64)
	for _, e := range g.members {
		left := e.left(now)
		if left == 0 {
			return 0
		}
		next = min(next, left)
	}
	return next
}
