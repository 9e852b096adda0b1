// Package discover finds the endpoints of services. Each source is a package or a
// file with a [Source]: file, DNS, Kubernetes. A static list needs none.
package discover

import (
	"context"
	"net/netip"

	"github.com/pillion-project/pillion/redirect/flow"
)

// Endpoint is one address that serves a service.
type Endpoint = flow.Endpoint

// Snapshot is one answer of a source: the whole set, or why there is none.
type Snapshot struct {
	// Endpoints are all that there are. None without an Err is an answer too:
	// the source says that there is nobody. They are the receiver's.
	Endpoints []Endpoint
	// Lacks says of which families Endpoints may not be all: a part of the whole could
	// not be found, and the source, which has not told all yet, remembers none of it.
	Lacks Lack
	// Err is why the source could not tell. The last good set then stays, and is
	// stale.
	Err error
}

// Lack is families of which a set may lack addresses.
type Lack uint8

// The families.
const (
	LackIPv4 Lack = 1 << iota
	LackIPv6
)

// Of tells whether a set may lack an address.
func (l Lack) Of(a netip.Addr) bool {
	if a.Unmap().Is4() {
		return l&LackIPv4 != 0
	}
	return l&LackIPv6 != 0
}

// Source tells the endpoints of one service for as long as it runs. A bad or
// doubtful answer is an Err and never an empty set.
type Source interface {
	// Run sends a snapshot as soon as it can, one whenever the set changes, and
	// one with an Err whenever it fails to tell, until ctx is done. Then it
	// returns nil, and every goroutine that it started has ended. It returns an
	// error only when it can never tell: its settings make no sense.
	Run(ctx context.Context, out chan<- Snapshot) error
}

// Follower is a [Source] that can also tell without a goroutine to receive it: of
// hundreds of sources, those take megabytes.
type Follower interface {
	Source
	// Follow is Run, but that it calls tell, which may block for as long as what
	// was told is taken over. Once ctx is done, what it tells is ignored.
	Follow(ctx context.Context, tell func(Snapshot)) error
}
