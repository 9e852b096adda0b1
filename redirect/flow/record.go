package flow

import (
	"net/netip"
	"time"
)

// Record is one connection: what the application asked for, what it got, on
// which path and why, and how it ended. The handler and the kernel side each
// know a part; telemetry/events joins them by Cookie.
//
// A record is a plain value: whoever receives a copy owns it.
type Record struct {
	Cookie  uint64         `json:"cookie"`
	Cgroup  uint64         `json:"cgroup"`
	Source  netip.AddrPort `json:"source"`
	OrigDst netip.AddrPort `json:"original_destination"`
	Service string         `json:"service,omitempty"`
	Cluster string         `json:"cluster,omitempty"`
	// Endpoint is the address that was dialed last; not valid if none was.
	Endpoint netip.AddrPort `json:"endpoint,omitzero"`
	Path     Path           `json:"path"`
	Reason   Reason         `json:"reason"`
	// End is how the connection ended, ReasonNone while it is open.
	End Reason `json:"end"`
	// Attempts is how many endpoints were dialed.
	Attempts int       `json:"attempts"`
	Start    time.Time `json:"start"`
	// Duration is the life of the connection so far, in nanoseconds in JSON.
	Duration time.Duration `json:"duration_ns"`
	// Connect is how long the last dial took to be answered.
	Connect time.Duration `json:"connect_ns"`
	// RTT is the smoothed round-trip time to the endpoint.
	RTT time.Duration `json:"rtt_ns"`
	// Retransmits counts segments sent again to the endpoint.
	Retransmits uint32 `json:"retransmits"`
	// Sent counts bytes from the application to the endpoint, Received bytes
	// from the endpoint to the application.
	Sent     uint64 `json:"bytes_sent"`
	Received uint64 `json:"bytes_received"`
	// Mirrored is true when the application's handshake waited for the dial.
	Mirrored bool `json:"mirrored"`
	// Open is true in a listing of live connections.
	Open bool `json:"open"`
}
