package config

import (
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/health"
)

// Config is everything that the user decides. [Default] has the values that
// apply where nothing is said; the zero value is not valid.
type Config struct {
	// Services are the addresses that have endpoints of their own.
	Services []Service
	// Deny refuses connections. It comes before Exclude, which leaves them
	// alone and comes before Services.
	Deny, Exclude []Rule
	// Default is what happens to a destination that no rule and no service
	// names: PathRelay or PathPass.
	Default flow.Path
	// Path is the path of services that say nothing of it.
	Path PathChoice
	// Zone is where the instance is, or empty: endpoints of the same zone are
	// picked first.
	Zone string
	// Kubernetes is how the API server is reached, and whether services are
	// found in it that are not listed.
	Kubernetes Kubernetes
	// OnFailure is what happens to a connection that should be redirected and
	// cannot be.
	OnFailure OnFailure
	// Connect is when a redirected application's connect(2) ends.
	Connect Connect
	// NoEndpoint is what a connect fails with whose service has no endpoint
	// that may be picked: one of noEndpoints.
	NoEndpoint string
	// Existing is what happens to connections that are older than the capture.
	Existing Existing
	// Survive is what becomes of the connections on relay when the handler is
	// killed.
	Survive Survive
	Relay   Relay
	Health  health.Config
	Limits  Limits
	// FlowLog is the path of the file to which flow records go, or empty.
	FlowLog string
	// Metrics is where metrics are served over HTTP; not valid means nowhere.
	Metrics netip.AddrPort
	// Probes is where readiness and liveness are served over HTTP; not valid
	// means nowhere.
	Probes netip.AddrPort

	at positions // of what is no service's
}

// PathChoice is which path a service is to be on.
type PathChoice string

// The values of PathChoice.
const (
	PathRelay  PathChoice = "relay"  // through the handler
	PathDirect PathChoice = "direct" // to an endpoint that the connect hook picks
	PathPass   PathChoice = "pass"   // to where it was going, observed
	PathAuto   PathChoice = "auto"   // the cheapest that has what the service asks for
)

// OnFailure says what happens to a connection that cannot be redirected.
type OnFailure string

// The values of OnFailure.
const (
	OnFailureOpen   OnFailure = "open"   // it goes straight to where it was going
	OnFailureClosed OnFailure = "closed" // it is refused
)

// Connect says when a redirected application's connect(2) ends.
type Connect string

// The values of Connect, the same as the names of [flow.ConnectMode].
const (
	ConnectAdaptive Connect = "adaptive" // early where a dial was answered lately, else mirror
	ConnectMirror   Connect = "mirror"   // with the handler's dial, and as that did
	ConnectEarly    Connect = "early"    // at once; a failed dial is a reset
)

// Mode returns the value that the other packages go by.
func (c Connect) Mode() flow.ConnectMode { return flow.ConnectMode(slices.Index(connectModes, c)) }

// Existing says what happens to connections that were open before the capture.
type Existing string

// The values of Existing.
const (
	ExistingReport Existing = "report" // they are counted and left alone
	ExistingReset  Existing = "reset"  // they are reset, so that applications connect again
)

// Survive says what becomes of the connections on relay at a kill of the handler.
type Survive string

// The values of Survive.
const (
	SurviveRestart Survive = "restart" // they end with resets; what is pinned survives
	SurviveCrash   Survive = "crash"   // they go on, with every byte
)

// What the user may write, for errors that list it.
var (
	onFailures = []OnFailure{OnFailureOpen, OnFailureClosed}
	paths      = []PathChoice{PathRelay, PathDirect, PathPass, PathAuto}
	existings  = []Existing{ExistingReport, ExistingReset}
	survives   = []Survive{SurviveRestart, SurviveCrash}
	// In the order of their values in flow.
	connectModes = []Connect{ConnectEarly, ConnectMirror, ConnectAdaptive}
	// Those that a handler can also pass on as a packet.
	noEndpoints = []string{"ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH"}
	defaults    = []string{flow.PathRelay.String(), flow.PathPass.String()}
)

// Rule names destinations.
type Rule struct {
	// Prefix has no host bits set, and is IPv4 also where the user wrote the
	// range in mapped form.
	Prefix netip.Prefix
	// Port is 0 for every port.
	Port uint16
}

// String returns the rule as [ParseRule] reads it.
func (r Rule) String() string {
	s := r.Prefix.String()
	switch {
	case r.Port == 0:
		return s
	case r.Prefix.Addr().Is6():
		s = "[" + s + "]"
	default:
	}
	return s + ":" + strconv.Itoa(int(r.Port))
}

// Relay is how the handler carries connections.
type Relay struct {
	// Workers is how many threads carry connections; 0 is one per CPU.
	Workers int
	// DialTimeout is how long one endpoint may take to answer, DialBudget how
	// long all attempts of a connection may take together.
	DialTimeout, DialBudget time.Duration
	// IdleTimeout ends a connection on which no byte moved for so long, and
	// MaxLifetime one that is open for so long; 0 never does.
	IdleTimeout, MaxLifetime time.Duration
	// Attempts is how many endpoints are tried for one connection.
	Attempts int
}

// Limits bounds what the applications can use up.
type Limits struct {
	// SlotsPerContainer is how many destinations that no service names one
	// container may have in use.
	SlotsPerContainer int
	// ConnectionsPerContainer is how many redirected connections one container
	// may have open; 0 is no limit of its own.
	ConnectionsPerContainer int
	// Connections is how many redirected connections may be open.
	Connections int
}

// Default returns the configuration of a user who says nothing. The caller owns
// it.
func Default() Config {
	return Config{
		Default:    flow.PathRelay,
		Path:       PathRelay,
		Kubernetes: Kubernetes{Idle: 10 * time.Minute},
		OnFailure:  OnFailureOpen,
		Connect:    ConnectAdaptive,
		NoEndpoint: noEndpoints[0],
		Existing:   ExistingReport,
		Survive:    SurviveRestart,
		Relay: Relay{
			DialTimeout: 5 * time.Second,
			DialBudget:  15 * time.Second,
			Attempts:    3,
		},
		Health: health.Default(),
		Limits: Limits{
			SlotsPerContainer: 16384,
			Connections:       200000,
		},
	}
}
