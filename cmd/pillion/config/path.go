package config

import (
	"fmt"

	"github.com/pillion-project/pillion/redirect/flow"
)

// Capability is something that a path can do and a cheaper one may not.
type Capability uint8

// The capabilities, in the order in which they are asked for.
const (
	CapBalance     Capability = iota // pick one of several endpoints
	CapCheck                         // mind what active health checks say
	CapEnd                           // end connections to an endpoint that is gone
	CapOtherFamily                   // reach an endpoint of the family that the service is not of
	CapLinkLocal                     // reach an endpoint on a link, by its zone
	CapRetry                         // try another endpoint for the same connection
	CapIdleTimeout                   // end a connection on which no byte moves
	CapMaxLifetime                   // end a connection that is open for long
	CapEarly                         // end connect(2) before the dial has

	capabilityCount
)

// Need is one thing that a service asks of its path.
type Need struct {
	Capability Capability
	// Option is the key of the service that asks: attempts, endpoints[2].address.
	Option string
	// What says what is asked for: 3 attempts.
	What string
}

// Obstacle is why a service is not on a path that is cheaper than its own.
type Obstacle struct {
	// Path is the cheaper one.
	Path flow.Path
	// Option is the path of the value that stands in the way, such as
	// services[0].attempts, and Where its place in the file, or empty.
	Option, Where string
	// Text is a sentence without its end: "pass cannot balance".
	Text string
}

// PathOf returns the path that the connections of a service take, and all that
// it asks for: PathPass, PathDirect or PathRelay.
func (c *Config) PathOf(s *Service) (flow.Path, []Need) { return flow.PathRelay, nil }

// Why returns, for each path that is cheaper than the service's own, why it is
// not on that, cheapest first.
func (c *Config) Why(s *Service) []Obstacle { return nil }

// String returns the capability's name.
func (c Capability) String() string { return fmt.Sprintf("capability(%d)", uint8(c)) }
