package admin

import (
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

// Values of [Status.Kind]: the command that started the instance.
const (
	KindRun  = "run"
	KindExec = "exec"
)

// Values of [Status.State].
const (
	// StateServing: new connections go by the configuration.
	StateServing = "serving"
	// StateDraining: shutting down, on_failure decides about new ones.
	StateDraining = "draining"
	// StateStale: the sign of life is missing, on_failure decides.
	StateStale = "stale"
)

// Status is what an instance tells about itself.
type Status struct {
	Instance string `json:"instance"`
	// Kind is [KindRun] or [KindExec].
	Kind    string `json:"kind"`
	Version string `json:"version"`
	Pid     int    `json:"pid"`
	// Scope is the path of the cgroup whose connections are captured.
	Scope string `json:"scope"`
	// Ready is true once everything is attached and the first canary is back.
	Ready bool `json:"ready"`
	// State is [StateServing], [StateDraining] or [StateStale].
	State string `json:"state"`
	// OnFailure is the default, open or closed.
	OnFailure string `json:"on_failure"`
	// Connect is when connects end that no service names: adaptive, mirror or
	// early. Where the kernel cannot hold them back it is early.
	Connect string `json:"connect"`
	// Slots4 and Slots6 are the instance's own slot prefixes, empty for a
	// family that it does not capture.
	Slots4  string    `json:"slots4,omitempty"`
	Slots6  string    `json:"slots6,omitempty"`
	Started time.Time `json:"started"`
	// Live is how many connections are open on relay.
	Live int `json:"live"`
	// Counters has the kernel side's reasons that are not 0, by name.
	Counters map[string]uint64 `json:"counters"`
	// Unaccounted is what the conservation law leaves over: 0, unless there is
	// a way around the hooks that Pillion does not know.
	Unaccounted int64           `json:"unaccounted"`
	Services    []ServiceStatus `json:"services"`
	// Problems are sentences about what is wrong now.
	Problems []string `json:"problems"`
}

// ServiceStatus is one service with its endpoints.
type ServiceStatus struct {
	Name      string           `json:"name"`
	Address   string           `json:"address"`
	Policy    string           `json:"policy"`
	Endpoints []EndpointStatus `json:"endpoints"`
}

// EndpointStatus is one endpoint as the balancer sees it.
type EndpointStatus struct {
	Address string `json:"address"`
	Weight  uint32 `json:"weight"`
	// Ejected is true while its failures keep it from being picked.
	Ejected bool `json:"ejected"`
	// Live is how many connections to it are open or being dialed.
	Live int64 `json:"live"`
	// Connects and Failures count dials that were answered and that failed.
	Connects uint64 `json:"connects"`
	Failures uint64 `json:"failures"`
	// LastReason is why the last failed dial failed, or none.
	LastReason flow.Reason `json:"last_reason"`
}
