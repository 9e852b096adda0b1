package metrics

import "time"

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
	// Unaccounted is what the conservation law leaves over; it should be 0.
	Unaccounted int64
	// Slots counts slots by state: free, named, reserved, retiring.
	Slots map[string]int
	// SlotsMax is how many slots may be used.
	SlotsMax int
	// Live is how many connections are open on relay.
	Live int
	// BeatAge is the age of the last sign of life.
	BeatAge time.Duration
}

// Endpoints lists the endpoints of all clusters. It is asked as [Kernel] is.
type Endpoints interface {
	Endpoints() []EndpointStats
}

// EndpointStats are the counters of one endpoint of one cluster.
type EndpointStats struct {
	Cluster string
	// Addr is its address and port.
	Addr    string
	Weight  uint32
	Ejected bool
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

// Sources are what the metrics are read from. One that is nil has no metrics.
type Sources struct {
	Kernel    Kernel
	Endpoints Endpoints
	Relay     Relay
	// Losses counts records that are missing or incomplete, by where:
	// unreadable, unmatched, handler, flowlog. What it says of handler goes
	// before what Relay says; ring comes from Kernel.
	Losses func() map[string]uint64
	// Version is the build's.
	Version string
}
