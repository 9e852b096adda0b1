package balance

import (
	"fmt"
	"strings"

	"github.com/pillion-project/pillion/redirect/flow"
)

// The names of the policies, as configurations spell them: those of [flow.Policy].
const (
	NameLeastConnections = "least_connections"
	NameRoundRobin       = "round_robin"
	NameRandom           = "random"
	NameMaglev           = "maglev"
)

// Names returns the name of every policy, the default first.
func Names() []string {
	var names []string
	for _, p := range flow.Policies() {
		names = append(names, p.String())
	}
	return names
}

// ByName returns the policy of that name.
func ByName(name string) (flow.Policy, error) {
	for _, p := range flow.Policies() {
		if p.String() == name {
			return p, nil
		}
	}
	return 0, fmt.Errorf("unknown policy %q: want one of %s", name, strings.Join(Names(), ", "))
}
