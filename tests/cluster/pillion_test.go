package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/node"
	"github.com/pillion-project/pillion/tests/testutil"
)

// testWebhook follows docs/deploy.md.
func testWebhook(t *testing.T, c *cluster) {
	testutil.Need(t, "openssl")
	c.Say(t, `openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -keyout tls.key -out tls.crt \
  -subj /CN=pillion-webhook -addext subjectAltName=DNS:pillion-webhook.pillion-system.svc 2>&1 | tail -n 1`)
	out := c.Say(t, `sed "s|caBundle: \"\"|caBundle: $(base64 -w0 tls.crt)|" deploy/kubernetes/webhook.yaml | kubectl apply -f -`)
	if strings.Contains(out, "Warning") {
		t.Errorf("kubectl does not like the manifest: %s", out)
	}
	c.Say(t, "kubectl -n pillion-system create secret tls pillion-webhook-tls --cert tls.crt --key tls.key")
	c.ready(t, "pillion-system", "pillion-webhook")
}

// clients are the namespaces with applications, and the path that they take.
var clients = map[string]flow.Path{"shop": flow.PathRelay, "shop-direct": flow.PathDirect}

// testDiscovery has the webhook put Pillion beside everybody, and Pillion find the
// service by the address that the application connects to.
func testDiscovery(t *testing.T, c *cluster) {
	c.Say(t, "kubectl apply -f deploy/kubernetes/discovery.yaml")
	c.Say(t, "kubectl create clusterrolebinding shop-direct --clusterrole pillion-discovery --group system:serviceaccounts:shop-direct")
	c.namespace(t, "backend", "services: []\n")
	c.Say(t, "kubectl label namespace backend pillion-project.github.io/inject=enabled")
	c.apply(t, "server.yaml", workload("backend", "server", 2, `        readinessProbe:
          tcpSocket: {port: 8080}
          periodSeconds: 1
`, "serve", "-linger", "10s")+`---
apiVersion: v1
kind: Service
metadata:
  name: server
  namespace: backend
spec:
  clusterIP: 10.201.0.50
  selector: {app: server}
  ports:
  - {port: 80, targetPort: 8080}
`)
	c.ready(t, "backend", "server")
	for name, path := range clients {
		c.namespace(t, name, fmt.Sprintf("kubernetes: {on_demand: true}\npath: %s\n", path))
		c.Say(t, fmt.Sprintf("kubectl label namespace %s pillion-project.github.io/inject=enabled", name))
		c.apply(t, "client.yaml", workload(name, "client", 1, "", "work", "-first", service, "-tick", service))
	}
	for name, path := range clients {
		c.ready(t, name, "client")
		p := c.served(t, name)
		c.carried(t, p, path)
		st := c.status(t, p)
		for _, s := range st.Services {
			if s.Name != named || s.Path != path || len(s.Endpoints) != 2 || s.Source.Kind != "kubernetes" {
				t.Errorf("%s: service %+v, want %s with 2 endpoints", name, s, named)
			}
		}
		t.Logf("in %s the first connect was answered by %q; counters %v", name, c.report(t, p).First, st.Counters)
	}
	c.Say(t, "kubectl -n shop get pods -l app=client")
	c.Say(t, `kubectl -n shop exec deployment/client -c pillion -- /pillion status`)
	c.Say(t, `kubectl -n shop exec deployment/client -c pillion -- /pillion explain `+service)
	c.Say(t, `kubectl -n shop exec deployment/client -c pillion -- /pillion flows --limit 4`)
}

// served waits until both servers have answered the application of a namespace a
// while, and returns its pod.
func (c *cluster) served(t *testing.T, namespace string) node.Pod {
	t.Helper()
	pods := c.pods(t, namespace)
	if len(pods) != 1 {
		t.Fatalf("%d pods in %s", len(pods), namespace)
	}
	var r report
	c.Eventually(t, "the application of "+namespace+" is served", func() bool {
		r = c.report(t, pods[0])
		answers, servers, _ := r.sum()
		return answers > 100 && servers > 1
	})
	if _, _, failed := r.sum(); failed > 0 || strings.HasPrefix(r.First, "E") {
		t.Errorf("%s: report %+v, want nothing that failed", namespace, r)
	}
	return pods[0]
}

// testInject has pillion inject do what the webhook does, in a namespace without
// it, and the second time nothing.
func testInject(t *testing.T, c *cluster) {
	c.namespace(t, "by-hand", `services: [{name: "backend/server:80", address: "10.201.0.50:80", discover: {kubernetes: {service: backend/server}}}]`)
	c.Say(t, `kubectl create clusterrolebinding by-hand --clusterrole pillion-discovery --group system:serviceaccounts:by-hand`)
	c.Write(t, "client.yaml", workload("by-hand", "client", 1, "", "work", "-first", service, "-tick", service))
	inject := "pillion inject -f client.yaml --image " + node.Pillion + " | kubectl apply -f -"
	c.Say(t, inject)
	c.ready(t, "by-hand", "client")
	c.carried(t, c.served(t, "by-hand"), flow.PathRelay)
	if out := c.Say(t, inject); !strings.Contains(out, "unchanged") {
		t.Errorf("injected and applied again: %s", out)
	}
	if r := c.report(t, c.pods(t, "by-hand")[0]); strings.HasPrefix(r.First, "E") {
		t.Errorf("the first connect got %q", r.First)
	}
	c.Say(t, "kubectl delete namespace by-hand --timeout 170s")
}

// testJob has one complete beside its sidecar.
func testJob(t *testing.T, c *cluster) {
	c.apply(t, "job.yaml", `apiVersion: batch/v1
kind: Job
metadata:
  name: once
  namespace: shop
spec:
  template:
    spec:
      restartPolicy: Never
      containers:
      - name: app
        image: localhost/app:1
        args: [work, -first, "`+service+`", -job]
`)
	c.Say(t, "kubectl -n shop wait --for=condition=complete job/once --timeout 170s")
	if out := c.Say(t, "kubectl -n shop logs job/once -c app"); !strings.Contains(out, "first: server-") {
		t.Errorf("the job says %q", out)
	}
	c.Say(t, "kubectl -n shop delete job once")
}

// testRefused has the API server tell a user why there is no pod.
func testRefused(t *testing.T, c *cluster) {
	c.Write(t, "host.yaml", `apiVersion: v1
kind: Pod
metadata: {name: host, namespace: shop}
spec:
  hostNetwork: true
  containers:
  - {name: app, image: "localhost/app:1", args: [work]}
`)
	out, err := c.Run("kubectl apply -f host.yaml")
	t.Logf("$ kubectl apply -f host.yaml\n%s", out)
	if err == nil || !strings.Contains(out, "inject.pillion-project.github.io") || !strings.Contains(out, "network") {
		t.Errorf("a pod on the node's network: %v, %s", err, out)
	}
}

// testRollout replaces all servers, which have Pillion beside them as well, while
// applications connect all the time: no connection fails.
func testRollout(t *testing.T, c *cluster) {
	pods := map[string]node.Pod{}
	before := map[string]report{}
	for name := range clients {
		pods[name] = c.pods(t, name)[0]
		before[name] = c.report(t, pods[name])
	}
	start := time.Now()
	const rounds = 2
	for range rounds {
		c.Say(t, "kubectl -n backend rollout restart deployment/server")
		c.ready(t, "backend", "server")
	}
	// Until those that went have gone.
	c.Eventually(t, "the old servers are gone", func() bool { return len(c.pods(t, "backend")) == 2 })
	for name, path := range clients {
		r := c.report(t, pods[name])
		answers, servers, failed := r.sum()
		was, had, _ := before[name].sum()
		t.Logf("%s: %d connections in %v to %d servers, %d failed", name, answers-was, time.Since(start).Round(time.Second), servers, failed)
		if failed > 0 {
			t.Errorf("%s: answers %v", name, r.Answers)
		}
		if servers != had+2*rounds {
			t.Errorf("%s: %d servers have answered, want %d and %d more", name, servers, had, 2*rounds)
		}
		c.carried(t, pods[name], path)
	}
}

// testGone deletes all, and looks whether anything is left.
func testGone(t *testing.T, c *cluster) {
	c.Say(t, "kubectl delete namespace shop shop-direct backend --timeout 170s")
	c.Say(t, "kubectl delete -f deploy/kubernetes/webhook.yaml --timeout 170s")
	c.Eventually(t, "the pods are gone", func() bool {
		spaces, err := os.ReadDir("/run/netns")
		return err == nil && len(c.Pods(t)) == 0 && len(spaces) == 0
	})
	if pins, err := filepath.Glob(node.PinDir + "/*"); err != nil || len(pins) > 0 {
		t.Errorf("pins after the end: %v, %v", pins, err)
	}
}
