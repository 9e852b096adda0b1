package metrics

import (
	"net/netip"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

// Kernel reads the counters of the kernel side. It is asked at every scrape, by
// several goroutines at once.
type Kernel interface {
	Kernel() (KernelStats, error)
}

// KernelStats are the counters of the kernel side since the instance was
// created, and its state.
type KernelStats struct {
	// Reasons counts by flow.Reason, which is the index.
	Reasons []uint64
	// Connects counts active opens in scope, Decided connects that a hook let
	// through, Denied those that one refused, Unsent those that the kernel
	// itself refused after the decision, Escaped active opens without one.
	Connects, Decided, Denied, Unsent, Escaped uint64
	// EventsLost counts events that found the ring full.
	EventsLost uint64
	// Stored counts decisions that are in socket storage for want of a cell.
	Stored uint64
	// Unaccounted is what the conservation law leaves over; it should be 0.
	Unaccounted int64
	// Slots counts slots by state: free, named, reserved, retiring.
	Slots map[string]int
	// SlotsMax is how many slots may be used.
	SlotsMax int
	// Live is how many connections are open on relay.
	Live int
	// Mended counts live counts of endpoints that were off when they were
	// compared with the sockets that there are.
	Mended uint64
	// BeatAge is the age of the last sign of life.
	BeatAge time.Duration
}

// Endpoints lists the endpoints of all clusters. It is asked as [Kernel] is. The list
// is the caller's.
type Endpoints interface {
	Endpoints() []EndpointStats
}

// EndpointStats are the counters of one endpoint of one cluster.
type EndpointStats struct {
	Cluster string
	// Addr is its address and port.
	Addr   netip.AddrPort
	Weight uint32
	// Zone is where it is, or empty.
	Zone string
	// Path is the one that the connections to it take.
	Path flow.Path
	// Ejected is true while its failures keep it from being picked, Down while
	// a health check does.
	Ejected, Down bool
	// LeftOut is true if the connect hook cannot dial it, on whose path it is.
	LeftOut bool
	// Live is how many connections are open or being dialed.
	Live int64
	// Connects and Failures count dials that were answered and that failed,
	// Ejections how often health left the endpoint out.
	Connects, Failures, Ejections uint64
	// ConnectTime is how long the last answered dial took.
	ConnectTime time.Duration
}

// Relay reads the counters of the handler's engine. It is asked as [Kernel] is.
type Relay interface {
	Relay() RelayStats
}

// RelayStats are the counters of the handler since it started.
type RelayStats struct {
	// Accepted, Ended and Live count connections; Live are open now.
	Accepted, Ended, Live uint64
	// Dials counts dials to endpoints, DialFailures those that failed, Retries
	// those that followed a failed one of the same connection.
	Dials, DialFailures, Retries uint64
	// Unknown counts accepted connections that no live entry names.
	Unknown uint64
	// AcceptPauses counts how often accepting stopped for want of descriptors.
	AcceptPauses uint64
	// Refused counts connections whose applications' connect never succeeded,
	// NotInjected frames that could not be sent to say so, or the opposite.
	Refused, NotInjected uint64
	// LostRecords counts ended connections that nobody took in time.
	LostRecords uint64
	// Pipes is how many pipes are open for bulk transfers.
	Pipes int
}

// Configuration tells which configuration holds. It is asked as [Kernel] is.
type Configuration interface {
	Configuration() ConfigurationStats
}

// ConfigurationStats is the state of the configuration.
type ConfigurationStats struct {
	// Generation counts the configurations that were taken, from 1.
	Generation uint64
	// Refused are the names of the services and sources of the last one that
	// were not taken.
	Refused []string
	// Reloads counts those that were read, Failures those of them of which
	// nothing was taken.
	Reloads, Failures uint64
	// Tried is when one was last read, and OK that all of it was taken.
	Tried time.Time
	OK    bool
}

// Discovery tells about the sources of endpoints. It is asked as [Kernel] is.
type Discovery interface {
	Discovery() []DiscoveryStats
}

// DiscoveryStats is the state of the source of one service. Static ones have
// none.
type DiscoveryStats struct {
	Service string
	// Source is its kind: file, dns, kubernetes.
	Source string
	// Age is for how long it has not been able to tell: 0 while it stands by its
	// endpoints. One that never told is as old as the question.
	Age time.Duration
	// Stale is true while it does not tell.
	Stale bool
	// Changes counts the answers that differed from the one before, Errors the
	// times that it could not tell.
	Changes, Errors uint64
	// Endpoints is how many there are now.
	Endpoints int
}

// Sets reads the counters of the endpoint sets in the kernel. It is asked as
// [Kernel] is.
type Sets interface {
	Sets() SetStats
}

// SetStats are the counters of the endpoint sets since the process started.
type SetStats struct {
	// Sets is how many there are, SetEndpoints how many endpoints in them.
	Sets, SetEndpoints int
	// Publishes counts batches of sets that were written, Failures those that
	// were not.
	Publishes, Failures uint64
	// PublishTime is how long the last one took.
	PublishTime time.Duration
	// Ended counts connections that were ended since their endpoint was
	// removed.
	Ended uint64
}

// Checks tells what the active health checks find. It is asked as [Kernel] is.
type Checks interface {
	Checks() []CheckStats
}

// CheckStats is how many endpoints of one cluster are in which state by their
// checks.
type CheckStats struct {
	Cluster string
	// Unknown are those that were not checked yet, which count as up.
	Up, Down, Unknown int
	// Failing are those whose last check failed, whatever their state.
	Failing int
}

// Sources are what the metrics are read from. One that is nil has no metrics.
type Sources struct {
	Kernel    Kernel
	Endpoints Endpoints
	Relay     Relay
	// Configuration, Discovery, Sets and Checks are as those.
	Configuration Configuration
	Discovery     Discovery
	Sets          Sets
	Checks        Checks
	// Losses counts records that are missing or incomplete, by where:
	// unreadable, unmatched, handler, flowlog. What it says of handler goes
	// before what Relay says; ring comes from Kernel.
	Losses func() map[string]uint64
	// Version is the build's.
	Version string
}
