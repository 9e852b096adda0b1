package loader

import (
	"errors"
	"net/netip"

	"github.com/pillion-project/pillion/redirect/flow"
)

var (
	// ErrTooManySets means that more services have sets than the map has room for.
	ErrTooManySets = errors.New("too many services have endpoints")
	// ErrTooManyEndpoints means that a set, or all of them together, have more
	// endpoints than there is room for.
	ErrTooManyEndpoints = errors.New("too many endpoints")
	// ErrBadSet means that a set's parts do not fit each other, or not the
	// family of its service's address.
	ErrBadSet = errors.New("the endpoint set is not valid")
	// ErrNoService means that [Datapath.SetRules] was not told of a service.
	ErrNoService = errors.New("no such service")
	// ErrNoSuchEndpoint means that a service never had an endpoint, or it is
	// forgotten.
	ErrNoSuchEndpoint = errors.New("no such endpoint")
)

// SetEndpoints replaces the sets of some services, all in one step of the kernel:
// a pick finds the old set of a service or its new one. A nil set takes a
// service's away. What is published already is not published again. Down of an
// endpoint is written with the set, unless it is the very set (pointer) that the
// service has. On [ErrNoService], [ErrBadSet], [ErrTooManySets] or
// [ErrTooManyEndpoints] nothing was changed.
func (d *Datapath) SetEndpoints(sets map[netip.AddrPort]*flow.Set) error { return nil }

// SetDown tells the connect hook whether a health check says that an endpoint is
// down. It fails with [ErrNoService] or [ErrNoSuchEndpoint].
func (d *Datapath) SetDown(service, endpoint netip.AddrPort, down bool) error { return nil }

// SetSpill changes, of 2^32, the share of a service's connections that go to its
// second tier, in place. It does nothing when a tier is empty, and fails with
// [ErrNoService] when the service has no set.
func (d *Datapath) SetSpill(service netip.AddrPort, spill uint32) error { return nil }
