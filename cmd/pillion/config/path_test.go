package config

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
)

func parsed(t *testing.T, text string) *Config {
	t.Helper()
	c, err := Parse("p.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Everything that can be asked for is asked for by something, and each path can
// do what the cheaper ones can.
func TestCapabilities(t *testing.T) {
	asked := make(map[Capability]bool)
	for _, file := range glob(t, "*.good.yaml") {
		c, err := Load(file)
		if err != nil {
			t.Fatal(err)
		}
		for i := range c.Services {
			_, needs := c.PathOf(&c.Services[i])
			for _, n := range needs {
				asked[n.Capability] = true
			}
		}
	}
	// Those that are no endpoint's are all in one file, but for connect: early.
	early := Service{Connect: ConnectEarly, OnRemove: OnRemoveKeep}
	link := Service{Addr: netip.MustParseAddrPort("[2001:db8::1]:80"), OnRemove: OnRemoveKeep, MaxLifetime: new(Default().Relay.DialTimeout),
		Endpoints: []Endpoint{{Addr: netip.MustParseAddrPort("[fe80::1%eth0]:80")}}}
	for _, n := range append(early.needs(), link.needs()...) {
		asked[n.Capability] = true
	}
	names := make(map[string]bool)
	for c := range capabilityCount {
		if !asked[c] {
			t.Errorf("%s is asked for by nothing", c)
		}
		if !can(flow.PathRelay, c) || can(flow.PathPass, c) {
			t.Errorf("%s: relay can do all, and pass nothing", c)
		}
		names[c.String()] = true
	}
	if len(names) != int(capabilityCount) || names[""] {
		t.Errorf("names %v, want one for each of %d", names, capabilityCount)
	}
	for i, step := range ladder[1:] {
		if step.path <= ladder[i].path {
			t.Errorf("%s stands after %s", step.path, ladder[i].path)
		}
	}
}

// What is asked for decides the path of a service on auto.
func TestPathOf(t *testing.T) {
	for asks, want := range map[string]flow.Path{
		"endpoints: [10.0.0.1:80]":                                     flow.PathDirect,
		"endpoints: [10.0.0.1:80, 10.0.0.2:80], policy: maglev":        flow.PathDirect,
		"endpoints: [10.0.0.1:80], health_check: {tcp: {}}":            flow.PathDirect,
		"endpoints: [10.0.0.1:80], health: {panic: 1}":                 flow.PathDirect,
		"endpoints: [10.0.0.1:80], on_remove: close":                   flow.PathDirect,
		"endpoints: [10.0.0.1:80], no_endpoint: EHOSTUNREACH":          flow.PathDirect,
		"endpoints: [10.0.0.1:80], on_failure: closed":                 flow.PathDirect,
		"endpoints: [10.0.0.1:80], connect: mirror":                    flow.PathDirect,
		"endpoints: [10.0.0.1:80], attempts: 1":                        flow.PathDirect,
		"endpoints: [10.0.0.1:80], idle_timeout: 0s, max_lifetime: 0s": flow.PathDirect,
		"endpoints: ['[::ffff:10.0.0.1]:80']":                          flow.PathDirect,
		"discover: {file: /a.json}":                                    flow.PathDirect,
		"discover: {dns: {name: a, port: 1}}":                          flow.PathDirect,
		"discover: {dns: {name: a, port: 1, type: A}}":                 flow.PathDirect,
		"discover: {dns: {name: a, type: SRV}}":                        flow.PathDirect,
		"discover: {kubernetes: {service: a/b}}":                       flow.PathDirect,
		"discover: {dns: {name: a, port: 1, type: AAAA}}":              flow.PathRelay,
		"discover: {dns: {name: a, port: 1, type: ADDRESS}}":           flow.PathRelay,
		"endpoints: [10.0.0.1:80], attempts: 2":                        flow.PathRelay,
		"endpoints: [10.0.0.1:80], idle_timeout: 1s":                   flow.PathRelay,
		"endpoints: [10.0.0.1:80], max_lifetime: 1s":                   flow.PathRelay,
		"endpoints: [10.0.0.1:80], connect: early":                     flow.PathRelay,
		"endpoints: [10.0.0.1:80, '[2001:db8::1]:80']":                 flow.PathRelay,
		"path: pass":                                                     flow.PathPass,
		"path: direct, endpoints: [10.0.0.1:80]":                         flow.PathDirect,
		"path: relay, endpoints: [10.0.0.1:80]":                          flow.PathRelay,
		"path: relay, endpoints: [10.0.0.1:80], idle_timeout: 1s":        flow.PathRelay,
		"endpoints: [10.0.0.1:80], attempts: 2, health_check: {tcp: {}}": flow.PathRelay,
	} {
		// What the sections say asks for nothing.
		c := parsed(t, "path: auto\nconnect: early\nrelay: {attempts: 5, idle_timeout: 1h}\nservices: [{address: 10.96.0.1:80, "+asks+"}]")
		if got, _ := c.PathOf(&c.Services[0]); got != want {
			t.Errorf("%s: %s, want %s", asks, got, want)
		}
	}
	c := parsed(t, "path: auto\nservices: [{address: '[2001:db8::9]:80', endpoints: ['[fe80::1%eth0]:80']}]")
	if got, _ := c.PathOf(&c.Services[0]); got != flow.PathRelay {
		t.Errorf("an endpoint on a link: %s, want relay", got)
	}
}

// A path that is asked for takes what auto would take there, and nothing else:
// the two never disagree.
func TestPathOrError(t *testing.T) {
	for _, file := range glob(t, "*.good.yaml") {
		c, err := Load(file)
		if err != nil {
			t.Fatal(err)
		}
		for i := range c.Services {
			auto := *c
			auto.Services = slices.Clone(c.Services)
			s := &auto.Services[i]
			s.Path = PathAuto
			cheapest, _ := auto.PathOf(s)
			for _, step := range ladder {
				s.Path = PathChoice(step.path.String())
				err := auto.Validate()
				if len(s.Endpoints) == 0 && s.Discover == nil {
					continue
				}
				if (err == nil) != (step.path >= cheapest) {
					t.Errorf("%s: service %s: auto takes %s, but on %s: %v", file, s.Name, cheapest, step.path, err)
				}
			}
		}
	}
}

func TestWhy(t *testing.T) {
	c := parsed(t, strings.TrimPrefix(`
path: auto
services:
  - name: retried
    address: 10.96.0.1:80
    endpoints: [10.0.0.1:80]
    attempts: 3
    idle_timeout: 1s
  - name: direct
    address: 10.96.0.2:80
    endpoints: [10.0.0.1:80]
  - {name: passed, address: 10.96.0.3:80, path: pass}
  - name: wanted
    address: 10.96.0.4:80
    path: relay
    endpoints: [10.0.0.1:80]
  - name: other
    address: 10.96.0.5:80
    endpoints:
      - 10.0.0.1:80
      - address: "[2001:db8::1]:80"
`, "\n"))
	want := map[string][]Obstacle{
		"retried": {
			{flow.PathPass, "services[0].endpoints", "p.yaml:5:5", "endpoints need path: direct"},
			{flow.PathDirect, "services[0].attempts", "p.yaml:6:15", "3 attempts need path: relay"},
		},
		"direct": {{flow.PathPass, "services[1].endpoints", "p.yaml:10:5", "endpoints need path: direct"}},
		"passed": nil,
		"wanted": {
			{flow.PathPass, "services[3].endpoints", "p.yaml:15:5", "endpoints need path: direct"},
			{flow.PathDirect, "services[3].path", "p.yaml:14:11", "path: relay is asked for, and path: auto would take direct"},
		},
		"other": {
			{flow.PathPass, "services[4].endpoints", "p.yaml:18:5", "endpoints need path: direct"},
			{flow.PathDirect, "services[4].endpoints[1].address", "p.yaml:20:18", "[2001:db8::1]:80, which is not of the service's family, needs path: relay"},
		},
	}
	for i := range c.Services {
		s := &c.Services[i]
		if diff := cmp.Diff(want[s.Name], c.Why(i, s)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", s.Name, diff)
		}
	}

	unsaid := parsed(t, "services: [{address: 10.96.0.1:80, endpoints: [10.0.0.1:80]}]")
	got := unsaid.Why(0, &unsaid.Services[0])[1]
	if diff := cmp.Diff(Obstacle{flow.PathDirect, "path", "", "path: relay is the default, and path: auto would take direct"}, got); diff != "" {
		t.Errorf("the default (-want +got):\n%s", diff)
	}
	said := parsed(t, "services: [{address: 10.96.0.1:80, endpoints: [10.0.0.1:80]}]\npath: relay")
	got = said.Why(0, &said.Services[0])[1]
	if diff := cmp.Diff(Obstacle{flow.PathDirect, "path", "p.yaml:2:7", "path: relay is asked for, and path: auto would take direct"}, got); diff != "" {
		t.Errorf("for all (-want +got):\n%s", diff)
	}
}

// What a service takes from the sections is what applies on its path.
func TestEffective(t *testing.T) {
	c := parsed(t, `
on_failure: closed
connect: mirror
no_endpoint: ENETUNREACH
relay: {attempts: 7, idle_timeout: 1h}
health: {failures: 9, base: 1s, max: 1m, panic: 7}
path: auto
services:
  - {name: pass, address: 10.96.0.1:80, path: pass}
  - {name: direct, address: 10.96.0.2:80, endpoints: [10.0.0.1:80], health: {failures: 1}}
  - {name: relay, address: 10.96.0.3:80, endpoints: [10.0.0.1:80], attempts: 2, idle_timeout: 0s, on_failure: open}
  - {name: plain, address: 10.96.0.4:80, endpoints: [10.0.0.1:80], path: relay, no_endpoint: EHOSTUNREACH}
`)
	want := []string{
		`{"name":"pass","address":"10.96.0.1:80","policy":"least_connections","path":"pass","on_remove":"keep","on_failure":"closed"}`,
		`{"name":"direct","address":"10.96.0.2:80","endpoints":[{"address":"10.0.0.1:80","weight":1}],"policy":"least_connections","path":"direct",` +
			`"health":{"failures":1,"base":"1s","max":"1m0s","panic":7},"on_remove":"keep","on_failure":"closed","no_endpoint":"ENETUNREACH"}`,
		`{"name":"relay","address":"10.96.0.3:80","endpoints":[{"address":"10.0.0.1:80","weight":1}],"policy":"least_connections","path":"relay","attempts":2,"idle_timeout":"0s","max_lifetime":"0s",` +
			`"health":{"failures":9,"base":"1s","max":"1m0s","panic":7},"on_remove":"keep","on_failure":"open","connect":"mirror","no_endpoint":"ENETUNREACH"}`,
		`{"name":"plain","address":"10.96.0.4:80","endpoints":[{"address":"10.0.0.1:80","weight":1}],"policy":"least_connections","path":"relay","attempts":7,"idle_timeout":"1h0m0s","max_lifetime":"0s",` +
			`"health":{"failures":9,"base":"1s","max":"1m0s","panic":7},"on_remove":"keep","on_failure":"closed","connect":"mirror","no_endpoint":"EHOSTUNREACH"}`,
	}
	for i := range c.Services {
		e := c.Effective(&c.Services[i])
		got, err := e.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want[i], string(got)); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		again := c.Effective(&e)
		if diff := cmp.Diff(e, again, equalAddrs); diff != "" {
			t.Errorf("%s: not the same again (-want +got):\n%s", e.Name, diff)
		}
	}
}
