package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"golang.org/x/sys/unix"
)

const explainYAML = `default: relay
path: auto
deny:
  - 10.9.0.0/16
  - 10.96.0.14:80
exclude:
  - "2001:db8:1::/48"
services:
  - name: web
    address: 10.96.0.12:80
    endpoints: [10.1.0.1:8080, 10.1.0.2:8080]
  - name: shop
    address: 10.96.0.12:443
    attempts: 3
    on_failure: closed
    no_endpoint: EHOSTUNREACH
    endpoints: [10.1.0.1:8443]
  - name: cart
    address: 10.96.0.14:80
    endpoints: [10.1.0.3:8080]
  - name: 10.9.1.1:22
    address: 10.96.0.15:80
    attempts: 2
    endpoints: [10.1.0.3:8080]
`

// kernelSide answers as the connect hook of a configuration would, and
// remembers what it was asked.
type kernelSide struct {
	verdicts map[string]loader.Verdict // by destination
	asked    []string
	err      error
}

func (k *kernelSide) tryOut(source netip.Addr, dst netip.AddrPort) (loader.Verdict, error) {
	k.asked = append(k.asked, fmt.Sprint(source, " ", dst))
	v, ok := k.verdicts[dst.String()]
	if !ok {
		v = loader.Verdict{Path: flow.PathRelay, Reason: flow.ReasonDefault, Rule: -1}
	}
	return v, k.err
}

// newExplainer returns one of the configuration above.
func newExplainer(t *testing.T) (*explainer, *kernelSide, *config.Config) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "p.yaml")
	if err := os.WriteFile(file, []byte(explainYAML), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	web, shop := netip.MustParseAddrPort("10.96.0.12:80"), netip.MustParseAddrPort("10.96.0.12:443")
	k := &kernelSide{verdicts: map[string]loader.Verdict{
		"10.96.0.12:80":     {Path: flow.PathDirect, Reason: flow.ReasonService, Rule: -1, Service: web, Endpoint: netip.MustParseAddrPort("10.1.0.2:8080"), Tier: 1},
		"10.96.0.15:80":     {Path: flow.PathDirect, Reason: flow.ReasonHandlerAbsent, Rule: -1, Service: netip.MustParseAddrPort("10.96.0.15:80")},
		"10.96.0.12:443":    {Path: flow.PathDeny, Reason: flow.ReasonNoEndpoint, Rule: -1, Service: shop, Errno: unix.EHOSTUNREACH},
		"10.96.0.14:80":     {Path: flow.PathDeny, Reason: flow.ReasonDenied, Rule: 1, Errno: unix.ECONNREFUSED},
		"10.9.1.1:22":       {Path: flow.PathDeny, Reason: flow.ReasonDenied, Rule: 0, Errno: unix.ECONNREFUSED},
		"10.9.1.2:22":       {Path: flow.PathDeny, Reason: flow.ReasonDenied, Rule: 7, Errno: unix.ECONNREFUSED},
		"10.9.1.3:22":       {Path: flow.PathDeny, Reason: flow.ReasonDenied, Rule: 1, Errno: unix.ECONNREFUSED},
		"127.0.0.1:80":      {Path: flow.PathPass, Reason: flow.ReasonLoopback, Rule: -1},
		"240.0.0.9:80":      {Path: flow.PathDeny, Reason: flow.ReasonSlotAddress, Rule: -1, Errno: unix.ECONNREFUSED},
		"[2001:db8:1::9]:0": {Path: flow.PathPass, Reason: flow.ReasonExcluded, Rule: 0},
	}}
	e := &explainer{
		tryOut: k.tryOut,
		config: func() *config.Config { return c },
		services: func() []admin.ServiceStatus {
			var all []admin.ServiceStatus
			for _, s := range c.Services {
				path, _ := c.PathOf(&s)
				status := admin.ServiceStatus{
					Name: s.Name, Address: s.Addr.String(), Path: path, PathAsked: string(saidBy(c).path(s.Name)), Why: saidBy(c).why(&s), Where: s.Where(""),
				}
				for _, e := range s.Endpoints {
					status.Endpoints = append(status.Endpoints, admin.EndpointStatus{Address: e.Addr.String(), Weight: e.Weight})
				}
				all = append(all, status)
			}
			return all
		},
		noRoom: func(name string) bool { return name == "shop" },
		lookUp: func(_ context.Context, _, host string) ([]netip.Addr, error) {
			switch host {
			case "both.example":
				return []netip.Addr{netip.MustParseAddr("2001:db8:1::9"), netip.MustParseAddr("::ffff:10.96.0.12"), netip.MustParseAddr("10.96.0.12")}, nil
			case "broken.example":
				return nil, errors.New("no server answers")
			default:
				return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
			}
		},
	}
	return e, k, c
}

// inFile takes the directory from the places of a file.
func inFile(place string) string {
	if i := strings.LastIndex(place, "/p.yaml"); i >= 0 {
		return "p.yaml" + place[i+len("/p.yaml"):]
	}
	return place
}

func TestExplain(t *testing.T) {
	e, _, c := newExplainer(t)
	type answer struct {
		Destination, Path, Reason, Errno, Kind, Rule, Where, Service, OnFailure string
	}
	for _, tt := range []struct {
		dst  string
		want []answer
	}{
		{"web", []answer{{"10.96.0.12:80", "direct", "service", "", "service", "service web", "p.yaml:9:5", "web", "open"}}},
		{"::ffff:10.96.0.12", []answer{
			{"10.96.0.12:80", "direct", "service", "", "service", "service web", "p.yaml:9:5", "web", "open"},
			{"10.96.0.12:443", "deny", "no_endpoint", "EHOSTUNREACH", "service", "service shop", "p.yaml:12:5", "shop", "closed"},
			{"10.96.0.12:0", "relay", "default", "", "default", "default: relay", "p.yaml:1:10", "", "open"},
		}},
		{"[::ffff:10.96.0.12]:80", []answer{{"10.96.0.12:80", "direct", "service", "", "service", "service web", "p.yaml:9:5", "web", "open"}}},
		// A rule goes before a service, which is told all the same.
		{"cart", []answer{{"10.96.0.14:80", "deny", "denied", "ECONNREFUSED", "deny", "deny 10.96.0.14/32:80", "p.yaml:5:5", "cart", "open"}}},
		{"10.9.1.1:22", []answer{{"10.9.1.1:22", "deny", "denied", "ECONNREFUSED", "deny", "deny 10.9.0.0/16", "p.yaml:4:5", "", "open"}}},
		// An address is that, also where a service is called by it.
		{"10.96.0.15:80", []answer{{"10.96.0.15:80", "direct", "handler_absent", "", "service", "service 10.9.1.1:22", "p.yaml:21:5", "10.9.1.1:22", "open"}}},
		// The rules have changed meanwhile.
		{"10.9.1.2:22", []answer{{"10.9.1.2:22", "deny", "denied", "ECONNREFUSED", "deny", "a rule that is being replaced", "", "", "open"}}},
		{"10.9.1.3:22", []answer{{"10.9.1.3:22", "deny", "denied", "ECONNREFUSED", "deny", "a rule that is being replaced", "", "", "open"}}},
		{"127.0.0.1:80", []answer{{"127.0.0.1:80", "pass", "loopback", "", "builtin", "built in: never redirected", "", "", "open"}}},
		{"240.0.0.9:80", []answer{{"240.0.0.9:80", "deny", "slot_address", "ECONNREFUSED", "builtin", "built in: nobody dials slots", "", "", "open"}}},
		{"both.example:80", []answer{
			{"10.96.0.12:80", "direct", "service", "", "service", "service web", "p.yaml:9:5", "web", "open"},
			{"[2001:db8:1::9]:80", "relay", "default", "", "default", "default: relay", "p.yaml:1:10", "", "open"},
		}},
		{"[2001:db8:1::9]", []answer{{"[2001:db8:1::9]:0", "pass", "excluded", "", "exclude", "exclude 2001:db8:1::/48", "p.yaml:7:5", "", "open"}}},
	} {
		all, err := e.explain(t.Context(), admin.ExplainQuery{Destination: tt.dst})
		if err != nil {
			t.Errorf("%s: %v", tt.dst, err)
			continue
		}
		var got []answer
		for _, x := range all {
			a := answer{x.Destination.String(), x.Path.String(), x.Reason.String(), x.Errno, x.Rule.Kind, x.Rule.Text, inFile(x.Rule.Where), "", x.OnFailure}
			if x.Service != nil {
				a.Service = x.Service.Name
			}
			if x.Asked != tt.dst || x.Meaning == "" {
				t.Errorf("%s: asked %q, meaning %q", tt.dst, x.Asked, x.Meaning)
			}
			got = append(got, a)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: want -, got +:\n%s", tt.dst, diff)
		}
	}

	all, err := e.explain(t.Context(), admin.ExplainQuery{Destination: "web", Source: netip.MustParseAddr("192.0.2.1")})
	if err != nil {
		t.Fatal(err)
	}
	x := all[0]
	if x.Pick != netip.MustParseAddrPort("10.1.0.2:8080") || x.Tier != 1 || x.Source != netip.MustParseAddr("192.0.2.1") {
		t.Errorf("%+v", x)
	}
	if len(x.Service.Endpoints) != len(c.Services[0].Endpoints) || x.Service.Path != flow.PathDirect || x.Service.PathAsked != "auto" {
		t.Errorf("service: %+v", x.Service)
	}
	// Why not a cheaper path is about the path that connections take.
	for dst, want := range map[string][]string{
		"web": {"pass: "}, "shop": {"pass: ", "direct: "}, "cart": nil, "10.96.0.15:80": {"pass: "},
	} {
		all, err := e.explain(t.Context(), admin.ExplainQuery{Destination: dst})
		if err != nil || !slices.EqualFunc(all[0].Why, want, strings.HasPrefix) {
			t.Errorf("%s: why: %v, %q, want %q", dst, err, all[0].Why, want)
		}
	}
}

// Where a service is on a cheaper path than the configuration means, the passing cause of
// that is told.
func TestExplainPassing(t *testing.T) {
	dns := admin.SourceStatus{Kind: admin.SourceDNS}
	told := admin.SourceStatus{Kind: admin.SourceDNS, Updated: testNow, Stale: true}
	direct, pass := flow.PathDirect, flow.PathPass
	for _, tt := range []struct {
		name   string
		asked  flow.Path
		v      loader.Verdict
		source admin.SourceStatus
		want   string
	}{
		{"web", direct, loader.Verdict{Path: direct, Reason: flow.ReasonService}, dns, ""},
		{"web", pass, loader.Verdict{Path: pass, Reason: flow.ReasonService}, dns, ""},
		{"web", direct, loader.Verdict{Path: pass, Reason: flow.ReasonService}, dns, ", but its source has not told any endpoints yet: on_failure decides"},
		{"web", flow.PathRelay, loader.Verdict{Path: pass, Reason: flow.ReasonService}, dns, ", but its source has not told any endpoints yet: on_failure decides"},
		{"web", direct, loader.Verdict{Path: pass, Reason: flow.ReasonService}, told, ", and the kernel still goes by an earlier state of it"},
		{"shop", direct, loader.Verdict{Path: pass, Reason: flow.ReasonService}, told, ", but the kernel has no room for its endpoints: on_failure decides"},
		{"shop", direct, loader.Verdict{Path: pass, Reason: flow.ReasonService}, admin.SourceStatus{Kind: admin.SourceStatic}, ", but the kernel has no room for its endpoints: on_failure decides"},
		{"web", flow.PathRelay, loader.Verdict{Path: direct, Reason: flow.ReasonService}, admin.SourceStatus{Kind: admin.SourceStatic}, ", and the kernel still goes by an earlier state of it"},
		{"shop", flow.PathRelay, loader.Verdict{Path: direct, Reason: flow.ReasonHandlerAbsent}, dns, ""},
		{"shop", direct, loader.Verdict{Path: pass, Reason: flow.ReasonExcluded, Rule: 0}, dns, ""},
	} {
		e, k, c := newExplainer(t)
		i := slices.IndexFunc(c.Services, func(s config.Service) bool { return s.Name == tt.name })
		services := e.services()
		services[i].Path, services[i].Source = tt.asked, tt.source
		e.services = func() []admin.ServiceStatus { return services }
		tt.v.Service = c.Services[i].Addr
		k.verdicts[tt.v.Service.String()] = tt.v
		all, err := e.explain(t.Context(), admin.ExplainQuery{Destination: tt.name})
		if err != nil {
			t.Fatal(err)
		}
		if want := meaning(tt.v.Reason) + tt.want; all[0].Meaning != want {
			t.Errorf("%s on %s by %s, asked %s: %q, want %q", tt.name, tt.v.Path, tt.v.Reason, tt.asked, all[0].Meaning, want)
		}
	}
	c := &control{tooMany: []admin.Refusal{{Name: "a"}}, lacking: []admin.Refusal{{Name: "b"}}}
	if !c.noRoom("a") || !c.noRoom("b") || c.noRoom("c") {
		t.Error("there is no room for a and b, and some for c")
	}
}

// Of a service that a connection does not get to, or is refused by, nothing is picked.
func TestExplainPick(t *testing.T) {
	e, k, _ := newExplainer(t)
	for _, tt := range []struct {
		v      loader.Verdict
		picked bool
	}{
		{loader.Verdict{Path: flow.PathRelay, Reason: flow.ReasonService, Rule: -1}, true},
		{loader.Verdict{Path: flow.PathDirect, Reason: flow.ReasonHandlerAbsent, Rule: -1}, true},
		{loader.Verdict{Path: flow.PathDeny, Reason: flow.ReasonHandlerAbsent, Rule: -1, Errno: unix.ECONNREFUSED}, false},
		{loader.Verdict{Path: flow.PathDeny, Reason: flow.ReasonDenied, Rule: 0, Errno: unix.ECONNREFUSED}, false},
		{loader.Verdict{Path: flow.PathPass, Reason: flow.ReasonExcluded, Rule: 0}, false},
		{loader.Verdict{Path: flow.PathPass, Reason: flow.ReasonBoundDevice, Rule: -1}, false},
	} {
		tt.v.Service, tt.v.Endpoint, tt.v.Tier = netip.MustParseAddrPort("10.96.0.12:80"), endpoint1, 1
		k.verdicts["10.96.0.12:80"] = tt.v
		all, err := e.explain(t.Context(), admin.ExplainQuery{Destination: "web"})
		if err != nil {
			t.Fatal(err)
		}
		if x := all[0]; x.Pick.IsValid() != tt.picked || (x.Tier == 1) != tt.picked || x.Service == nil {
			t.Errorf("%s: %s in tier %d is picked, want one: %v", tt.v.Reason, x.Pick, x.Tier, tt.picked)
		}
	}
}

// Of an address without a port, those are told too that only rules name, each once, and
// as what the rule says.
func TestExplainPortsOfRules(t *testing.T) {
	e, k, c := newExplainer(t)
	for rules, texts := range map[*[]config.Rule][]string{
		&c.Deny:    {"10.96.0.0/16:25", "10.96.0.12:25", "10.96.0.0/24:80", "10.97.0.0/16:26", "[2001:db8::/32]:27"},
		&c.Exclude: {"10.0.0.0/8:22", "0.0.0.0/0:25"},
	} {
		*rules = nil
		for _, text := range texts {
			r, err := config.ParseRule(text)
			if err != nil {
				t.Fatal(err)
			}
			*rules = append(*rules, r)
		}
	}
	for dst, want := range map[string][]string{
		"10.96.0.12":   {"10.96.0.12:22", "10.96.0.12:25", "10.96.0.12:80", "10.96.0.12:443", "10.96.0.12:0"},
		"2001:db8::1":  {"[2001:db8::1]:27", "[2001:db8::1]:0"},
		"both.example": {"10.96.0.12:22", "10.96.0.12:25", "10.96.0.12:80", "10.96.0.12:443", "10.96.0.12:0", "[2001:db8:1::9]:27", "[2001:db8:1::9]:0"},
		"web":          {"10.96.0.12:80"},
	} {
		k.asked = nil
		if _, err := e.explain(t.Context(), admin.ExplainQuery{Destination: dst}); err != nil {
			t.Fatal(err)
		}
		for i := range want {
			want[i] = fmt.Sprint(netip.Addr{}, " ", want[i])
		}
		if diff := cmp.Diff(want, k.asked); diff != "" {
			t.Errorf("%s: want -, got +:\n%s", dst, diff)
		}
	}
}

// A service in force is told as the user said it: what it takes from elsewhere is no
// reason for its path.
func TestWhyAsSaid(t *testing.T) {
	c := config.Default()
	c.Path = config.PathAuto
	web := config.NewService("web", netip.MustParseAddrPort("10.96.0.12:80"))
	web.Endpoints = []config.Endpoint{{Addr: endpoint1, Weight: 1}}
	c.Services = []config.Service{web}
	found := config.NewService("shop/web", netip.MustParseAddrPort("10.96.0.13:80"))
	found.Discover = &config.Discover{Kubernetes: &config.KubernetesService{Namespace: "shop", Name: "web"}}
	for _, s := range []config.Service{web, found} {
		for path, want := range map[config.PathChoice][]string{
			config.PathAuto:  {"pass: "},
			config.PathRelay: {"pass: ", "direct: path: relay is the default"},
		} {
			c.Path = path
			inForce := c.Effective(&s)
			got := saidBy(&c).why(&inForce)
			ok := len(got) == len(want)
			for i := range want {
				ok = ok && strings.HasPrefix(got[i], want[i])
			}
			if !ok || saidBy(&c).path(s.Name) != path {
				t.Errorf("%s, path: %s: %q, asked %s", s.Name, path, got, saidBy(&c).path(s.Name))
			}
		}
	}
}

func TestExplainErrors(t *testing.T) {
	e, k, _ := newExplainer(t)
	four := netip.MustParseAddr("192.0.2.1")
	for _, tt := range []struct {
		q    admin.ExplainQuery
		code int // 0: the server's fault
		want string
	}{
		{admin.ExplainQuery{Destination: "nobody"}, 404, `no service and no host is called "nobody"`},
		{admin.ExplainQuery{Destination: "broken.example"}, 0, "no server answers"},
		{admin.ExplainQuery{Destination: "web:http"}, 400, "want for example"},
		{admin.ExplainQuery{Destination: "web:0"}, 400, "want for example"},
		{admin.ExplainQuery{Destination: ":80"}, 400, "want for example"},
		{admin.ExplainQuery{Destination: "1:2:3"}, 400, "want for example"},
		{admin.ExplainQuery{Destination: "[2001:db8::1]:80", Source: four}, 400, "is not of its family"},
	} {
		_, err := e.explain(t.Context(), tt.q)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q", tt.q, err, tt.want)
		}
		var code int
		if a, ok := errors.AsType[*admin.Error](err); ok {
			code = a.Code
		}
		if code != tt.code {
			t.Errorf("%+v: code %d, want %d", tt.q, code, tt.code)
		}
	}
	// Of a name, only the addresses count that the source can reach.
	all, err := e.explain(t.Context(), admin.ExplainQuery{Destination: "both.example:80", Source: four})
	if err != nil || len(all) != 1 || !all[0].Destination.Addr().Is4() {
		t.Errorf("%+v, %v", all, err)
	}
	k.err = errors.New("no program")
	if _, err := e.explain(t.Context(), admin.ExplainQuery{Destination: "web"}); !errors.Is(err, k.err) {
		t.Errorf("%v", err)
	}
}

// FuzzExplain: whatever the destination is, it is tried out or refused in words,
// and what is tried out are addresses.
func FuzzExplain(f *testing.F) {
	for _, dst := range []string{"web", "10.96.0.12", "10.96.0.12:80", "[::1]:80", "::1", "[fe80::1%eth0]", "a:1", "]", "[[", ":", "both.example"} {
		f.Add(dst)
	}
	f.Fuzz(func(t *testing.T, dst string) {
		e := &explainer{
			tryOut: func(_ netip.Addr, dst netip.AddrPort) (loader.Verdict, error) {
				if !dst.IsValid() || dst.Addr().Is4In6() {
					t.Errorf("tried out %s", dst)
				}
				return loader.Verdict{Path: flow.PathRelay, Reason: flow.ReasonDefault, Rule: -1}, nil
			},
			config:   func() *config.Config { c := config.Default(); return &c },
			services: func() []admin.ServiceStatus { return []admin.ServiceStatus{{Name: "web", Address: "10.96.0.12:80"}} },
			lookUp: func(_ context.Context, _, host string) ([]netip.Addr, error) {
				if host == "" {
					t.Error("looked up nothing")
				}
				return []netip.Addr{netip.MustParseAddr("::ffff:10.96.0.12")}, nil
			},
		}
		if dst == "" {
			return // the API refuses it
		}
		all, err := e.explain(t.Context(), admin.ExplainQuery{Destination: dst})
		if (err == nil) != (len(all) > 0) {
			t.Errorf("%q: %d answers, %v", dst, len(all), err)
		}
	})
}

// Every reason that a connect hook may give has words for it.
func TestMeanings(t *testing.T) {
	for r := flow.ReasonService; r <= flow.ReasonNoEndpoint; r++ {
		if meanings[r] == "" {
			t.Errorf("%s has no meaning", r)
		}
	}
	if got := meaning(flow.ReasonForged); got != "forged" {
		t.Errorf("another reason means %q", got)
	}
}

func TestPrintExplanation(t *testing.T) {
	service := testStatus().Services[0]
	service.Why, service.Where = []string{"pass: endpoints need path: direct (p.yaml:3:5)"}, "p.yaml:2:5"
	service.Source.Error = "no answer"
	for _, tt := range []struct {
		name string
		x    admin.Explanation
		want []string
	}{
		{"direct", admin.Explanation{
			Asked: "web", Destination: netip.MustParseAddrPort("10.96.0.12:80"), Source: netip.MustParseAddr("10.1.0.7"),
			Path: flow.PathDirect, Reason: flow.ReasonService, Meaning: meaning(flow.ReasonService), OnFailure: "open",
			Rule: admin.Rule{Kind: admin.RuleService, Text: "service web", Where: "p.yaml:2:5"}, Why: service.Why,
			Service: &service, Pick: netip.MustParseAddrPort("10.1.0.1:80"),
		}, []string{
			"web: 10.96.0.12:80 from 10.1.0.7",
			"  path        direct: a service names the destination (service)",
			"  rule        service web (p.yaml:2:5)",
			"  configured  path: auto, which is direct",
			"  not         pass: endpoints need path: direct (p.yaml:3:5)",
			"  on failure  open",
			"  cluster     web, 2 endpoints by maglev, from dns web.example (stale for 2m0s): no answer",
			"  pick        10.1.0.1:80, this time",
			"",
			"ENDPOINT     PICK  ZONE       WEIGHT  STATE                       OPEN  CONNECTS  FAILURES  LAST FAILURE",
			"10.1.0.1:80  *     a (local)       1  available                      2         9         0  none",
			"10.1.0.2:80        b               3  down, ejected (status 500)     0         0         1  dial_refused",
		}},
		{"denied", admin.Explanation{
			Asked: "10.96.0.12:80", Destination: netip.MustParseAddrPort("10.96.0.12:80"),
			Path: flow.PathDeny, Reason: flow.ReasonDenied, Meaning: meaning(flow.ReasonDenied), Errno: "ECONNREFUSED", OnFailure: "open",
			Rule:    admin.Rule{Kind: admin.RuleDeny, Text: "deny 10.96.0.0/16", Where: "p.yaml:9:5"},
			Service: &admin.ServiceStatus{Name: "web", Policy: "random", Path: flow.PathRelay, PathAsked: "relay"},
		}, []string{
			"10.96.0.12:80",
			"  path        deny with ECONNREFUSED: a deny rule names the destination (denied)",
			"  rule        deny 10.96.0.0/16 (p.yaml:9:5)",
			"  service     web, which the rule goes before",
			"  configured  path: relay",
			"  on failure  open",
			"  cluster     web, 0 endpoints by random",
		}},
		{"panic", admin.Explanation{
			Asked: "10.96.0.12:80", Destination: netip.MustParseAddrPort("10.96.0.12:80"),
			Path: flow.PathDirect, Reason: flow.ReasonService, Meaning: meaning(flow.ReasonService), OnFailure: "closed",
			Rule: admin.Rule{Kind: admin.RuleService, Text: "service web"}, Pick: endpoint1,
			Service: &admin.ServiceStatus{
				Name: "web", Cluster: "web-v1", Policy: "random", Path: flow.PathDirect, PathAsked: "direct",
				Endpoints: []admin.EndpointStatus{{Address: "10.1.0.1:80", Weight: 1, Ejected: true, State: admin.EndpointEjected}, {Address: "10.1.0.9:80", Live: 1, State: admin.EndpointRemoved}},
			},
		}, []string{
			"10.96.0.12:80",
			"  path        direct: a service names the destination (service)",
			"  rule        service web",
			"  configured  path: direct",
			"  on failure  closed",
			"  cluster     web-v1, 1 endpoint",
			"  pick        10.1.0.1:80, this time; it is ejected, but too few others are left",
			"",
			"ENDPOINT     PICK  WEIGHT  STATE    OPEN  CONNECTS  FAILURES  LAST FAILURE",
			"10.1.0.1:80  *          1  ejected     0         0         0  none",
			"10.1.0.9:80             0  removed     1         0         0  none",
		}},
		{"ejected by the handler", admin.Explanation{
			Asked: "10.96.0.12:80", Destination: netip.MustParseAddrPort("10.96.0.12:80"),
			Path: flow.PathRelay, Reason: flow.ReasonService, Meaning: meaning(flow.ReasonService), OnFailure: "closed",
			Rule: admin.Rule{Kind: admin.RuleService, Text: "service web"}, Pick: endpoint1,
			Service: &admin.ServiceStatus{
				Name: "web", Cluster: "web-v1", Policy: "random", Path: flow.PathRelay, PathAsked: "relay",
				Endpoints: []admin.EndpointStatus{{Address: "10.1.0.1:80", Weight: 1, Ejected: true, State: admin.EndpointEjected}},
			},
		}, []string{
			"10.96.0.12:80",
			"  path        relay: a service names the destination (service)",
			"  rule        service web",
			"  configured  path: relay",
			"  on failure  closed",
			"  cluster     web-v1, 1 endpoint",
			"  pick        10.1.0.1:80, if the connect hook picked",
			"",
			"ENDPOINT     PICK  WEIGHT  STATE    OPEN  CONNECTS  FAILURES  LAST FAILURE",
			"10.1.0.1:80  *          1  ejected     0         0         0  none",
		}},
		{"excluded, of an earlier version", admin.Explanation{
			Asked: "10.96.0.12:80", Destination: netip.MustParseAddrPort("10.96.0.12:80"),
			Path: flow.PathPass, Reason: flow.ReasonExcluded, Meaning: meaning(flow.ReasonExcluded), OnFailure: "open",
			Rule: admin.Rule{Kind: admin.RuleExclude, Text: "exclude 10.96.0.0/16"}, Pick: endpoint1,
			Service: &admin.ServiceStatus{
				Name: "web", Policy: "random", Path: flow.PathRelay, PathAsked: "relay",
				Endpoints: []admin.EndpointStatus{{Address: "10.1.0.1:80", Weight: 1, State: admin.EndpointAvailable}},
			},
		}, []string{
			"10.96.0.12:80",
			"  path        pass: an exclusion names the destination (excluded)",
			"  rule        exclude 10.96.0.0/16",
			"  service     web, which the rule goes before",
			"  configured  path: relay",
			"  on failure  open",
			"  cluster     web, 1 endpoint",
			"",
			"ENDPOINT     WEIGHT  STATE      OPEN  CONNECTS  FAILURES  LAST FAILURE",
			"10.1.0.1:80       1  available     0         0         0  none",
		}},
		{"default", admin.Explanation{
			Asked: "192.0.2.1", Destination: netip.MustParseAddrPort("192.0.2.1:0"),
			Path: flow.PathPass, Reason: flow.ReasonDefaultPass, Meaning: meaning(flow.ReasonDefaultPass), OnFailure: "open",
			Rule: admin.Rule{Kind: admin.RuleDefault, Text: "default: pass"},
		}, []string{
			"192.0.2.1, any other port",
			"  path        pass: no rule and no service names the destination, and the default is pass (default_pass)",
			"  rule        default: pass",
			"  on failure  open",
		}},
	} {
		var b strings.Builder
		if err := printExplanation(&b, &tt.x, testNow); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, strings.Split(strings.TrimRight(b.String(), "\n"), "\n")); diff != "" {
			t.Errorf("%s: want -, got +:\n%s", tt.name, diff)
		}
	}
}

func TestExplainCommand(t *testing.T) {
	e, k, _ := newExplainer(t)
	g := &global{runtime: t.TempDir()}
	if _, err := runCommand(t, g, "explain", "web"); !errors.Is(err, errNoInstance) {
		t.Errorf("nobody runs: %v", err)
	}
	serveAdmin(t, g, "shop", admin.API{
		Status:  func(context.Context) (admin.Status, error) { return testStatus(), nil },
		Explain: e.explain,
	})
	out, err := runCommand(t, g, "explain", "10.96.0.12", "--source", "::ffff:192.0.2.1", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var got []admin.Explanation
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	want, err := e.explain(t.Context(), admin.ExplainQuery{Destination: "10.96.0.12", Source: netip.MustParseAddr("192.0.2.1")})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.AddrPort{}, netip.Addr{}), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("want -, got +:\n%s", diff)
	}
	if !slices.Contains(k.asked, "192.0.2.1 10.96.0.12:443") {
		t.Errorf("the kernel side was asked %q", k.asked)
	}
	out, err = runCommand(t, g, "explain", "10.96.0.12", "--source", "192.0.2.1")
	if err != nil || strings.Count(out, "on failure") != 3 || !strings.Contains(out, "\n\n10.96.0.12:443 from") {
		t.Errorf("%v\n%s", err, out)
	}
	if _, err := runCommand(t, g, "explain", "nobody"); err == nil || !strings.Contains(err.Error(), "no service and no host") {
		t.Errorf("nobody: %v", err)
	}
}
