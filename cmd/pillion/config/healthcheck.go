package config

import "time"

// HealthCheck is how every endpoint of a service is probed. One of TCP, HTTP and
// Command is set.
type HealthCheck struct {
	// TCP is true where a connection that opens is enough.
	TCP  bool
	HTTP *HTTPCheck
	// Command is a program and its arguments; it is run, and 0 is healthy.
	Command []string
	// Interval is from one probe's beginning to the next, less or more a random
	// part of up to Jitter percent; Timeout is how long a probe may take.
	Interval, Timeout time.Duration
	Jitter            int
	// Healthy and Unhealthy are how many probes in a row must agree until an
	// endpoint changes.
	Healthy, Unhealthy int
	// Port is probed instead of the endpoint's own; 0 is its own.
	Port uint16
}

// HTTPCheck is a GET request that must be answered.
type HTTPCheck struct {
	// Path begins with a slash, and may have a query.
	Path string
	// Host is the header; empty is the address probed.
	Host string
	// Status are the codes that are healthy.
	Status []StatusRange
}

// StatusRange is HTTP status codes, both ends included.
type StatusRange struct{ First, Last int }

// newHealthCheck returns the check of a user who says nothing but its kind.
func newHealthCheck() HealthCheck {
	return HealthCheck{Interval: 5 * time.Second, Timeout: time.Second, Jitter: 10, Healthy: 2, Unhealthy: 3}
}

// newHTTPCheck returns the request of a user who says nothing of it.
func newHTTPCheck() HTTPCheck {
	return HTTPCheck{Path: "/", Status: []StatusRange{{First: 200, Last: 299}}}
}
