package kube

import (
	"context"
	"net/netip"
	"time"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
)

// DemandOptions are the settings of a [Demand]. The zero value has defaults.
type DemandOptions struct {
	// Idle is after how long without a connection a service is dropped; 0 is ten
	// minutes.
	Idle time.Duration
	// NotFound is for how long an address that is no service's is not looked up
	// again; 0 is one minute. Failed is the same for a look-up that failed; 0 is
	// five seconds.
	NotFound, Failed time.Duration
	// MaxServices bounds how many services are in use at once, and MaxNotFound
	// how many addresses are remembered; 0 is 1,000 and 4,096.
	MaxServices, MaxNotFound int
	// Used tells how many connections to a service's address there have been, and
	// how many there are. It is called from Run, for each service, several times
	// per Idle. Nil: only being asked for counts as use.
	Used func(addr netip.AddrPort) (connects uint64, live int)
	// Within are the ranges of service addresses, if they are known: no other
	// address is looked up. Empty is any.
	Within []netip.Prefix
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

// Service is a port of a service that is in use.
type Service struct {
	// Name is "namespace/name:port", the port by number.
	Name string
	// Host is "name.namespace.svc.cluster.local".
	Host string
	// Addr is ClusterIP and port. Its address is not valid for a headless service,
	// which has none: those are found by name only.
	Addr netip.AddrPort
	// Affinity is the service's sessionAffinity: ClientIP.
	Affinity bool
	// Source tells the endpoints, of Addr's family where there is one. Sources of
	// equal Name and Addr are interchangeable.
	Source discover.Source
}

// DemandStats counts what a [Demand] did.
type DemandStats struct {
	Asked                   uint64 // addresses and names that were taken from the hot path
	Dropped                 uint64 // those that found the queue full
	Lookups                 uint64 // requests to the API server
	Found, NotFound, Failed uint64 // how they ended
	Services                int    // in use now
}

// Demand finds out which services the application uses. Asked and AskedName may
// be called from anywhere; what they are told is looked up by Run.
type Demand struct{}

// Demand returns the services that the application asks for.
func (c *Client) Demand(o DemandOptions) *Demand { return nil }

// Asked says that the application connects to dst, which no service names. It
// takes no lock, allocates nothing, and never blocks: what is too much is
// forgotten, and asked again by the next connection.
func (d *Demand) Asked(dst netip.AddrPort) {}

// AskedName says that the application asked for a name: name.namespace.svc, with
// the cluster's domain or without. It never blocks. Other names are ignored.
func (d *Demand) AskedName(host string) {}

// Stats returns the counts.
func (d *Demand) Stats() DemandStats { return DemandStats{} }

// Run sends the whole list of the services in use, sorted by name and address,
// whenever it changes, until ctx is done. Then it returns nil, and every
// goroutine that it started has ended.
//
// A service comes into the list when its address or name is asked for, and
// leaves it when it was not used for a time, or when it is gone. What cannot be
// served as kube-proxy would do it stays out: ExternalName, a proxy of its own
// (service.kubernetes.io/service-proxy-name), internalTrafficPolicy: Local with
// the node unknown.
func (d *Demand) Run(ctx context.Context, out chan<- []Service) error { return nil }
