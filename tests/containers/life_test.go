package containers

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// service is where applications connect to; nobody has the address.
const service = "10.96.0.12:80"

// TestContainerd is all that is asked of pods of containerd's, on nodes of both
// views.
func TestContainerd(t *testing.T) {
	for _, view := range []string{viewHybrid, viewUnified} {
		t.Run(view, func(t *testing.T) {
			n := newNode(t, view)
			w := n.world(t)
			t.Run("life", func(t *testing.T) { life(t, w) })
		})
	}
}

// world is a node with a pod that serves.
type world struct {
	*node
	server *pod
}

func (n *node) world(t *testing.T) *world {
	t.Helper()
	w := &world{node: n, server: n.newPod(t, podSpec{})}
	for port, name := range map[int]string{8081: "a", 8082: "b", 8083: "host"} {
		w.server.run(t, name, application("serve", fmt.Sprintf(":%d", port), name))
	}
	return w
}

func (w *world) at(port int) string { return fmt.Sprintf("%s:%d", w.server.ip, port) }

// serving is a configuration with the service at both endpoints.
func (w *world) serving(more string) string {
	return fmt.Sprintf("services: [{name: web, address: %q, policy: round_robin, endpoints: [%q, %q]}]\n%s", service, w.at(8081), w.at(8082), more)
}

// life is that of a pod with the privileges that docs/kubernetes.md asks for.
func life(t *testing.T, w *world) {
	p := w.newPod(t, podSpec{config: w.serving("on_failure: closed")})
	took, out := p.prepare(t, w.minimal("init", "--config", "/etc/pillion/pillion.yaml"))
	t.Logf("pillion init took %v: %s", took.Round(time.Millisecond), out)
	s := p.sidecar(t, w.minimal("run", "--config", "/etc/pillion/pillion.yaml"))
	got := p.ask(t, 10, service)
	t.Log(strings.Join(got, "\n"))
	for _, r := range s.flows(t, 10) {
		t.Logf("%+v", r)
	}
	s.conserved(t)
	t.Log(s.stop(t, 10))
}
