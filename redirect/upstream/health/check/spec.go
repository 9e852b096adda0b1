package check

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Kind is how an endpoint is asked.
type Kind uint8

// The kinds of check.
const (
	KindTCP     Kind = iota // a connection is made and closed
	KindHTTP                // a GET is answered with one of the statuses
	KindCommand             // a command ends with status 0
)

// String returns the name that the configuration has for a kind.
func (k Kind) String() string {
	switch k {
	case KindTCP:
		return "tcp"
	case KindHTTP:
		return "http"
	case KindCommand:
		return "command"
	default:
		return fmt.Sprintf("kind %d", uint8(k))
	}
}

// Spec says how endpoints are checked. The zero value is not valid; start with
// [Default]. It is a value: what its slices hold must not be changed.
type Spec struct {
	Kind Kind
	// Interval is the time from the start of one check to that of the next, on
	// average, and at least 10 ms. Checks of one endpoint never overlap: one
	// that takes longer delays the next.
	Interval time.Duration
	// Timeout is how long all of one check may take.
	Timeout time.Duration
	// Jitter is by how much an interval is longer or shorter at random, in
	// percent, so that endpoints are not checked in step.
	Jitter int
	// Healthy is how many checks in a row must succeed until an endpoint that
	// is down is up, Unhealthy how many must fail until one that is up is down.
	// An endpoint's first check decides alone.
	Healthy, Unhealthy int
	// Port is dialed in place of the endpoint's own; 0 means the endpoint's.
	Port uint16
	// HTTP is for [KindHTTP], and ignored else.
	HTTP HTTP
	// Command is for [KindCommand], and ignored else: a program, looked for in
	// PATH, and its arguments. No shell reads it. Its environment is PATH and
	// PILLION_ENDPOINT_ADDRESS, PILLION_ENDPOINT_PORT, PILLION_ENDPOINT_CLUSTER.
	Command []string
}

// HTTP says what is asked and what is a good answer.
type HTTP struct {
	// Path begins with a slash and may have a query.
	Path string
	// Host is the Host header; empty means the address that is dialed.
	Host string
	// Status are the good statuses; redirects are not followed.
	Status []StatusRange
}

// StatusRange is HTTP statuses from First to Last, both included.
type StatusRange struct{ First, Last int }

// String returns the range as the configuration has it: 200 or 200-399.
func (r StatusRange) String() string {
	if r.First == r.Last {
		return fmt.Sprint(r.First)
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// minInterval keeps a slip of the unit from becoming a flood.
const minInterval = 10 * time.Millisecond

// Default returns the check that applies where the user only says that there is
// one: of TCP. Its HTTP part is what applies where only the kind is given.
func Default() Spec {
	return Spec{
		Kind:      KindTCP,
		Interval:  5 * time.Second,
		Timeout:   2 * time.Second,
		Jitter:    10,
		Healthy:   2,
		Unhealthy: 3,
		HTTP:      HTTP{Path: "/", Status: []StatusRange{{200, 399}}},
	}
}

// Validate reports every value that makes no sense, in one error of one line
// each, which begins with the name of the field in the configuration.
func (s Spec) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if s.Interval < minInterval {
		bad("interval: %s is shorter than %s", s.Interval, minInterval)
	}
	if s.Timeout <= 0 {
		bad("timeout: %s is not positive", s.Timeout)
	}
	if s.Jitter < 0 || s.Jitter > 100 {
		bad("jitter: %d is no percentage", s.Jitter)
	}
	if s.Healthy < 1 {
		bad("healthy: %d is less than 1", s.Healthy)
	}
	if s.Unhealthy < 1 {
		bad("unhealthy: %d is less than 1", s.Unhealthy)
	}
	switch s.Kind {
	case KindTCP:
	case KindHTTP:
		errs = append(errs, s.HTTP.check()...)
	case KindCommand:
		if len(s.Command) == 0 || s.Command[0] == "" {
			bad("command: names no program")
		}
		if slices.ContainsFunc(s.Command, func(a string) bool { return strings.ContainsRune(a, 0) }) {
			bad("command: an argument has a NUL in it")
		}
	default:
		bad("kind: %s is none", s.Kind)
	}
	return errors.Join(errs...)
}

func (h HTTP) check() []error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if _, err := h.url(); err != nil {
		bad("http.path: %w", err)
	}
	// What would end the header, or make two of it, must not get into it.
	if i := strings.IndexFunc(h.Host, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune("/?#@", r) }); i >= 0 {
		bad("http.host: %q is no host", h.Host)
	}
	if len(h.Status) == 0 {
		bad("http.status: no status is good")
	}
	for _, r := range h.Status {
		// 1xx never ends an answer.
		if r.First < 200 || r.Last > 599 || r.First > r.Last {
			bad("http.status: %s is not within 200-599", r)
		}
	}
	return errs
}

// url returns the path as the part of a URL that it is.
func (h HTTP) url() (*url.URL, error) {
	if !strings.HasPrefix(h.Path, "/") {
		return nil, fmt.Errorf("%q does not begin with a slash", h.Path)
	}
	if strings.Contains(h.Path, "#") {
		return nil, fmt.Errorf("%q has a fragment", h.Path)
	}
	u, err := url.ParseRequestURI(h.Path)
	if err != nil {
		return nil, fmt.Errorf("%q is no path", h.Path)
	}
	return u, nil
}

// equal tells whether two checks are the same.
func (s Spec) equal(o Spec) bool {
	return s.Kind == o.Kind && s.Interval == o.Interval && s.Timeout == o.Timeout && s.Jitter == o.Jitter &&
		s.Healthy == o.Healthy && s.Unhealthy == o.Unhealthy && s.Port == o.Port &&
		s.HTTP.Path == o.HTTP.Path && s.HTTP.Host == o.HTTP.Host && slices.Equal(s.HTTP.Status, o.HTTP.Status) &&
		slices.Equal(s.Command, o.Command)
}
