package cluster

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/node"
)

// envNode names the binary that make test-cluster builds.
const envNode = "PILLION_NODE_BIN"

func TestMain(m *testing.M) { node.Main(m, envNode, node.V2) }

// The service that applications call, in the namespace backend.
const (
	service = "10.201.0.50:80"
	named   = "backend/server:80"
)

// TestCluster is everything that needs one, in the order in which a user comes by.
func TestCluster(t *testing.T) {
	n := node.New(t, envNode, "make test-cluster")
	start := time.Now()
	n.Cluster()
	t.Logf("the node is ready after %v", time.Since(start).Round(100*time.Millisecond))
	c := &cluster{n}
	for _, tt := range []struct {
		name string
		test func(*testing.T, *cluster)
	}{
		{"Webhook", testWebhook},
		{"Discovery", testDiscovery},
		{"Inject", testInject},
		{"Job", testJob},
		{"Refused", testRefused},
		{"Rollout", testRollout},
		{"Gone", testGone},
	} {
		ok := t.Run(tt.name, func(t *testing.T) {
			start := time.Now()
			t.Cleanup(func() {
				if t.Failed() {
					c.show(t)
				}
			})
			tt.test(t, c)
			t.Logf("took %v", time.Since(start).Round(time.Millisecond))
		})
		if !ok {
			return // what follows builds on it
		}
	}
}

type cluster struct{ *node.Node }

func (c *cluster) show(t *testing.T) {
	for _, command := range []string{"kubectl get pods -A -o wide", "kubectl get events -A --sort-by=.lastTimestamp | tail -n 15",
		"for n in shop shop-direct by-hand; do kubectl -n $n logs -l app=client -c pillion --tail 20 --prefix; done",
		"kubectl -n shop get pods -o yaml",
		"kubectl -n pillion-system logs -l app=pillion-webhook --tail 20"} {
		out, err := c.Run(command)
		t.Logf("$ %s\n%s", command, out)
		if err != nil {
			t.Log(err)
		}
	}
}

// workload is a Deployment of tests/node/app.
func workload(namespace, name string, replicas int, more string, args ...string) string {
	words, _ := json.Marshal(args)
	return fmt.Sprintf(`apiVersion: apps/v1
kind: Deployment
metadata:
  name: %s
  namespace: %s
spec:
  replicas: %d
  selector:
    matchLabels: {app: %s}
  strategy:
    type: RollingUpdate
    rollingUpdate: {maxUnavailable: 0, maxSurge: 1}
  template:
    metadata:
      labels: {app: %s}
    spec:
      containers:
      - name: app
        image: localhost/app:1
        args: %s
        env:
        - name: POD_NAME
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
%s`, name, namespace, replicas, name, name, words, more)
}

// apply gives a manifest to the cluster.
func (c *cluster) apply(t *testing.T, name, manifest string) {
	t.Helper()
	c.Say(t, "kubectl apply -f "+c.Write(t, name, manifest))
}

// ready waits until a Deployment is.
func (c *cluster) ready(t *testing.T, namespace, name string) {
	t.Helper()
	c.Say(t, fmt.Sprintf("kubectl -n %s rollout status deployment/%s --timeout 170s | tail -n 1", namespace, name))
}

// namespace makes one, with the configuration that Pillion has in it.
func (c *cluster) namespace(t *testing.T, name, config string) {
	t.Helper()
	c.Say(t, "kubectl create namespace "+name)
	c.Say(t, fmt.Sprintf("kubectl -n %s create configmap pillion --from-file=pillion.yaml=%s", name, c.Write(t, "config-"+name, config)))
}

// pods are those of the kubelet in a namespace.
func (c *cluster) pods(t *testing.T, namespace string) []node.Pod {
	t.Helper()
	return slices.DeleteFunc(c.Pods(t), func(p node.Pod) bool { return p.Metadata.Namespace != namespace })
}

// report is what an application tells.
type report struct {
	First        string
	Answers      map[string]int
	Held, Broken int
}

func (c *cluster) report(t *testing.T, p node.Pod) report {
	t.Helper()
	client := http.Client{Timeout: node.Limit, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + p.Status.PodIP + ":9000/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var r report
	if err := json.NewDecoder(resp.Body).Decode(&r); err != nil {
		t.Fatal(err)
	}
	return r
}

// sum is how many answers an application got, from how many servers, and how many
// connections failed.
func (r report) sum() (answers, servers, failed int) {
	for name, n := range r.Answers {
		if strings.HasPrefix(name, "E") {
			failed += n
			continue
		}
		answers += n
		servers++
	}
	return answers, servers, failed
}

// status asks Pillion in a pod.
func (c *cluster) status(t *testing.T, p node.Pod) admin.Status {
	t.Helper()
	var all []admin.Status
	c.pillion(t, p, &all, "status")
	if len(all) != 1 {
		t.Fatalf("%d instances in %s", len(all), p.Metadata.Name)
	}
	return all[0]
}

func (c *cluster) pillion(t *testing.T, p node.Pod, v any, command ...string) {
	t.Helper()
	out, err := c.Exec(p, "pillion", append(append([]string{"/pillion"}, command...), "-o", "json")...)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(out), v); err != nil {
		t.Fatalf("%v: %v\n%s", command, err, out)
	}
}

// carried fails the test unless the last connections of a pod's application went
// through Pillion, to the service, on a path.
func (c *cluster) carried(t *testing.T, p node.Pod, path flow.Path) {
	t.Helper()
	var records []flow.Record
	c.Eventually(t, p.Metadata.Name+" has connections that have ended", func() bool {
		c.pillion(t, p, &records, "flows", "--limit", "20")
		return len(records) == 20
	})
	on := 0
	for _, r := range records {
		// Without a turn of the processor the handler is passed by.
		starved := r.Reason == flow.ReasonHandlerStale || r.Reason == flow.ReasonHandlerBusy
		if r.Service != named || r.OrigDst.String() != service || r.Path != path && !starved {
			t.Fatalf("%s: record %+v, want service %s on %s", p.Metadata.Name, r, named, path)
		}
		if r.Path == path {
			on++
		}
	}
	if on == 0 {
		t.Errorf("%s: no connection on %s", p.Metadata.Name, path)
	}
	c.Eventually(t, p.Metadata.Name+" has every connection accounted for, and no problem", func() bool {
		st := c.status(t, p)
		return st.Unaccounted == 0 && len(st.Problems) == 0
	})
}
