package direct

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// explainConfig has a rule and a service of every kind. Its places are in the
// table of TestExplainAgrees.
const explainConfig = `default: relay
path: direct
zone: a
deny:
  - 203.0.113.0/28
  - 198.51.100.7:25
  - 10.96.0.13:80
exclude:
  - 198.51.100.0/24:9000
  - "2001:db8:7::7"
services:
  - {name: direct, address: "10.96.0.12:80", endpoints: ["198.51.100.7:8001", "198.51.100.7:8002"]}
  - {name: relay, address: "10.96.0.12:81", path: relay, endpoints: ["198.51.100.7:8001"]}
  - {name: pass, address: "198.51.100.7:8001", path: pass}
  - {name: auto, address: "10.96.0.12:83", path: auto, endpoints: ["198.51.100.7:8002"]}
  - {name: dear, address: "10.96.0.12:84", path: auto, attempts: 2, endpoints: ["198.51.100.7:8002"]}
  - {name: six, address: "[fd00:96::12]:80", endpoints: ["[2001:db8:7::7]:8001"]}
  - {name: denied, address: "10.96.0.13:80", endpoints: ["198.51.100.7:8001"]}
  - {name: out, address: "10.96.0.12:86", discover: {file: %s}}
`

// TestExplainAgrees has what explain says of a destination happen.
func TestExplainAgrees(t *testing.T) {
	t.Parallel()
	r, program := rig.New(t), ends(t)
	dead(t, r)
	r.Give(t, rig.Far4)
	r.Give(t, rig.Far6)
	serveEnds(t, r, program, ":8001", ":8002", ":9000")
	file := filepath.Join(t.TempDir(), "p.yaml")
	nobody := filepath.Join(filepath.Dir(file), "nobody.json")
	put(t, nobody)
	if err := os.WriteFile(file, fmt.Appendf(nil, explainConfig, nobody), 0o600); err != nil {
		t.Fatal(err)
	}
	i := r.Run(t, "", "--config", file)
	a := captive(t, r)
	status, err := i.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	slots := netip.MustParsePrefix(status.Slots4).Addr().As4()
	slots[3] = 7

	for _, tt := range []struct {
		ask  string
		dial string // what the application dials; empty: the same
		want string // path, reason, kind of rule, line of the rule
	}{
		{"10.96.0.12:80", "", "direct service service 12"},
		{"direct", "10.96.0.12:80", "direct service service 12"},
		{"[::ffff:10.96.0.12]:80", "", "direct service service 12"},
		{"relay", "10.96.0.12:81", "relay service service 13"},
		{"pass", "198.51.100.7:8001", "pass service service 14"},
		{"auto", "10.96.0.12:83", "direct service service 15"},
		{"dear", "10.96.0.12:84", "relay service service 16"},
		{"[fd00:96::12]:80", "", "direct service service 17"},
		{"denied", "10.96.0.13:80", "deny denied deny 7"},
		{"out", "10.96.0.12:86", "deny no_endpoint service 19"},
		{"203.0.113.5:80", "", "deny denied deny 5"},
		{"198.51.100.7:25", "", "deny denied deny 6"},
		{"198.51.100.7:9000", "", "pass excluded exclude 9"},
		{"[2001:db8:7::7]:8002", "", "pass excluded exclude 10"},
		{"198.51.100.7:8002", "", "relay default default 1"},
		{"127.0.0.1:7", "", "pass loopback builtin 0"},
		{"localhost:7", "127.0.0.1:7", "pass loopback builtin 0"},
		{"[::1]:7", "", "pass loopback builtin 0"},
		{"169.254.1.1:7", "", "pass link_local builtin 0"},
		{"169.254.169.254:80", "", "pass metadata builtin 0"},
		{"192.0.2.1:7", "", "pass own_address builtin 0"},
		{"[2001:db8:1::1]:7", "", "pass own_address builtin 0"},
		{"224.0.0.5:7", "", "pass multicast builtin 0"},
		{netip.AddrPortFrom(noRoute4, 80).String(), "", "pass no_route builtin 0"},
		{netip.AddrPortFrom(netip.AddrFrom4(slots), 80).String(), "", "deny slot_address builtin 0"},
	} {
		if tt.dial == "" {
			tt.dial = tt.ask
		}
		dst := netip.MustParseAddrPort(tt.dial)
		orig := netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
		before := i.Reasons(t)
		text, err := r.Pillion(t, "explain", tt.ask, "-o", "json", "--instance", i.Name)
		if err != nil {
			t.Errorf("%s: %v", tt.ask, err)
			continue
		}
		var all []admin.Explanation
		if err := json.Unmarshal([]byte(text), &all); err != nil {
			t.Fatal(err)
		}
		all = slices.DeleteFunc(all, func(x admin.Explanation) bool { return x.Destination != orig })
		if len(all) != 1 {
			t.Errorf("%s: %s", tt.ask, text)
			continue
		}
		x := all[0]
		line := 0
		if rest, ok := strings.CutPrefix(x.Rule.Where, file+":"); ok {
			fmt.Sscanf(rest, "%d:", &line)
		}
		if got := fmt.Sprint(x.Path, " ", x.Reason, " ", x.Rule.Kind, " ", line); got != tt.want {
			t.Errorf("%s: explained as %s, want %s", tt.ask, got, tt.want)
		}
		if diff := cmp.Diff(steady(before), steady(i.Reasons(t))); diff != "" {
			t.Errorf("%s: explain has counted:\n%s", tt.ask, diff)
		}

		ends := len(i.Ended(t, 0))
		said := a.do("dial(%q, %d, wait=0.3)", dst.Addr(), dst.Port())
		if x.Errno != "" && said != x.Errno {
			t.Errorf("%s: connect gives %s, explained %s", tt.ask, said, x.Errno)
		}
		reason := x.Reason.String()
		if n := i.Reasons(t)[reason] - before[reason]; n != 1 {
			t.Errorf("%s: connect gives %s, and %s is counted %d times", tt.ask, said, x.Reason, n)
		}
		if i.Reasons(t)["unsent"] != before["unsent"] {
			continue // there is no record of what the kernel itself refuses
		}
		f := i.Ended(t, ends+1)[ends]
		if f.OrigDst != orig || f.Path != x.Path || f.Reason != x.Reason {
			t.Errorf("%s: explained as %s by %s, but it was %+v", tt.ask, x.Path, x.Reason, f)
		}
		if x.Service != nil && f.Service != x.Service.Name {
			t.Errorf("%s: of service %s, but it was %+v", tt.ask, x.Service.Name, f)
		}
		if f.Path == flow.PathDirect && !slices.ContainsFunc(x.Service.Endpoints, func(e admin.EndpointStatus) bool { return e.Address == f.Endpoint.String() }) {
			t.Errorf("%s: endpoints %+v, but it was %+v", tt.ask, x.Service.Endpoints, f)
		}
	}
}

// steady leaves out what counts by itself.
func steady(reasons map[string]uint64) map[string]uint64 {
	m := maps.Clone(reasons)
	for _, r := range []flow.Reason{flow.ReasonAdmitted, flow.ReasonProbe, flow.ReasonHeld, flow.ReasonInjected} {
		delete(m, r.String())
	}
	return m
}

// endpointOf is where a kept connection of an application went.
func endpointOf(t testing.TB, i *rig.Instance, a *app, name any) netip.AddrPort {
	t.Helper()
	// By its port it could be another one, to another endpoint.
	cookie := a.do("cookie(%v)", name)
	flows, err := i.Flows(context.Background(), admin.FlowQuery{Live: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range flows {
		if fmt.Sprint(f.Cookie) == cookie {
			return f.Endpoint
		}
	}
	t.Fatalf("connection %v is not among the live flows", name)
	return netip.AddrPort{}
}

// TestExplainPick: a dry pick is one that a connect can get; in turn, it is the
// next one; and it uses no turn up.
func TestExplainPick(t *testing.T) {
	t.Parallel()
	r, program := rig.New(t), ends(t)
	r.Give(t, rig.Far4)
	serveEnds(t, r, program, ":8001", ":8002", ":8003")
	three := addrs(rig.Far4, 8001, 8002, 8003)
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(vip4, port) }
	policies := []string{"random", "round_robin", "least_connections", "maglev"}
	config := "path: direct\nservices:\n"
	for n, policy := range policies {
		config += service(at(uint16(80+n)), ", policy: "+policy, three...)
	}
	only := `, health_check: {command: [sh, -c, "test $PILLION_ENDPOINT_PORT = 8002"], interval: 200ms, timeout: 5s, unhealthy: 1}`
	config += service(at(90), only, three...)
	i := r.Run(t, config)
	a := captive(t, r)

	for n, policy := range policies {
		vip := at(uint16(80 + n))
		dry, real := map[netip.AddrPort]int{}, map[netip.AddrPort]int{}
		for k := range 60 {
			dry[explained(t, i, vip.String()).Pick]++
			a.wants("ok", "dial(%q, %d, %d)", vip.Addr(), vip.Port(), k)
			real[endpointOf(t, i, a, k)]++
			a.wants("None", "drop(%d)", k)
		}
		for e := range dry {
			if !slices.Contains(three, e) {
				t.Errorf("%s: %s is picked", policy, e)
			}
		}
		if policy == "maglev" {
			if !maps.Equal(dry, real) {
				t.Errorf("maglev: dry picks %v, real ones %v", dry, real)
			}
		} else if len(dry) != 3 && policy != "round_robin" || len(real) != 3 {
			t.Errorf("%s: dry picks %v, real ones %v", policy, dry, real)
		}
	}

	// In turn.
	vip := at(81)
	var turns []netip.AddrPort
	for k := range 9 {
		x := explained(t, i, vip.String())
		if y := explained(t, i, vip.String()); y.Pick != x.Pick {
			t.Errorf("round robin: %s, and then %s", x.Pick, y.Pick)
		}
		a.wants("ok", "dial(%q, %d, %d)", vip.Addr(), vip.Port(), k)
		turns = append(turns, endpointOf(t, i, a, k))
		if turns[k] != x.Pick {
			t.Errorf("round robin: connect %d goes to %s, explained %s", k, turns[k], x.Pick)
		}
		if k >= 3 && turns[k] != turns[k-3] {
			t.Errorf("round robin: the turns are %v", turns)
		}
	}

	// All but one are down.
	testutil.Eventually(t, rig.Limit, func() bool {
		all, _ := endpointsOf(t, i, at(90).String())
		down := 0
		for _, e := range all {
			if e.Down {
				down++
			}
		}
		return down == 2
	}, "two endpoints are down")
	for k := range 5 {
		if x := explained(t, i, at(90).String()); x.Pick != three[1] {
			t.Errorf("only %s is up, and %s is picked", three[1], x.Pick)
		}
		a.wants("ok", "dial(%q, 90, 'only %d')", vip4, k)
		if got := endpointOf(t, i, a, fmt.Sprintf("'only %d'", k)); got != three[1] {
			t.Errorf("only %s is up, and a connection went to %s", three[1], got)
		}
	}
}

// TestSourceHash: who is bound to nothing goes by its address to the same endpoint on
// either path, and where that is explain knows.
func TestSourceHash(t *testing.T) {
	t.Parallel()
	r, program := rig.New(t), ends(t)
	r.Give(t, rig.Far4)
	r.Give(t, rig.Far6)
	config, ports := "services:\n", []uint16{}
	for n := range uint16(20) {
		ports = append(ports, 8001+n)
		serveEnds(t, r, program, fmt.Sprint(":", 8001+n))
	}
	vips := map[netip.Addr]netip.Addr{vip4: rig.Far4, vip6: rig.Far6}
	for vip, far := range vips {
		for port, path := range map[uint16]string{80: "relay", 81: "direct"} {
			config += service(netip.AddrPortFrom(vip, port), ", policy: maglev, path: "+path, addrs(far, ports...)...)
		}
	}
	i := r.Run(t, config)
	a := captive(t, r)
	for vip := range vips {
		for port := uint16(80); port < 82; port++ {
			a.wants("ok", "dial(%q, %d, '%s %d')", vip, port, vip, port)
		}
		relay, direct := endpointOf(t, i, a, fmt.Sprintf("'%s 80'", vip)), endpointOf(t, i, a, fmt.Sprintf("'%s 81'", vip))
		flows, err := i.Flows(context.Background(), admin.FlowQuery{Live: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range flows {
			if want := map[uint16]flow.Path{80: flow.PathRelay, 81: flow.PathDirect}[f.OrigDst.Port()]; f.Path != want {
				t.Errorf("%s goes by %s", f.OrigDst, f.Path)
			}
		}
		if dry := explained(t, i, netip.AddrPortFrom(vip, 81).String()).Pick; relay != direct || dry != direct {
			t.Errorf("%s: relay goes to %s, direct to %s, which explain says is %s", vip, relay, direct, dry)
		}
	}
}

// TestExplainExits holds explain to its exit codes.
func TestExplainExits(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	i := r.Run(t, "services:\n"+service(netip.AddrPortFrom(vip4, 80), "", netip.AddrPortFrom(rig.Far4, 8001)))
	for _, tt := range []struct {
		args []string
		code int
	}{
		{[]string{"explain", "10.96.0.12:80"}, 0},
		{[]string{"explain", "10.96.0.12"}, 0},
		{[]string{"explain", "10.96.0.12:80", "-o", "json"}, 0},
		{[]string{"explain"}, 64},
		{[]string{"explain", "a", "b"}, 64},
		{[]string{"explain", ""}, 64},
		{[]string{"explain", "10.96.0.12:http"}, 64},
		{[]string{"explain", "10.96.0.12:80", "-o", "xml"}, 64},
		{[]string{"explain", "10.96.0.12:80", "--source", "nobody"}, 64},
		{[]string{"explain", "10.96.0.12:80", "--source", "::1"}, 64},
		{[]string{"explain", "10.96.0.12:80", "--instance", "nobody"}, 1},
	} {
		out, err := r.Pillion(t, tt.args...)
		code := 0
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			code = exit.ExitCode()
		} else if err != nil {
			t.Fatal(err)
		}
		if code != tt.code {
			t.Errorf("%v: exit code %d, want %d: %s%v", tt.args, code, tt.code, out, err)
		}
	}
	i.Conserved(t)
}
