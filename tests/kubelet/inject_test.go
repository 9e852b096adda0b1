package kubelet

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/pillion-project/pillion/tests/node"
	"golang.org/x/sys/unix"
)

// testCgroupMount is a node with cgroup v1 beside v2, and a pod that pillion
// inject --cgroup-mount made: it sees the node's hierarchy, and needs one
// capability less for that.
func testCgroupMount(t *testing.T, k *kubelet) {
	plain := filepath.Join(t.TempDir(), "pod.yaml")
	if err := os.WriteFile(plain, []byte(`apiVersion: v1
kind: Pod
metadata:
  name: shop
spec:
  containers:
  - name: app
    image: localhost/app:1
`), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(os.Getenv("PILLION"), "inject", "-f", plain, "--image", node.Pillion, "--cgroup-mount").Output()
	if err != nil {
		t.Fatalf("inject: %v", err)
	}
	p := k.patched(t, node.Find(t, node.Parse(t, string(out)), "Pod"), "hybrid", services,
		"-first", relayed.String(), "-tick", relayed.String(), "-hold", direct.String())
	p.start(t)
	g := p.ready(t)
	if r := p.report(t); r.First != "far" {
		t.Errorf("the first connect got %q", r.First)
	}
	p.more(t, 20)
	checkPrivileges(t, k.Pid(t, g, "pillion"), unix.CAP_BPF, unix.CAP_NET_ADMIN)
	if err := unix.Kill(k.Pid(t, g, "pillion"), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	p.until(t, "has a new sidecar", func(g node.Pod) bool {
		c, _ := g.Container("pillion")
		return c.RestartCount > 0 && c.Ready
	})
	if now := p.more(t, 20); now.Answers["escaped"] > 0 || now.Broken > 0 {
		t.Errorf("report %+v, want no escape and the direct connection whole", now)
	}
	p.conserved(t)
	p.end(t)
}
