package upstream

import (
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/health"
)

// Endpoint is one address of a cluster in one snapshot. Its load and health
// are shared with the endpoints of the same cluster and address in earlier and
// later snapshots. All methods are lock-free and safe for concurrent use.
//
// For every dial the handler calls Begin, then Connected or Failed or (if the
// dial is given up) neither, and at the end of the connection or of the failed
// dial End.
type Endpoint struct {
	// What it is: Addr is the address that is dialed, unmapped. It is shared with
	// the other snapshots of the same layout, and must not be changed.
	*EndpointSpec

	group *health.Group
	*record
}

// record is the part of an endpoint that outlives a snapshot.
type record struct {
	ejector     *health.Ejector
	live        atomic.Int64
	connects    atomic.Uint64
	failures    atomic.Uint64
	connectTime atomic.Int64 // nanoseconds
	lastReason  atomic.Uint32
}

// EndpointState is what is known about an endpoint at one moment, as plain
// values for metrics and listings.
type EndpointState struct {
	Addr   netip.AddrPort
	Weight uint32
	Zone   string
	// Down is true while an active check says so. It is not picked then.
	Down bool
	// Ejected is true while health leaves the endpoint out. It may be picked
	// all the same, when too few others are left.
	Ejected bool
	// Live is how many connections are open or being dialed.
	Live int64
	// Connects and Failures count the dials that were answered and that
	// failed, Ejections how many times the endpoint was ejected.
	Connects, Failures, Ejections uint64
	// ConnectTime is how long the last answered dial took.
	ConnectTime time.Duration
	// LastReason is why the last failed dial failed, or ReasonNone.
	LastReason flow.Reason
}

// Available reports whether the endpoint may be picked: it is not down, and not
// ejected unless too many are. It is the only question that a policy asks about
// health.
func (e *Endpoint) Available() bool { return e.group.Available(e.ejector) }

// SetDown says what an active check has found. An endpoint is up until it is told
// otherwise, and what was told outlives reloads.
func (e *Endpoint) SetDown(down bool) { e.ejector.SetDown(down) }

// Down reports whether an active check says that the endpoint is down.
func (e *Endpoint) Down() bool { return e.ejector.Down() }

// Live returns how many connections are open or being dialed.
func (e *Endpoint) Live() int64 { return e.live.Load() }

// Begin says that a dial starts. Each Begin has exactly one End.
func (e *Endpoint) Begin() {
	e.live.Add(1)
	e.ejector.Dialing(&e.group.Config)
}

// Resume adds what another process counted, which had the endpoint before.
func (e *Endpoint) Resume(connects, failures, ejections uint64) {
	e.connects.Add(connects)
	e.failures.Add(failures)
	e.ejector.Resume(ejections)
}

// Carry says that a connection is open that another process dialed. It counts as
// one that Begin was called for, and is no dial.
func (e *Endpoint) Carry() { e.live.Add(1) }

// Connected says that the dial was answered, took after it started.
func (e *Endpoint) Connected(took time.Duration) {
	e.connects.Add(1)
	e.connectTime.Store(int64(took))
	e.ejector.Connected()
}

// Failed says that the dial failed. The reasons that are the endpoint's or its
// network's count towards ejection. The others do not: what ReasonDialFailed
// holds (no free port, a bound source that is gone, a local firewall rule) and
// a lack of descriptors hit every endpoint alike and say nothing about this one.
func (e *Endpoint) Failed(reason flow.Reason) {
	e.failures.Add(1)
	e.lastReason.Store(uint32(reason))
	switch reason {
	case flow.ReasonDialRefused, flow.ReasonDialTimeout, flow.ReasonDialUnreachable:
		e.ejector.Failed(&e.group.Config)
	default:
	}
}

// End says that the connection is closed, or that the dial failed or was given
// up.
func (e *Endpoint) End() { e.live.Add(-1) }

// State returns the endpoint's state. The values are read one by one, so under
// load they need not add up.
func (e *Endpoint) State() EndpointState {
	return EndpointState{
		Addr:        e.Addr,
		Weight:      e.Weight,
		Zone:        e.Zone,
		Down:        e.Down(),
		Ejected:     e.ejected(),
		Live:        e.live.Load(),
		Connects:    e.connects.Load(),
		Failures:    e.failures.Load(),
		Ejections:   e.ejector.Ejections(),
		ConnectTime: time.Duration(e.connectTime.Load()),
		LastReason:  flow.Reason(e.lastReason.Load()),
	}
}

// out reports whether the endpoint is down or ejected, panic or not.
func (e *Endpoint) out() bool { return e.Down() || e.ejected() }

// ejected reports whether the endpoint is left out, panic or not.
func (e *Endpoint) ejected() bool {
	return e.group.Config.Failures > 0 && e.ejector.Ejected()
}
