package flow

import (
	"errors"
	"fmt"
)

// Reason says why a decision was taken or why a connection ended. The set is
// closed. The first KernelReasons values are those of enum reason in
// bpf/include/abi.h; a test in package bpf compares them.
type Reason uint8

// Reasons that the kernel side gives.
const (
	ReasonNone Reason = iota

	// Redirected to the handler.
	ReasonService // a service names the destination
	ReasonDefault // no service does, and the default is relay

	// Left alone.
	ReasonProtocol    // not TCP
	ReasonNetns       // the socket lives in another network namespace
	ReasonBoundDevice // SO_BINDTODEVICE: a slot cannot be reached from there
	ReasonLoopback    // 127.0.0.0/8, ::1, and the unspecified addresses
	ReasonLinkLocal   // 169.254.0.0/16, fe80::/10
	ReasonMetadata    // a cloud provider's metadata service
	ReasonOwnAddress  // an address of this network namespace
	ReasonMulticast   // multicast or broadcast
	ReasonSelf        // the handler's own socket
	ReasonForeignSlot // a slot of another instance, which has decided already
	ReasonExcluded    // an exclusion names the destination
	ReasonDefaultPass // no rule does, and the default is pass
	ReasonNoRoute     // the kernel has no route: it answers itself
	// The application bound an address that is not of this namespace: a
	// slot's answer would not come back to it.
	ReasonForeignSource

	// Refused by rule.
	ReasonDenied      // a deny rule names the destination
	ReasonSlotAddress // the application dialed or bound a slot

	// Could not be redirected: on_failure decides.
	ReasonHandlerAbsent // no listener of ours answers for slots
	ReasonHandlerStale  // the heartbeat is old
	ReasonHandlerBusy   // the accept queue is nearly full
	ReasonNoSlot        // every slot is taken
	ReasonSlotQuota     // this container has used up its share of slots
	ReasonLiveFull      // too many connections are open
	ReasonConnQuota     // this container has too many connections open
	ReasonNoFamily      // no slots in this address family
	ReasonNoMemory      // the kernel had no memory for the decision

	// ReasonNoEndpoint: the cluster has no endpoint that may be picked. The
	// connect hook refuses at once; the handler when it finds out itself.
	ReasonNoEndpoint

	// What sk_lookup did with a packet for a slot.
	ReasonAdmitted   // handed to the handler
	ReasonProbe      // a look for the listener, by the connect hook
	ReasonNotLive    // dropped: nobody in scope opened it
	ReasonNoListener // dropped: the handler's listener is gone

	// What became of an answer to an application whose handshake waits for
	// the handler's dial.
	ReasonHeld      // kept back: the worker has it
	ReasonInjected  // no answer, but a frame that carries the result
	ReasonHoldStale // let through, and so early: the heartbeat is old
	ReasonHoldFull  // lost: the worker's ring is full. It is sent again
	ReasonForged    // dropped: not the handler sends it from a slot
	ReasonAwaited   // dropped: a refusal, while the handler may be back soon

	// What sockops saw.
	ReasonNoDecision // escaped: it connects, and no hook decided on it
	ReasonExisting   // escaped: it is older than the attach
	ReasonUnsent     // decided, but the kernel refused before the first packet
	ReasonLiveLost   // it could not be entered in live: refused

	// KernelReasons is how many reasons the kernel side knows.
	KernelReasons
)

// Reasons that only user space gives: how a connection ended.
const (
	ReasonClosed          Reason = iota + KernelReasons // both sides ended in order
	ReasonDownstreamReset                               // the application reset it
	ReasonUpstreamReset                                 // the endpoint reset it
	ReasonDialRefused                                   // every attempt failed, the last with ECONNREFUSED. On pass and direct the application made it
	ReasonDialTimeout                                   // ... with no answer in time
	ReasonDialUnreachable                               // ... with no route or an ICMP error
	ReasonDialFailed                                    // ... with another error
	ReasonAbandoned                                     // the application gave up while it was dialed
	ReasonIdleTimeout                                   // no byte moved for relay.idle_timeout
	ReasonMaxLifetime                                   // open for relay.max_lifetime
	ReasonNoDescriptors                                 // the descriptor limit was reached
	ReasonNotOurs                                       // accepted, but no live entry names it
	ReasonLoop                                          // it would have gone to the handler itself
	ReasonDrained                                       // ended by shutdown
	ReasonHandlerLost                                   // the handler was killed while it carried it
	ReasonRefused                                       // relay: refused before the handler had it
	ReasonTimeout                                       // relay: the handler did not answer it
	ReasonReset                                         // reset by either side (pass, direct: the kernel side cannot tell whose)
	ReasonEndpointRemoved                               // its endpoint is no longer one of the cluster's
	ReasonCrashed                                       // the handler died while it carried it, over and over, or could not go on with it

	reasonCount
)

var reasonNames = [reasonCount]string{
	ReasonNone:            "none",
	ReasonService:         "service",
	ReasonDefault:         "default",
	ReasonProtocol:        "protocol",
	ReasonNetns:           "netns",
	ReasonBoundDevice:     "bound_device",
	ReasonLoopback:        "loopback",
	ReasonLinkLocal:       "link_local",
	ReasonMetadata:        "metadata",
	ReasonOwnAddress:      "own_address",
	ReasonMulticast:       "multicast",
	ReasonSelf:            "self",
	ReasonForeignSlot:     "foreign_slot",
	ReasonExcluded:        "excluded",
	ReasonDefaultPass:     "default_pass",
	ReasonNoRoute:         "no_route",
	ReasonForeignSource:   "foreign_source",
	ReasonDenied:          "denied",
	ReasonSlotAddress:     "slot_address",
	ReasonHandlerAbsent:   "handler_absent",
	ReasonHandlerStale:    "handler_stale",
	ReasonHandlerBusy:     "handler_busy",
	ReasonNoSlot:          "no_slot",
	ReasonSlotQuota:       "slot_quota",
	ReasonLiveFull:        "live_full",
	ReasonConnQuota:       "conn_quota",
	ReasonNoFamily:        "no_family",
	ReasonNoMemory:        "no_memory",
	ReasonNoEndpoint:      "no_endpoint",
	ReasonAdmitted:        "admitted",
	ReasonProbe:           "probe",
	ReasonNotLive:         "not_live",
	ReasonNoListener:      "no_listener",
	ReasonHeld:            "held",
	ReasonInjected:        "injected",
	ReasonHoldStale:       "hold_stale",
	ReasonHoldFull:        "hold_full",
	ReasonForged:          "forged",
	ReasonAwaited:         "awaited",
	ReasonNoDecision:      "no_decision",
	ReasonExisting:        "existing",
	ReasonUnsent:          "unsent",
	ReasonLiveLost:        "live_lost",
	ReasonClosed:          "closed",
	ReasonDownstreamReset: "downstream_reset",
	ReasonUpstreamReset:   "upstream_reset",
	ReasonDialRefused:     "dial_refused",
	ReasonDialTimeout:     "dial_timeout",
	ReasonDialUnreachable: "dial_unreachable",
	ReasonDialFailed:      "dial_failed",
	ReasonAbandoned:       "abandoned",
	ReasonIdleTimeout:     "idle_timeout",
	ReasonMaxLifetime:     "max_lifetime",
	ReasonNoDescriptors:   "no_descriptors",
	ReasonNotOurs:         "not_ours",
	ReasonLoop:            "loop",
	ReasonDrained:         "drained",
	ReasonHandlerLost:     "handler_lost",
	ReasonRefused:         "refused",
	ReasonTimeout:         "timeout",
	ReasonReset:           "reset",
	ReasonEndpointRemoved: "endpoint_removed",
	ReasonCrashed:         "crashed",
}

// Reasons returns every reason, in the order of their values.
func Reasons() []Reason {
	all := make([]Reason, reasonCount)
	for i := range all {
		all[i] = Reason(i)
	}
	return all
}

// String returns the name that metrics, logs and the C enum share.
func (r Reason) String() string {
	if r < reasonCount {
		return reasonNames[r]
	}
	return fmt.Sprintf("reason(%d)", uint8(r))
}

// MarshalText implements encoding.TextMarshaler.
func (r Reason) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (r *Reason) UnmarshalText(text []byte) error {
	for i, name := range reasonNames {
		if name == string(text) {
			*r = Reason(i)
			return nil
		}
	}
	return fmt.Errorf("unknown reason %q", text)
}

// Error is an error that knows its reason. Sentinels are made by [NewError].
type Error struct {
	Reason Reason
	text   string
}

// NewError returns a sentinel error that carries reason.
func NewError(reason Reason, text string) *Error { return &Error{Reason: reason, text: text} }

// Error implements error.
func (e *Error) Error() string { return e.text }

// ReasonOf returns the reason that err carries, or ReasonNone. It is the only
// way from an error to a metric label or a field of a log line.
func ReasonOf(err error) Reason {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Reason
	}
	return ReasonNone
}
