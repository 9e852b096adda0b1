package config

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
	"github.com/pillion-project/pillion/redirect/upstream/discover/spelling"
)

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
	return HealthCheck{Interval: 5 * time.Second, Timeout: 2 * time.Second, Jitter: 10, Healthy: 2, Unhealthy: 3}
}

// newHTTPCheck returns the request of a user who says nothing of it.
func newHTTPCheck() HTTPCheck {
	return HTTPCheck{Path: "/", Status: []StatusRange{{First: 200, Last: 399}}}
}

// String returns the range as the file has it: 200 or 200-299.
func (r StatusRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(r.First)
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

func (d *decoder) healthCheck(path string, n ast.Node) *HealthCheck {
	if isNull(n) {
		return nil
	}
	c := newHealthCheck()
	port := 0
	d.mapping(path, n, []field{
		{"tcp", func(path string, n ast.Node) {
			d.mapping(path, n, nil, nil)
			c.TCP = true
		}},
		{"http", func(path string, n ast.Node) { c.HTTP = d.httpCheck(path, n) }},
		{"command", func(path string, n ast.Node) {
			// What is no list is a command all the same, and wrong in itself only.
			c.Command = []string{""}
			if _, ok := n.(*ast.SequenceNode); ok || isNull(n) {
				c.Command = nil
			}
			d.list(path, n, func(path string, n ast.Node) {
				var word string
				d.text(&word)(path, n)
				c.Command = append(c.Command, word)
			})
		}},
		{"interval", d.duration(&c.Interval)},
		{"timeout", d.duration(&c.Timeout)},
		{"jitter", d.number(&c.Jitter, 0, 100)},
		{"healthy", d.number(&c.Healthy, 1, maxThreshold)},
		{"unhealthy", d.number(&c.Unhealthy, 1, maxThreshold)},
		{"port", d.number(&port, 1, maxPort)},
	}, nil)
	c.Port = uint16(port)
	return &c
}

func (d *decoder) httpCheck(path string, n ast.Node) *HTTPCheck {
	c := newHTTPCheck()
	d.mapping(path, n, []field{
		{"path", d.text(&c.Path)},
		{"host", d.text(&c.Host)},
		{"status", func(path string, n ast.Node) {
			c.Status = nil
			d.list(path, n, func(path string, n ast.Node) { c.Status = append(c.Status, d.status(path, n)) })
		}},
	}, nil)
	return &c
}

// status reads a code, or a range of them.
func (d *decoder) status(path string, n ast.Node) StatusRange {
	const want = "a status or a range such as 200-299"
	if !d.scalar(path, n, want) {
		return StatusRange{}
	}
	first, last, ranged := strings.Cut(raw(n), "-")
	if !ranged {
		last = first
	}
	from, ok := parseNumber(first, 0, 999)
	to, ok2 := parseNumber(last, 0, 999)
	if !ok || !ok2 {
		d.fail(path, n, "%s: want %s", spelling.Show(raw(n)), want)
	}
	return StatusRange{First: from, Last: to}
}

// minInterval keeps a slip of the unit from becoming a flood.
const minInterval = 10 * time.Millisecond

func (k *check) healthCheck(path string, c *HealthCheck) {
	var said []string
	if c.TCP {
		said = append(said, "tcp")
	}
	if c.HTTP != nil {
		said = append(said, "http")
		k.httpCheck(path+".http", c.HTTP)
	}
	if len(c.Command) > 0 {
		said = append(said, "command")
		if c.Command[0] == "" {
			k.add(path+".command", "no program")
		}
	}
	switch len(said) {
	case 0:
		k.add(path, "no check: want tcp, http or command")
	case 1:
	default:
		k.add(path, "%s: want one of them", strings.Join(said, " and "))
	}
	for i, word := range c.Command {
		if strings.ContainsRune(word, 0) {
			k.add(index(path+".command", i), "a NUL byte: no program takes it")
		}
	}
	if c.Interval < minInterval {
		k.add(path+".interval", "%s: want %s at least", c.Interval, minInterval)
	}
	if c.Timeout <= 0 {
		k.add(path+".timeout", "%s: want more than 0", c.Timeout)
	}
	k.number(path+".jitter", c.Jitter, 0, 100)
	k.number(path+".healthy", c.Healthy, 1, maxThreshold)
	k.number(path+".unhealthy", c.Unhealthy, 1, maxThreshold)
}

func (k *check) httpCheck(path string, c *HTTPCheck) {
	u, err := url.ParseRequestURI(c.Path)
	if err != nil || !strings.HasPrefix(c.Path, "/") || u.Host != "" || strings.Contains(c.Path, "#") {
		k.add(path+".path", "%s: want a path such as /healthz", spelling.Show(c.Path))
	}
	// What would end the header, or make two of it, must not get into it.
	if strings.ContainsFunc(c.Host, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune("/?#@", r) }) {
		k.add(path+".host", "%s is no host", spelling.Show(c.Host))
	}
	if len(c.Status) == 0 {
		k.add(path+".status", "no status is good: want one at least")
	}
	for i, r := range c.Status {
		// 1xx never ends an answer.
		if r.First < 200 || r.Last > 599 || r.First > r.Last {
			k.add(index(path+".status", i), "%s: want statuses from 200 to 599", r)
		}
	}
}
