package balance

import (
	"fmt"
	"strings"

	"github.com/pillion-project/pillion/redirect/upstream"
)

// The names of the policies, as configurations spell them.
const (
	NameRoundRobin       = "round_robin"
	NameLeastConnections = "least_connections"
)

// Names returns the name of every policy, the default first.
func Names() []string { return []string{NameLeastConnections, NameRoundRobin} }

// ByName returns the policy of that name.
func ByName(name string) (upstream.NewPicker, error) {
	switch name {
	case NameRoundRobin:
		return RoundRobin, nil
	case NameLeastConnections:
		return LeastConnections, nil
	default:
		return nil, fmt.Errorf("unknown policy %q: want one of %s", name, strings.Join(Names(), ", "))
	}
}
