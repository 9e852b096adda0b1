package config

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/health"
)

// checkJSON checks that a configuration as JSON is the same configuration, to
// both who read it.
func checkJSON(t *testing.T, c *Config) {
	t.Helper()
	data, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	var again Config
	if err := json.Unmarshal(data, &again); err != nil {
		t.Errorf("as JSON it is refused: %v\n%s", err, data)
		return
	}
	// An empty list says what no list does.
	if diff := cmp.Diff(c, &again, equalAddrs, emptyIsNil); diff != "" {
		t.Errorf("as JSON it is another (-want +got):\n%s\n%s", diff, data)
	}
	once, err := json.Marshal(&again)
	if err != nil || !bytes.Equal(once, data) {
		t.Errorf("not the same JSON again, %v:\n%s\n%s", err, data, once)
	}
	if d := again.Diff(c); !d.Empty() {
		t.Errorf("and Diff finds: %+v", d)
	}
}

func TestJSON(t *testing.T) {
	for _, file := range glob(t, "*.good.yaml") {
		c, err := Load(file)
		if err != nil {
			t.Fatal(err)
		}
		checkJSON(t, c)
	}
}

// Texts stay what they are.
func TestJSONText(t *testing.T) {
	for _, name := range []string{"<a&b>", `"`, `\`, "a: b", "- x", "#", "null", "1", "é", "{}", "'", "*a", "!x", "%", "@", "\U0001f600", "a,b", "[::1]:80"} {
		c := Default()
		c.Services = []Service{service("10.96.0.12:80", "127.0.0.1:8081", 1)}
		c.Services[0].Name = name
		if err := c.Validate(); err != nil {
			t.Fatal(err)
		}
		checkJSON(t, &c)
	}
}

// Every key means what it says. The golden files cannot tell this, since they
// are written by the same words.
func TestEveryKey(t *testing.T) {
	c, err := Load("testdata/every_key.good.yaml")
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParseAddrPort
	want := Config{
		Path: PathAuto,
		Zone: "eu-1a",
		Services: []Service{
			{
				Name: "web", Addr: addr("10.96.0.12:80"), Path: PathRelay, Policy: flow.PolicyMaglev, Hash: flow.HashDestination,
				Attempts: 2, IdleTimeout: new(5 * time.Minute), MaxLifetime: new(time.Duration(0)),
				Endpoints: []Endpoint{{Addr: addr("10.0.0.1:8080"), Weight: 1}, {Addr: addr("10.0.0.2:8080"), Weight: 3, Zone: "eu-1b"}},
				Check:     &HealthCheck{TCP: true, Interval: 10 * time.Second, Timeout: time.Second, Healthy: 1, Unhealthy: 5, Port: 9000},
				Health:    Health{Failures: new(0), Base: new(2 * time.Second), Max: new(2 * time.Minute), Panic: new(0)},
				OnRemove:  OnRemoveClose, RemoveAfter: time.Minute,
				OnFailure: OnFailureClosed, Connect: ConnectMirror, NoEndpoint: "EHOSTUNREACH",
			},
			{
				Name: "file", Addr: addr("10.96.0.13:80"), OnRemove: OnRemoveKeep, Discover: &Discover{File: "/etc/pillion/web.json"},
				Check: &HealthCheck{
					HTTP:     &HTTPCheck{Path: "/healthz?full=1", Host: "web.internal", Status: []StatusRange{{200, 299}, {404, 404}, {302, 302}}},
					Interval: 5 * time.Second, Timeout: 2 * time.Second, Jitter: 10, Healthy: 2, Unhealthy: 3,
				},
			},
			{
				Name: "dns", Addr: addr("10.96.0.14:80"), OnRemove: OnRemoveKeep,
				Discover: &Discover{DNS: &DNS{
					Name: "web.internal", Type: DNSA, Port: 8080, MinTTL: time.Second, MaxTTL: time.Minute, ResolvConf: "/run/resolv.conf",
					Servers: []netip.AddrPort{addr("10.0.0.53:53"), addr("10.0.0.54:5353"), addr("[2001:db8::53]:53"), addr("[2001:db8::54]:5353")},
				}},
				Check: &HealthCheck{
					Command:  []string{"/usr/local/bin/probe", "-v", "1"},
					Interval: 5 * time.Second, Timeout: 2 * time.Second, Jitter: 10, Healthy: 2, Unhealthy: 3,
				},
			},
			{
				Name: "kubernetes", Addr: addr("10.96.0.15:80"), OnRemove: OnRemoveReset,
				Discover: &Discover{Kubernetes: &KubernetesService{Namespace: "shop", Name: "web", Port: "http"}},
			},
		},
		Deny:    []Rule{{netip.MustParsePrefix("10.0.0.0/8"), 25}},
		Exclude: []Rule{{netip.MustParsePrefix("192.0.2.0/24"), 0}},
		Default: flow.PathPass, OnFailure: OnFailureOpen, Connect: ConnectAdaptive, NoEndpoint: "ECONNREFUSED", Existing: ExistingReport, Survive: SurviveCrash,
		Relay: Relay{
			Workers: 1, DialTimeout: time.Second, DialBudget: 2 * time.Second, Attempts: 4,
			IdleTimeout: 3 * time.Second, MaxLifetime: 4 * time.Second,
		},
		Health: health.Config{Failures: 1, Base: time.Second, Max: 2 * time.Second, Panic: 3},
		Limits: Limits{SlotsPerContainer: 1, ConnectionsPerContainer: 2, Connections: 3},
		Kubernetes: Kubernetes{
			OnDemand: true, Server: "https://10.96.0.1:443",
			TokenFile: "/var/run/secrets/token", CAFile: "/var/run/secrets/ca.crt",
			Kubeconfig: "/etc/pillion/kubeconfig", Idle: time.Minute,
		},
		FlowLog: "/var/log/flows", Metrics: addr("127.0.0.1:9090"), Probes: addr("127.0.0.1:9091"),
	}
	if diff := cmp.Diff(&want, c, equalAddrs); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// JSON that is not a configuration is told with the paths of its values.
func TestUnmarshalBad(t *testing.T) {
	var c Config
	err := json.Unmarshal([]byte(`{"services": [{"address": "10.96.0.1:80"}], "path": "auto"}`), &c)
	if want := "services[0].endpoints: no endpoints"; err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("got %v, want %s...", err, want)
	}
	if err := json.Unmarshal([]byte(`{"a": 1}`), &c); err == nil {
		t.Error("an unknown key is taken")
	}
}
