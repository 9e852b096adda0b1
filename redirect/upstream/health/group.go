package health

import (
	"math"
	"sync/atomic"
	"time"
)

// Group is the endpoints of one cluster in one snapshot: the unit of the panic
// threshold.
type Group struct {
	Config   Config
	monitor  *Monitor
	members  []*Ejector
	overflow func(available func(i int) bool) uint32
	verdict  atomic.Pointer[verdict]
}

// verdict is what follows from the health of all members, and how long it holds:
// until an endpoint is ejected, connects, goes down or comes up (changes), or the
// next wait is over (expires).
type verdict struct {
	changes uint64
	expires time.Duration
	// up is how many members are not down, available how many of them are not
	// ejected either.
	up, available int
	panics        bool
	spill         uint32
}

// NewGroup returns a group of members, which it keeps and does not change.
// overflow says how many connections spill to other zones; nil is none.
func NewGroup(m *Monitor, c Config, members []*Ejector, overflow func(available func(i int) bool) uint32) *Group {
	return &Group{Config: c, monitor: m, members: members, overflow: overflow}
}

// Available reports whether member may be picked: it is not down, and it is not
// ejected, or too many of the group are.
func (g *Group) Available(member *Ejector) bool {
	return !member.Down() && (g.Config.Failures == 0 || !member.Ejected() || g.Panicking())
}

// Panicking reports whether so few members are left that their ejections are
// ignored.
func (g *Group) Panicking() bool {
	if g.Config.Panic == 0 || g.Config.Failures == 0 {
		return false
	}
	return g.look().panics
}

// Spill returns what overflow says of the members that are available now.
func (g *Group) Spill() uint32 { return g.look().spill }

// look looks at all members only after a change, so that a pick that meets many
// ejected endpoints does bounded work.
func (g *Group) look() *verdict {
	// Before the members are looked at: a change in between is then seen as
	// one by the next caller.
	changes := g.monitor.changes.Load()
	now := g.monitor.now()
	if v := g.verdict.Load(); v != nil && v.changes == changes && now < v.expires {
		return v
	}
	v := g.judge(changes, now)
	g.verdict.Store(v)
	return v
}

func (g *Group) judge(changes uint64, now time.Duration) *verdict {
	v := &verdict{changes: changes, expires: math.MaxInt64}
	for _, e := range g.members {
		if e.Down() {
			continue
		}
		v.up++
		left := g.left(e, now)
		if left == 0 {
			v.available++
			continue
		}
		// left is at most MaxInt64 - now, so this does not overflow.
		v.expires = min(v.expires, now+left)
	}
	v.panics = v.available*100 < g.Config.Panic*v.up
	if g.overflow != nil {
		v.spill = g.overflow(func(i int) bool {
			e := g.members[i]
			return !e.Down() && (v.panics || g.left(e, now) == 0)
		})
	}
	return v
}

// left is how long the member is ejected still.
func (g *Group) left(e *Ejector, now time.Duration) time.Duration {
	if g.Config.Failures == 0 {
		return 0
	}
	return e.left(now)
}

// recheck is how long one is to wait who waits for a check, or for a member at all:
// nobody knows.
const recheck = time.Second

// Wait returns 0 if a member is available, and else after how long one may be again.
func (g *Group) Wait() time.Duration {
	now := g.monitor.now()
	v := g.look()
	switch {
	case v.available > 0 || v.panics:
		return 0
	case v.up < len(g.members) || v.up == 0:
		return min(recheck, max(v.expires-now, 1))
	default:
		return max(v.expires-now, 1)
	}
}
