package kubelet

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/node"
)

// envKubelet names the kubelet that make test-kubelet builds.
const envKubelet = "PILLION_KUBELET_BIN"

func TestMain(m *testing.M) { node.Main(m, envKubelet, node.V2, node.Hybrid) }

// What applications connect to. The node has these addresses itself, so who
// reaches them by anything but Pillion has escaped, and is told so.
var (
	relayed = netip.MustParseAddrPort("10.96.0.12:80")
	direct  = netip.MustParseAddrPort("10.96.0.13:80")
	far     = netip.MustParseAddrPort(node.Address + ":8081")
)

const services = `
services:
- {name: relayed, address: "10.96.0.12:80", endpoints: ["10.200.0.1:8081"]}
- {name: direct, address: "10.96.0.13:80", endpoints: ["10.200.0.1:8081"], path: direct}
`

// kubelet is one, with its node.
type kubelet struct {
	*node.Node
	far, escaped *node.Server
}

// step is a test of one kubelet, which all share.
type step struct {
	name string
	test func(*testing.T, *kubelet)
}

// TestKubelet is everything that needs one.
func TestKubelet(t *testing.T) {
	n := node.New(t, envKubelet, "make test-kubelet")
	k := &kubelet{Node: n, far: n.Serve(t, far, "far"), escaped: n.Serve(t, relayed, "escaped")}
	n.Serve(t, direct, "escaped")
	n.Kubelet("")
	tests := []step{
		{"Gate", testGate},
		{"Life", testLife},
		{"Closed", testClosed},
		{"TwoContainers", testTwoContainers},
		{"Jobs", testJobs},
		{"FirstConnect", testFirstConnect},
	}
	if n.Layout == node.Hybrid {
		// What differs there is how the pod is found.
		tests = []step{{"CgroupMount", testCgroupMount}}
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			start := time.Now()
			tt.test(t, k)
			t.Logf("took %v", time.Since(start).Round(time.Millisecond))
		})
	}
}

// pod is one of a test.
type pod struct {
	k    *kubelet
	name string
	// object is the pod of a manifest of deploy/, and app its application.
	object, app node.Object
}

// shipped is the pod of a manifest of deploy/. What is changed is its name, the
// application, and where the configuration comes from: a static pod can have no
// ConfigMap.
func (k *kubelet) shipped(t *testing.T, file, name, config string, work ...string) *pod {
	t.Helper()
	all := node.Shipped(t, filepath.Join("../../deploy/kubernetes", file))
	p := k.patched(t, node.Find(t, all, "Pod"), name, config, work...)
	return p
}

func (k *kubelet) patched(t *testing.T, o node.Object, name, config string, work ...string) *pod {
	t.Helper()
	p := &pod{k: k, name: name, object: o, app: o.At(t, "spec", "containers", "app")}
	o.At(t, "metadata")["name"] = name
	p.app["image"] = node.App
	p.app["args"] = append([]string{"work"}, work...)
	p.app["env"] = []any{map[string]any{"name": "POD_NAME", "value": name}}
	k.Write(t, filepath.Join("config", name, "pillion.yaml"), config)
	volume := o.At(t, "spec", "volumes", "pillion-config")
	delete(volume, "configMap")
	volume["hostPath"] = map[string]any{"path": k.Path("config/" + name), "type": "Directory"}
	return p
}

// start gives the pod to the kubelet.
func (p *pod) start(t *testing.T) {
	t.Helper()
	p.k.Write(t, "manifests/"+p.name+".json", p.object.JSON(t))
	t.Cleanup(func() {
		if t.Failed() {
			p.show(t)
		}
		p.remove(t)
	})
}

// get asks the kubelet.
func (p *pod) get(t *testing.T) (node.Pod, bool) {
	t.Helper()
	for _, g := range p.k.Pods(t) {
		if g.Metadata.Name == p.name+"-"+node.Name {
			return g, true
		}
	}
	return node.Pod{}, false
}

// until waits until the pod is as it should be.
func (p *pod) until(t *testing.T, what string, is func(node.Pod) bool) node.Pod {
	t.Helper()
	var g node.Pod
	p.k.Eventually(t, p.name+" "+what, func() (ok bool) {
		g, ok = p.get(t)
		return ok && is(g)
	})
	return g
}

func (p *pod) ready(t *testing.T) node.Pod {
	t.Helper()
	return p.until(t, "is ready", func(g node.Pod) bool { return g.Ready() && g.Status.PodIP != "" })
}

// remove takes the pod away, and waits until the kubelet has: its list is without
// the pod at once.
func (p *pod) remove(t *testing.T) {
	t.Helper()
	g, ok := p.get(t)
	if err := os.Remove(p.k.Path("manifests/" + p.name + ".json")); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if ok {
		p.k.Eventually(t, p.name+" is gone", func() bool {
			_, listed := p.get(t)
			return !listed && !p.k.hasCgroup(g.Metadata.UID)
		})
	}
}

// hasCgroup tells whether there is a cgroup in whose path is this.
func (k *kubelet) hasCgroup(part string) bool {
	has := false
	filepath.WalkDir(k.Cgroup, func(path string, _ os.DirEntry, _ error) error {
		has = has || strings.Contains(path, part)
		return nil // some go while this looks
	})
	return has
}

// show tells what is known of a pod.
func (p *pod) show(t *testing.T) {
	g, _ := p.get(t)
	b, _ := json.MarshalIndent(g.Status, "", " ")
	t.Logf("%s is %s", p.name, b)
	for _, c := range append(g.Status.Init, g.Status.Other...) {
		if log, err := p.k.Logs(g, c.Name); err == nil {
			t.Logf("%s of %s:\n%s", c.Name, p.name, log)
		}
	}
}

// report is what the application tells.
type report struct {
	First        string
	Answers      map[string]int
	Held, Broken int
	HeldBy       string
}

func (p *pod) report(t *testing.T) report {
	t.Helper()
	g, ok := p.get(t)
	if !ok {
		t.Fatalf("%s is not there", p.name)
	}
	client := http.Client{Timeout: node.Limit, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + g.Status.PodIP + ":9000/")
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

// more waits until the application has got so many answers more from far, and
// so many lines more over the connection that it holds.
func (p *pod) more(t *testing.T, n int) report {
	t.Helper()
	before := p.report(t)
	var now report
	p.k.Eventually(t, fmt.Sprintf("%s gets %d answers", p.name, n), func() bool {
		now = p.report(t)
		return now.Answers["far"] >= before.Answers["far"]+n && now.Held >= before.Held+n
	})
	return now
}

// sidecar is the state of Pillion's container.
func sidecar(t *testing.T, g node.Pod) node.Container {
	t.Helper()
	c, ok := g.Container("pillion")
	if !ok {
		t.Fatalf("%s has no container pillion: %+v", g.Metadata.Name, g.Status)
	}
	return c
}

// status asks Pillion, in its container.
func (p *pod) status(t *testing.T) admin.Status {
	t.Helper()
	g, _ := p.get(t)
	out, err := p.k.Exec(g, "pillion", "/pillion", "status", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var all []admin.Status
	if err := json.Unmarshal([]byte(out), &all); err != nil || len(all) != 1 {
		t.Fatalf("status: %v\n%s", err, out)
	}
	return all[0]
}

// conserved fails the test unless every connection is accounted for, and Pillion
// has nothing to complain of.
func (p *pod) conserved(t *testing.T) {
	t.Helper()
	p.k.Eventually(t, p.name+" has every connection accounted for, and no problem", func() bool {
		st := p.status(t)
		return st.Unaccounted == 0 && len(st.Problems) == 0
	})
}

// end removes the pod, and fails the test unless all that there was of it is gone:
// what Pillion had as well as what the runtime had.
func (p *pod) end(t *testing.T) {
	t.Helper()
	g, _ := p.get(t)
	// The kubelet removes it with the pod, but not from who has it open.
	logs, err := filepath.Glob("/var/log/pods/*_" + g.Metadata.UID + "/pillion/*.log")
	if err != nil || len(logs) == 0 {
		t.Fatalf("no log of the sidecar of %s: %v", p.name, err)
	}
	last, err := os.Open(logs[len(logs)-1])
	if err != nil {
		t.Fatal(err)
	}
	defer last.Close()
	p.remove(t)
	p.gone(t, g.Metadata.UID)
	if t.Failed() {
		b, _ := io.ReadAll(last)
		t.Logf("the sidecar's last words:\n%s", b)
	}
}

// gone fails the test unless nothing is left of pods, in whose cgroups' names uid
// is.
func (p *pod) gone(t *testing.T, uid string) {
	t.Helper()
	p.k.Eventually(t, "nothing is left of "+p.name, func() bool {
		spaces, err := os.ReadDir("/run/netns")
		return !p.k.hasCgroup(uid) && err == nil && len(spaces) == 0 && len(p.pillions(t)) == 0
	})
	if pins, err := filepath.Glob(node.PinDir + "/*"); err != nil || len(pins) > 0 {
		t.Errorf("pins after the end: %v, %v", pins, err)
	}
}

// pillions are the processes of Pillion's image on the node.
func (p *pod) pillions(t *testing.T) (all []string) {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if b, err := os.ReadFile(name); err == nil && strings.HasPrefix(string(b), "/pillion\x00") {
			all = append(all, name)
		}
	}
	return all
}
