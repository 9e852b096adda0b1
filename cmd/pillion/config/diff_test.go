package config

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDiff(t *testing.T) {
	addr := netip.MustParseAddrPort
	old := parsed(t, `
zone: a
deny: [10.0.0.0/8:25, 10.1.0.0/16]
relay: {workers: 1, attempts: 3}
services:
  - {name: same, address: 10.96.0.1:80, endpoints: [10.0.0.1:80, 10.0.0.2:80]}
  - name: web
    address: 10.96.0.2:80
    endpoints: [10.0.0.1:80, 10.0.0.2:80, {address: 10.0.0.3:80, zone: a}]
    health_check: {tcp: {}}
    on_remove: reset
  - {name: gone, address: 10.96.0.3:80, endpoints: [10.0.0.1:80], on_remove: close, remove_after: 10s}
  - {name: before, address: 10.96.0.4:80, endpoints: [10.0.0.1:80]}
  - {name: moved, address: 10.96.0.5:80, endpoints: [10.0.0.1:80]}
  - {name: found, address: 10.96.0.6:80, endpoints: [10.0.0.1:80]}
  - {name: listed, address: 10.96.0.7:80, discover: {file: /a.json}}
`)
	c := parsed(t, `
deny: [10.1.0.0/16, 10.2.0.0/16, 10.0.0.0/8:25]
relay: {workers: 2, attempts: 3}
limits: {connections: 1000}
services:
  - {name: new, address: 10.96.0.8:80, endpoints: [10.0.0.9:80]}
  - {name: same, address: 10.96.0.1:80, endpoints: [10.0.0.2:80, '[::ffff:10.0.0.1]:80']}
  - name: web
    address: 10.96.0.2:80
    path: direct
    endpoints: [10.0.0.1:80, {address: 10.0.0.2:80, weight: 2}, 10.0.0.4:80]
    health_check: {command: [probe, a]}
  - {name: after, address: 10.96.0.4:80, endpoints: [10.0.0.1:80]}
  - {name: moved, address: 10.96.0.9:80, endpoints: [10.0.0.1:80]}
  - {name: found, address: 10.96.0.6:80, discover: {file: /a.json}}
  - {name: listed, address: 10.96.0.7:80, endpoints: [10.0.0.1:80]}
`)
	want := Changes{
		Settings: []Change{
			{Key: "deny", New: `["10.2.0.0/16"]`},
			{Key: "relay.workers", Old: "1", New: "2", Restart: true},
			{Key: "limits.connections", Old: "200000", New: "1000", Restart: true},
			{Key: "zone", Old: "a"},
		},
		Services: []ServiceChange{
			{Name: "new", Kind: ServiceAdded, Added: []netip.AddrPort{addr("10.0.0.9:80")}},
			{
				Name: "web", Kind: ServiceChanged,
				Fields: []Change{
					{Key: "path", Old: "relay", New: "direct"},
					{Key: "health_check.command", New: `["probe","a"]`},
					{Key: "on_remove", Old: "reset", New: "keep"},
					{Key: "endpoints[10.0.0.2:80].weight", Old: "1", New: "2"},
					{Key: "health_check.tcp", Old: "{}"},
				},
				Added: []netip.AddrPort{addr("10.0.0.4:80")}, Removed: []netip.AddrPort{addr("10.0.0.3:80")},
				OnRemove: OnRemoveKeep,
			},
			{Name: "after", Kind: ServiceChanged, Fields: []Change{{Key: "name", Old: "before", New: "after"}}},
			{Name: "moved", Kind: ServiceChanged, Fields: []Change{{Key: "address", Old: "10.96.0.5:80", New: "10.96.0.9:80"}}},
			{Name: "found", Kind: ServiceChanged, Fields: []Change{{Key: "discover.file", New: "/a.json"}}},
			{Name: "listed", Kind: ServiceChanged, Fields: []Change{{Key: "discover.file", Old: "/a.json"}}, Added: []netip.AddrPort{addr("10.0.0.1:80")}, SourceRemoved: true, OnRemove: OnRemoveKeep},
			{Name: "gone", Kind: ServiceRemoved, Removed: []netip.AddrPort{addr("10.0.0.1:80")}, OnRemove: OnRemoveClose, After: "10s"},
		},
	}
	got := c.Diff(old)
	if diff := cmp.Diff(want, got, equalAddrs, emptyIsNil); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got.Empty() || !got.Restart() {
		t.Errorf("empty %v, restart %v", got.Empty(), got.Restart())
	}
	lines := []string{
		"service new: added",
		"service web: path: relay -> direct",
	}
	all := got.Lines()
	if diff := cmp.Diff(lines, all[:len(lines)]); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	lines = []string{
		"service gone: removed",
		`deny: none -> ["10.2.0.0/16"]`,
		"relay.workers: 1 -> 2 (at the next start)",
		"limits.connections: 200000 -> 1000 (at the next start)",
		"zone: a -> none",
	}
	if diff := cmp.Diff(lines, all[len(all)-len(lines):]); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if d := c.Diff(c); !d.Empty() || d.Restart() {
		t.Errorf("to itself: %+v", d)
	}
}

// A setting for all is told of all the services that it changes.
func TestDiffOfSections(t *testing.T) {
	const services = "services: [{name: a, address: 10.96.0.1:80, endpoints: [10.0.0.1:80]}, {name: b, address: 10.96.0.2:80, endpoints: [10.0.0.1:80], path: relay, attempts: 2}]\n"
	c := parsed(t, services+"path: auto")
	d := c.Diff(parsed(t, services))
	if len(d.Services) != 1 || d.Services[0].Name != "a" || d.Services[0].Fields[0] != (Change{Key: "path", Old: "relay", New: "direct"}) {
		t.Errorf("%+v", d.Services)
	}
	if diff := cmp.Diff([]Change{{Key: "path", Old: "relay", New: "auto"}}, d.Settings); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	// What comes and goes with the path is no change of its own; what was said is.
	d = parsed(t, services+"path: direct").Diff(parsed(t, strings.Replace(services, "[10.0.0.1:80]}", "[10.0.0.1:80], attempts: 2}", 1)))
	want := []Change{{Key: "path", Old: "relay", New: "direct"}, {Key: "attempts", Old: "2"}}
	if len(d.Services) != 1 || !slices.Equal(d.Services[0].Fields, want) {
		t.Errorf("%+v, want %+v", d.Services, want)
	}
	// What path: direct says in other words is no change of a service.
	if d := parsed(t, services+"path: direct").Diff(c); len(d.Services) != 0 || len(d.Settings) != 1 {
		t.Errorf("%+v", d)
	}
}

// The order of some lists means something.
func TestDiffOrder(t *testing.T) {
	const one = "services: [{name: a, address: 10.96.0.1:80, endpoints: [10.0.0.1:80], health_check: {command: [a, b, c]}}]"
	d := parsed(t, strings.Replace(one, "a, b, c", "a, c, b", 1)).Diff(parsed(t, one))
	want := []Change{{Key: "health_check.command", Old: `["a","b","c"]`, New: `["a","c","b"]`}}
	if len(d.Services) != 1 {
		t.Fatalf("%+v", d)
	}
	if diff := cmp.Diff(want, d.Services[0].Fields); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// What takes a restart is a setting that there is.
func TestNeedsRestart(t *testing.T) {
	keys := map[string]bool{}
	for _, file := range []string{"every_key", "kubeconfig"} {
		c, err := Load("testdata/" + file + ".good.yaml")
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range flatten(c.settings()) {
			keys[v.key] = true
		}
	}
	for _, key := range startOnly {
		if !keys[key] || !NeedsRestart(key) {
			t.Errorf("%s is no setting", key)
		}
	}
	if NeedsRestart("zone") {
		t.Error("zone takes a restart")
	}
}
