package containers

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// service is where applications connect to; nobody has the address.
const service = "10.96.0.12:80"

// initLimit is how long pillion init may take. A busy machine is given more.
const (
	initLimit  = 500 * time.Millisecond
	busyFactor = 6
)

// Commands of Pillion's containers.
var (
	initArgs = []string{"init", "--config", "/etc/pillion/pillion.yaml"}
	runArgs  = []string{"run", "--config", "/etc/pillion/pillion.yaml", "--drain-timeout", "20s"}
)

// TestContainerd is all that is asked of pods of containerd's, on nodes of both
// views.
func TestContainerd(t *testing.T) {
	for _, view := range []string{viewHybrid, viewUnified} {
		t.Run(view, func(t *testing.T) {
			w := newNode(t, view).world(t)
			for _, c := range []struct {
				name string
				test func(*testing.T, *world)
			}{
				{"finding", finding},
				{"life", life},
				{"failure", failure},
				{"drain", drain},
				{"job", job},
				{"beside", beside},
				{"renewed", renewed},
				{"first connect", firstConnect},
				{"deleted", deleted},
				{"doctor", doctor},
			} {
				t.Run(c.name, func(t *testing.T) { c.test(t, w) })
			}
		})
	}
}

// world is a node with a pod that serves.
type world struct {
	*node
	server *pod
}

// Ports of the server's containers. The address of the third is a service's, too;
// no service names the last.
const portA, portB, portHost, portApart = 8081, 8082, 8083, 8084

func (n *node) world(t *testing.T) *world {
	t.Helper()
	w := &world{node: n, server: n.newPod(t, podSpec{})}
	for port, name := range map[int]string{portA: "a", portB: "b", portHost: "host", portApart: "apart"} {
		w.server.run(t, name, application("serve", fmt.Sprintf(":%d", port), name))
	}
	return w
}

func (w *world) at(port int) string { return fmt.Sprintf("%s:%d", w.server.ip, port) }

// serving is a configuration with the service at two endpoints, and what only the
// applications find at "host" at one.
func (w *world) serving(more string) string {
	return fmt.Sprintf(`services:
- {name: web, address: %q, policy: round_robin, endpoints: [%q, %q]}
- {name: instead, address: %q, endpoints: [%q]}
%s
`, service, w.at(portA), w.at(portB), w.at(portHost), w.at(portA), more)
}

// life is that of a pod with the privileges that docs/kubernetes.md asks for: what
// comes before the applications, and what they get.
func life(t *testing.T, w *world) {
	p := w.newPod(t, podSpec{config: w.serving("on_failure: closed")})
	best := time.Hour
	for range 3 { // a kubelet may do it again
		took, out := p.prepare(t, w.minimal(initArgs...))
		t.Logf("pillion init took %v: %s", took.Round(time.Millisecond), out)
		best = min(best, took)
	}
	if best > busyFactor*initLimit {
		t.Errorf("pillion init took %v at best, want %v on an idle machine", best, initLimit)
	}
	if got := p.ask(t, 1, service); !strings.Contains(got[0], "refused true") {
		t.Errorf("between init and run an application got %q, want that it is refused", got)
	}
	side := w.minimal(runArgs...)
	side.mounts = append(side.mounts, mount{at: "/app", from: w.binary, readOnly: true})
	s := p.sidecar(t, side)

	// One application container is there before the other, and has a connection.
	held := p.run(t, "hold", application("hold", service))
	held.says(t, service)
	told := map[string]int{}
	for _, line := range p.answers(t, 10, service) {
		told[line]++
	}
	want := map[string]int{answer("a", p, service): 5, answer("b", p, service): 5}
	if diff := cmp.Diff(want, told); diff != "" {
		t.Errorf("by which endpoint applications were answered, as whom, and by whom as they see it: %s", diff)
	}
	s.records(t, p, 10)

	// What is run in its own container is left alone.
	if got := p.answers(t, 1, w.at(portHost)); !strings.HasPrefix(got[0], "a ") {
		t.Errorf("an application got %q, want the service's endpoint", got)
	}
	before := s.counters(t)["self"]
	if got, code := s.exec(t, "/app", "ask", "1", w.at(portHost)); code != 0 || !strings.HasPrefix(got, "host ") {
		t.Errorf("in its own container: %q, %d; want what has the address", got, code)
	}
	if s.counters(t)["self"] <= before {
		t.Error("its own container is not exempt")
	}
	s.conserved(t)

	if st := held.status(t); st.state != stateRunning {
		t.Errorf("the open connection has ended: %s", held.output(t))
	}
}

// says waits until the container has written something.
func (c *container) says(t *testing.T, what string) {
	t.Helper()
	for end := time.Now().Add(rig.Limit); !strings.Contains(c.output(t), what); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s does not say %q but:\n%s", c.name, what, c.output(t))
		}
	}
}

// records compares what is on record with what was asked, without what was refused
// while there was no handler.
func (s *sidecar) records(t *testing.T, p *pod, want int) {
	t.Helper()
	var all []flow.Record
	testutil.Eventually(t, rig.Limit, func() bool {
		all = slices.DeleteFunc(s.flows(t, want), func(r flow.Record) bool { return r.Path == flow.PathDeny && r.Reason == flow.ReasonHandlerStale })
		return len(all) >= want
	}, want, " connections on record")
	if len(all) != want {
		t.Errorf("%d records, want %d", len(all), want)
	}
	endpoints := map[string]int{}
	for _, r := range all {
		endpoints[r.Endpoint.String()]++
		if r.Path != flow.PathRelay || r.Service != "web" || r.OrigDst.String() != service || r.Source.Addr() != netip.MustParseAddr(p.ip) {
			t.Errorf("record %+v, want the service's, by relay, from %s", r, p.ip)
		}
	}
	if len(endpoints) != min(want, 2) {
		t.Errorf("endpoints %v of %d connections", endpoints, want)
	}
}
