package admin

import (
	"encoding/json"
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
	// TakenOver is how the process came to the instance; nil: it started it, or found
	// it without one.
	TakenOver *TakenOver `json:"taken_over,omitempty"`
	// Live is how many connections are open on relay.
	Live int `json:"live"`
	// Configuration is which one holds, and what of the last one does not.
	Configuration ConfigurationStatus `json:"configuration"`
	// Counters has the kernel side's reasons that are not 0, by name.
	Counters map[string]uint64 `json:"counters"`
	// Unaccounted is what the conservation law leaves over: 0, unless there is
	// a way around the hooks that Pillion does not know.
	Unaccounted int64           `json:"unaccounted"`
	Services    []ServiceStatus `json:"services"`
	// Problems are sentences about what is wrong now.
	Problems []string `json:"problems"`
}

// TakenOver tells of the process that the instance was taken over from.
type TakenOver struct {
	At      time.Time `json:"at"`
	Pid     int       `json:"pid"`
	Version string    `json:"version"`
	// Connections is how many were open, and Pause how long they stood still.
	Connections int           `json:"connections"`
	Pause       time.Duration `json:"pause_ns"`
}

// ConfigurationStatus tells which configuration holds.
type ConfigurationStatus struct {
	// Generation counts the configurations that were taken, from 1.
	Generation uint64 `json:"generation"`
	// File is where it came from, empty if it was flags alone.
	File string `json:"file,omitempty"`
	// Loaded is when it was taken, Tried when one was last read.
	Loaded time.Time `json:"loaded,omitzero"`
	Tried  time.Time `json:"tried,omitzero"`
	// By is at whose word it was taken: one of the constants below.
	By string `json:"by,omitempty"`
	// Refused is what of the last one that was read was not taken; an earlier
	// state of it holds instead, or none.
	Refused []Refusal `json:"refused"`
}

// Values of [ConfigurationStatus.By] and [ReloadResult.By].
const (
	TakenAtStart  = "start"
	TakenByWatch  = "watch"  // the file had changed
	TakenBySignal = "signal" // SIGHUP
	TakenByReload = "reload" // a request, as of pillion reload
)

// Refusal is a part of a configuration that was not taken.
type Refusal struct {
	// Name is the service; empty: the whole configuration.
	Name string `json:"name,omitempty"`
	// Source is true if only where its endpoints come from was refused.
	Source bool `json:"source,omitempty"`
	// Where is file:line:column.
	Where string `json:"where,omitempty"`
	// Text says what is wrong, and what was meant where that can be guessed; one
	// problem a line, each with its place.
	Text string `json:"text"`
	// Kept are the services that stay as they were on its account; none: there
	// was nothing to keep. Of a whole configuration, the earlier one stays.
	Kept []string `json:"kept,omitempty"`
}

// ReloadResult is what became of a reload: what holds now, whoever took it.
type ReloadResult struct {
	// Generation is the configuration that holds now, File where it came from.
	Generation uint64 `json:"generation"`
	File       string `json:"file,omitempty"`
	// Loaded is when it was taken, and By at whose word.
	Loaded time.Time `json:"loaded,omitzero"`
	By     string    `json:"by,omitempty"`
	// Changes are lines that tell what this reload has made different, none if
	// nothing is.
	Changes []string `json:"changes"`
	// Earlier is true if what holds was taken before: a watch on the file may be
	// faster. Changed are the changes of then, if the file still says the same.
	Earlier bool     `json:"earlier,omitempty"`
	Changed []string `json:"changed,omitempty"`
	// Refused is what of the file is not in force, whoever read it first.
	Refused []Refusal `json:"refused"`
}

// DiffResult is what a reload with another text would do.
type DiffResult struct {
	// Changes are those that it would make; nil: it would refuse the whole text.
	Changes json.RawMessage `json:"changes,omitempty"`
	// Refused is what it would not take.
	Refused []Refusal `json:"refused"`
}

// Values of [ServiceStatus.Source]: where the endpoints come from.
const (
	SourceStatic     = "static"
	SourceFile       = "file"
	SourceDNS        = "dns"
	SourceKubernetes = "kubernetes"
)

// ServiceStatus is one service with its endpoints.
type ServiceStatus struct {
	Name    string `json:"name"`
	Address string `json:"address"`
	Policy  string `json:"policy"`
	// Path is the one that its connections take, PathAsked what the
	// configuration says, which may be auto, and Why, for each cheaper path, why
	// it is not taken.
	Path      flow.Path `json:"path"`
	PathAsked string    `json:"path_asked"`
	Why       []string  `json:"why,omitempty"`
	// Cluster is where its endpoints are, if it is not named like the service.
	Cluster string `json:"cluster,omitempty"`
	// Where is its place in the configuration.
	Where  string       `json:"where,omitempty"`
	Source SourceStatus `json:"source"`
	// Endpoints are never nil, but may be none.
	Endpoints []EndpointStatus `json:"endpoints"`
}

// SourceStatus is where the endpoints of a service come from.
type SourceStatus struct {
	// Kind is one of the constants above.
	Kind string `json:"kind"`
	// Name is what is looked at: a file, a DNS name, a service of Kubernetes.
	Name string `json:"name,omitempty"`
	// Updated is when it last told; zero for static ones, and for one that has
	// not told yet.
	Updated time.Time `json:"updated,omitzero"`
	// Stale is true while it does not tell: the last good set stays.
	Stale bool `json:"stale"`
	// Error is why it does not tell.
	Error string `json:"error,omitempty"`
}

// Values of [EndpointStatus.State].
const (
	EndpointAvailable = "available"
	// EndpointEjected: its failures keep it from being picked.
	EndpointEjected = "ejected"
	// EndpointDown: a health check says so.
	EndpointDown = "down"
	// EndpointRemoved: it is no endpoint any more, and still has connections.
	EndpointRemoved = "removed"
	// EndpointLeftOut: the service is on direct, and the connect hook cannot dial
	// it: it is of the other family, or on a link.
	EndpointLeftOut = "left_out"
)

// EndpointStatus is one endpoint as the balancer sees it.
type EndpointStatus struct {
	Address string `json:"address"`
	Weight  uint32 `json:"weight"`
	// Zone is where it is, or empty; Local is true in this instance's own zone.
	Zone  string `json:"zone,omitempty"`
	Local bool   `json:"local,omitempty"`
	// State is one of the constants above. Down comes before ejected.
	State string `json:"state"`
	// Ejected is true while its failures keep it from being picked, Down while
	// a health check does.
	Ejected bool `json:"ejected"`
	Down    bool `json:"down"`
	// Live is how many connections to it are open or being dialed.
	Live int64 `json:"live"`
	// Connects and Failures count dials that were answered and that failed.
	Connects uint64 `json:"connects"`
	Failures uint64 `json:"failures"`
	// LastReason is why the last failed dial failed, or none.
	LastReason flow.Reason `json:"last_reason"`
	// CheckError is what the last health check that failed said. ChecksPassed and
	// ChecksFailed count them, since the check was set.
	CheckError   string `json:"check_error,omitempty"`
	ChecksPassed uint64 `json:"checks_passed,omitempty"`
	ChecksFailed uint64 `json:"checks_failed,omitempty"`
}

// StateOf names the state of an endpoint.
func StateOf(ejected, down bool) string {
	switch {
	case down:
		return EndpointDown
	case ejected:
		return EndpointEjected
	default:
		return EndpointAvailable
	}
}
