package node

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Kubelet starts the kubelet. Without an API server, that of kubeconfig, its pods
// are those of the files of [Node.Path] "manifests".
func (n *Node) Kubelet(kubeconfig string) *Process {
	n.t.Helper()
	config := strings.NewReplacer("DIR", n.Dir, "PODS", PodRange, "CGROUP", filepath.Base(n.Cgroup)).Replace(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: /CGROUP
containerRuntimeEndpoint: unix://DIR/containerd.sock
volumePluginDir: DIR/plugins
failSwapOn: false
failCgroupV1: false
enforceNodeAllocatable: []
evictionHard: {memory.available: 1Mi, nodefs.available: 1%, imagefs.available: 1%}
localStorageCapacityIsolation: false
oomScoreAdj: 0
resolvConf: ""
syncFrequency: 1s
makeIPTablesUtilChains: false
`)
	args := []string{"--root-dir=" + n.Path("kubelet"), "--cert-dir=" + n.Path("kubelet-certs"), "--hostname-override=" + Name, "--node-ip=" + Address, "--v=2"}
	if kubeconfig == "" {
		n.mkdir("manifests")
		config += "staticPodPath: " + n.Path("manifests") + "\nfileCheckFrequency: 300ms\n"
	} else {
		args = append(args, "--kubeconfig="+kubeconfig)
		config += "nodeStatusUpdateFrequency: 2s\npodCIDR: " + PodRange + "\n"
	}
	p := n.Start("kubelet", append(args, "--config="+n.Write(n.t, "kubelet.yaml", config))...)
	n.Eventually(n.t, "the kubelet answers", func() bool {
		if ended, err := p.Ended(); ended {
			n.t.Fatalf("the kubelet ended: %v", err)
		}
		_, err := n.ask(http.MethodGet, "/pods", nil)
		return err == nil
	})
	return p
}

func (n *Node) mkdir(name string) {
	n.t.Helper()
	if err := os.MkdirAll(n.Path(name), 0o755); err != nil {
		n.t.Fatal(err)
	}
}

// ask asks the kubelet.
func (n *Node) ask(method, path string, query url.Values) (string, error) {
	client := http.Client{Timeout: Limit, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}
	req, err := http.NewRequest(method, "https://"+Address+":10250"+path+"?"+query.Encode(), nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("the kubelet says %s: %s", resp.Status, b)
	}
	return string(b), err
}

// Pod is what the kubelet tells of one.
type Pod struct {
	Metadata struct{ Name, Namespace, UID string }
	Status   struct {
		Phase, PodIP string
		Conditions   []struct{ Type, Status string }
		// Init has those of sidecars, too.
		Init  []Container `json:"initContainerStatuses"`
		Other []Container `json:"containerStatuses"`
	}
}

// Container is the state of one.
type Container struct {
	Name, ContainerID string
	RestartCount      int
	Ready             bool
	State             struct {
		Running    *struct{ StartedAt time.Time }
		Terminated *Terminated
	}
	LastState struct{ Terminated *Terminated }
}

// Terminated is the end of a container.
type Terminated struct {
	ExitCode              int
	Reason                string
	StartedAt, FinishedAt time.Time
}

// Ready tells whether a pod is.
func (p *Pod) Ready() bool {
	for _, c := range p.Status.Conditions {
		if c.Type == "Ready" {
			return c.Status == "True"
		}
	}
	return false
}

// Container returns the state of one of a pod's containers, init containers among
// them.
func (p *Pod) Container(name string) (Container, bool) {
	for _, c := range append(p.Status.Init, p.Status.Other...) {
		if c.Name == name {
			return c, true
		}
	}
	return Container{}, false
}

// Pods asks the kubelet for its pods.
func (n *Node) Pods(t testing.TB) []Pod {
	t.Helper()
	answer, err := n.ask(http.MethodGet, "/pods", nil)
	if err != nil {
		t.Fatal(err)
	}
	var list struct{ Items []Pod }
	if err := json.Unmarshal([]byte(answer), &list); err != nil {
		t.Fatal(err)
	}
	return list.Items
}

// Exec runs a command in a container, as kubectl exec does, and returns what it
// says. The command's words have no spaces.
func (n *Node) Exec(p Pod, container string, command ...string) (string, error) {
	return n.ask(http.MethodPost, "/run/"+p.Metadata.Namespace+"/"+p.Metadata.Name+"/"+p.Metadata.UID+"/"+container,
		url.Values{"cmd": {strings.Join(command, " ")}})
}

// Logs returns what a container wrote.
func (n *Node) Logs(p Pod, container string) (string, error) {
	return n.ask(http.MethodGet, "/containerLogs/"+p.Metadata.Namespace+"/"+p.Metadata.Name+"/"+container, nil)
}

// Pid returns the first process of a container, as the node counts.
func (n *Node) Pid(t testing.TB, p Pod, container string) int {
	t.Helper()
	c, _ := p.Container(container)
	id := strings.TrimPrefix(c.ContainerID, "containerd://")
	if id == "" {
		t.Fatalf("%s of %s has no id: %+v", container, p.Metadata.Name, c)
	}
	var pid int
	err := filepath.WalkDir(n.Cgroup, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.IsDir() || d.Name() != id {
			return nil // gone meanwhile, or another
		}
		b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if w := strings.Fields(string(b)); len(w) > 0 {
			pid, err = strconv.Atoi(w[0])
		}
		return err
	})
	if err != nil || pid == 0 {
		t.Fatalf("no process of %s (%s) in %s: %v", container, id, n.Cgroup, err)
	}
	return pid
}
