package admin

import (
	"net/netip"
	"net/url"

	"github.com/pillion-project/pillion/redirect/flow"
)

// ExplainQuery says what is to be explained.
type ExplainQuery struct {
	// Destination is what an application would dial: an address with or without
	// a port, the name of a service, or a host name with or without a port.
	Destination string
	// Source is the address that the application's socket has or would get. Not
	// valid: what the kernel would give it.
	Source netip.Addr
}

// Kinds of [Rule].
const (
	RuleDeny    = "deny"    // a rule of deny
	RuleExclude = "exclude" // a rule of exclude
	RuleService = "service" // a service names the destination
	RuleDefault = "default" // nothing does
	RuleBuiltin = "builtin" // Pillion itself leaves it alone, or refuses it
)

// Rule is what decided about a destination.
type Rule struct {
	// Kind is one of the constants above.
	Kind string `json:"kind"`
	// Text is the rule as the configuration says it.
	Text string `json:"text"`
	// Where is its place, file:line:column, or the flag that made it; empty for
	// what the configuration does not mention.
	Where string `json:"where,omitempty"`
}

// Explanation tells what happens to a connection to one address, and why. Path,
// Reason and Pick are what the kernel side's own code says to a connect that
// is only tried out.
type Explanation struct {
	// Asked is the destination as the query had it.
	Asked string `json:"asked"`
	// Destination is what was tried out. Port 0 stands for every port of the
	// address that no rule and no service names.
	Destination netip.AddrPort `json:"destination"`
	// Source is the one of the query.
	Source netip.Addr  `json:"source,omitzero"`
	Path   flow.Path   `json:"path"`
	Reason flow.Reason `json:"reason"`
	// Meaning is Reason in a sentence without its end.
	Meaning string `json:"meaning"`
	// Errno is what connect(2) fails with, like ECONNREFUSED; empty if the hook
	// lets it through.
	Errno string `json:"errno,omitempty"`
	Rule  Rule   `json:"rule"`
	// Why says, for each path that is cheaper than the configuration's, why it
	// is not that.
	Why []string `json:"why,omitempty"`
	// OnFailure is what happens if the path cannot be taken, open or closed.
	OnFailure string `json:"on_failure"`
	// Service is the service that names the destination, nil if none does. It
	// is told also where a rule goes before it.
	Service *ServiceStatus `json:"service,omitempty"`
	// Pick is the endpoint that the dry pick gave, on relay that which the
	// connect hook would pick if the handler were gone. Not valid: there is
	// nothing to pick.
	Pick netip.AddrPort `json:"pick,omitzero"`
	// Tier is which of the service's tiers Pick is in, from 0: the endpoints of
	// the local zone, and the others.
	Tier int `json:"tier"`
}

func (q ExplainQuery) values() url.Values {
	v := url.Values{"dst": {q.Destination}}
	if q.Source.IsValid() {
		v.Set("source", q.Source.String())
	}
	return v
}

// parseExplainQuery reads the parameters of /v1/explain. Its errors are bad
// requests.
func parseExplainQuery(v url.Values) (q ExplainQuery, err error) {
	if q.Destination = v.Get("dst"); q.Destination == "" {
		return q, badRequest("dst: want an address, a service or a host name")
	}
	if s := v.Get("source"); s != "" {
		if q.Source, err = netip.ParseAddr(s); err != nil {
			return q, badRequest("source %q: want an address", s)
		}
		q.Source = q.Source.Unmap()
	}
	return q, nil
}
