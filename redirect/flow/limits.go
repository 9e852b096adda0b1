package flow

import "time"

// Terms are what a service's relayed connections have in common.
type Terms struct {
	// Service is the name of the service, or empty for what none names.
	Service string
	Limits
}

// Limits bound how one relayed connection is made and how long it may last.
type Limits struct {
	// DialTimeout bounds one dial, DialBudget all dials of a connection.
	DialTimeout, DialBudget time.Duration
	// IdleTimeout ends a connection on which no byte moves, MaxLifetime any; 0
	// never does.
	IdleTimeout, MaxLifetime time.Duration
	// Attempts is how many endpoints a connection tries, 1 to 8.
	Attempts int
}
