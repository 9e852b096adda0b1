package containers

import (
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// States of a container, as the runtime tells them.
const (
	stateRunning = 1
	stateExited  = 2
)

// Namespace modes.
const (
	ofPod  = 0
	ofNode = 2
)

// pod is a sandbox, and what a kubelet knows of it.
type pod struct {
	*node
	id     string // of the sandbox
	uid    string
	ip     string
	dir    string // what its containers mount: conf, run, logs
	parent string // cgroup
	config message
	spec   podSpec
	count  int
	gone   bool
}

// podSpec is what differs between pods.
type podSpec struct {
	config      string // Pillion's
	privileged  bool   // whether a container may be
	hostNetwork bool
	parent      string // the cgroup's name; empty: as the kubelet would call it
	uid         string // empty: a new one
}

func newUID(t *testing.T) string {
	t.Helper()
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	h := hex.EncodeToString(b)
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}

// newPod makes a pod. It ends with the test.
func (n *node) newPod(t *testing.T, s podSpec) *pod {
	t.Helper()
	p := &pod{node: n, uid: s.uid, spec: s}
	if p.uid == "" {
		p.uid = newUID(t)
	}
	p.dir = filepath.Join(n.dir, "pods", p.uid[:8])
	p.parent = s.parent
	if p.parent == "" {
		p.parent = "pod" + p.uid
	}
	for _, d := range []string{"conf", "run", "logs"} {
		if err := os.MkdirAll(filepath.Join(p.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p.configure(t, s.config)
	p.sandbox(t)
	t.Cleanup(func() { p.remove(t) })
	return p
}

// configure writes Pillion's configuration.
func (p *pod) configure(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, "conf", "pillion.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (p *pod) namespaces() message {
	network := ofPod
	if p.spec.hostNetwork {
		network = ofNode
	}
	return message(nil).number(1, int64(network)).number(2, 1) // processes are the container's
}

// sandbox makes the pod's sandbox, also another one when the first has gone.
func (p *pod) sandbox(t *testing.T) {
	t.Helper()
	p.count++
	metadata := message(nil).text(1, "p").text(2, p.uid).text(3, "default").number(4, int64(p.count))
	security := message(nil).message(1, p.namespaces()).flag(6, p.spec.privileged).message(9, nil)
	linux := message(nil).text(1, "/"+p.top+"/kubepods/burstable/"+p.parent).message(2, security)
	p.config = message(nil).message(1, metadata).text(3, filepath.Join(p.dir, "logs")).message(8, linux)
	if !p.spec.hostNetwork {
		p.config = p.config.text(2, "pod")
	}
	f, err := p.call(limited(t), "RuntimeService/RunPodSandbox", message(nil).message(1, p.config))
	if err != nil {
		t.Fatalf("%v\n%s", err, tail(p.log.String(), 20))
	}
	p.id = string(f.bytes[1])
	f, err = p.call(limited(t), "RuntimeService/PodSandboxStatus", message(nil).text(1, p.id))
	if err != nil {
		t.Fatal(err)
	}
	status, err := f.bytes[1].fields()
	if err != nil {
		t.Fatal(err)
	}
	network, err := status.bytes[5].fields()
	if err != nil {
		t.Fatal(err)
	}
	p.ip = string(network.bytes[1])
}

// remove deletes the pod, as a kubelet does: containers, sandbox, cgroup. Once it is
// gone, it does nothing.
func (p *pod) remove(t *testing.T) {
	t.Helper()
	if p.gone {
		return
	}
	p.gone = true
	p.stop(t)
	for _, h := range hierarchies(t) {
		if err := removeTree(filepath.Join(h, p.top, "kubepods/burstable", p.parent)); err != nil {
			t.Errorf("remove the pod's cgroup: %v", err)
		}
	}
}

// stop ends the sandbox and what is in it, by SIGKILL.
func (p *pod) stop(t *testing.T) {
	t.Helper()
	for _, method := range []string{"StopPodSandbox", "RemovePodSandbox"} {
		if _, err := p.call(limited(t), "RuntimeService/"+method, message(nil).text(1, p.id)); err != nil {
			t.Error(err)
		}
	}
}

// instance is what Pillion calls its own for the pod.
func (p *pod) instance() string { return "pod-" + strings.ReplaceAll(p.uid, "-", "") }

// container is what is run in a pod, and what is known of it.
type container struct {
	pod   *pod
	name  string
	id    string
	begun time.Time
}

// spec is how a container is run.
type spec struct {
	image      string // empty: Pillion's
	args       []string
	uid        string // what POD_UID says; empty: the pod's
	privileged bool
	caps       []string
	seccomp    string // empty: the runtime's default; none; or a file
	masked     []string
	mounts     []mount
	memory     int64 // bytes; 0: no limit
}

type mount struct {
	at, from string // from: of the node
	readOnly bool
	follows  bool // what is mounted there later
}

// Mounts that Pillion may have.
var (
	bpffs       = mount{at: "/sys/fs/bpf", from: "/sys/fs/bpf", follows: true}
	nodeCgroups = mount{at: cgroupDir, from: cgroupDir, readOnly: true}
)

// minimal is what docs/kubernetes.md asks for on a node with this view.
func (n *node) minimal(args ...string) spec {
	// Where the manifests of deploy/ have it.
	pins := mount{at: "/bpf", from: bpffs.from, follows: true}
	args = append(slices.Clone(args), "--bpffs", pins.at)
	s := spec{args: args, caps: []string{"BPF", "NET_ADMIN", "DAC_READ_SEARCH"}, mounts: []mount{pins}}
	if n.view == viewHybrid {
		s.mounts = append(s.mounts, nodeCgroups)
	}
	return s
}

// application is a container with no privilege at all.
func application(args ...string) spec { return spec{image: appName, args: args} }

// encode makes the runtime's request of it.
func (p *pod) encode(name string, attempt int, s spec) message {
	image := s.image
	var mounts []mount
	var env []string
	if image == "" {
		image = p.pillionName
		mounts = []mount{{at: "/run/pillion", from: filepath.Join(p.dir, "run")}, {at: "/etc/pillion", from: filepath.Join(p.dir, "conf"), readOnly: true}}
		env = []string{"POD_UID=" + cmp.Or(s.uid, p.uid)}
	}
	c := message(nil).message(1, message(nil).text(1, name).number(2, int64(attempt))).message(2, message(nil).text(1, image)).text(4, s.args...)
	for _, e := range env {
		k, v, _ := strings.Cut(e, "=")
		c = c.message(6, message(nil).text(1, k).text(2, v))
	}
	for _, m := range append(mounts, s.mounts...) {
		to := message(nil).text(1, m.at).text(2, m.from).flag(3, m.readOnly)
		if m.follows {
			to = to.number(5, 1)
		}
		c = c.message(7, to)
	}
	c = c.text(11, fmt.Sprintf("%s-%d.log", name, attempt))
	security := message(nil).flag(2, s.privileged).message(3, p.namespaces())
	if !s.privileged {
		security = security.message(1, message(nil).text(1, s.caps...).text(2, "ALL")).message(5, nil).flag(7, true).flag(11, true)
		security = security.text(13, s.masked...).message(15, profile(s.seccomp))
	}
	resources := message(nil).number(4, s.memory)
	return c.message(15, message(nil).message(1, resources).message(2, security))
}

// unconfined is no seccomp profile.
const unconfined = "none"

func profile(name string) message {
	switch name {
	case "":
		return nil
	case unconfined:
		return message(nil).number(1, 1)
	}
	return message(nil).number(1, 2).text(2, "localhost/"+name)
}

// run makes and starts a container. It is not waited for.
func (p *pod) run(t *testing.T, name string, s spec) *container {
	t.Helper()
	p.count++
	c := &container{pod: p, name: fmt.Sprintf("%s-%d", name, p.count)}
	request := message(nil).text(1, p.id).message(2, p.encode(name, p.count, s)).message(3, p.config)
	f, err := p.call(limited(t), "RuntimeService/CreateContainer", request)
	if err != nil {
		t.Fatal(err)
	}
	c.id = string(f.bytes[1])
	c.begun = time.Now()
	if _, err := p.call(limited(t), "RuntimeService/StartContainer", message(nil).text(1, c.id)); err != nil {
		t.Fatal(err)
	}
	return c
}

// status is what the runtime says of a container.
type status struct {
	state, code      int64
	reason           string
	started, stopped time.Time
}

func (c *container) status(t *testing.T) status {
	t.Helper()
	f, err := c.pod.call(limited(t), "RuntimeService/ContainerStatus", message(nil).text(1, c.id))
	if err != nil {
		t.Fatal(err)
	}
	if f, err = f.bytes[1].fields(); err != nil {
		t.Fatal(err)
	}
	return status{
		state: f.numbers[3], code: f.numbers[7], reason: string(f.bytes[10]),
		started: time.Unix(0, f.numbers[5]), stopped: time.Unix(0, f.numbers[6]),
	}
}

// wait waits until the container has ended.
func (c *container) wait(t *testing.T) status {
	t.Helper()
	var s status
	end := time.Now().Add(rig.Limit)
	for s = c.status(t); s.state != stateExited; s = c.status(t) {
		if time.Now().After(end) {
			t.Fatalf("%s does not end\n%s", c.name, c.output(t))
		}
		time.Sleep(20 * time.Millisecond)
	}
	return s
}

// output is all that the container wrote. The runtime puts a time, a stream and a
// mark before each line.
func (c *container) output(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.pod.dir, "logs", c.name+".log"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(string(b)) {
		if w := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4); len(w) == 4 {
			lines = append(lines, w[3])
		}
	}
	return strings.Join(lines, "\n")
}

// exec runs a command in the container.
func (c *container) exec(t *testing.T, words ...string) (string, int64) {
	t.Helper()
	f, err := c.pod.call(limited(t), "RuntimeService/ExecSync", message(nil).text(1, c.id).text(2, words...).number(3, 40))
	if err != nil {
		t.Fatal(err)
	}
	return string(f.bytes[1]) + string(f.bytes[2]), f.numbers[3]
}

// stop ends the container as a kubelet does: SIGTERM, and SIGKILL after so many
// seconds.
func (c *container) stop(t *testing.T, seconds int) status {
	t.Helper()
	if _, err := c.pod.call(limited(t), "RuntimeService/StopContainer", message(nil).text(1, c.id).number(2, int64(seconds))); err != nil {
		t.Fatal(err)
	}
	return c.wait(t)
}

// pids are the container's processes, as they are numbered here.
func (c *container) pids(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.cgroup(testutil.CgroupRoot(t)), "cgroup.procs"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(b))
}

// cgroup is the container's in a hierarchy.
func (c *container) cgroup(hierarchy string) string {
	return filepath.Join(hierarchy, c.pod.top, "kubepods/burstable", c.pod.parent, c.id)
}

// prepare runs pillion init as an init container, and returns how long it took and
// what it wrote.
func (p *pod) prepare(t *testing.T, s spec) (time.Duration, string) {
	t.Helper()
	c := p.run(t, "init", s)
	st := c.wait(t)
	out := c.output(t)
	if st.code != 0 {
		t.Fatalf("pillion init: exit code %d\n%s", st.code, out)
	}
	return st.stopped.Sub(st.started), out
}

// sidecar is a container with pillion run.
type sidecar struct {
	*container
	*admin.Client
}

// sidecar starts Pillion, and waits until the probe says that it is ready.
func (p *pod) sidecar(t *testing.T, s spec) *sidecar {
	t.Helper()
	c := p.run(t, "pillion", s)
	side := &sidecar{container: c, Client: admin.Dial(filepath.Join(p.dir, "run", p.instance()+".sock"))}
	for end := time.Now().Add(rig.Limit); ; time.Sleep(20 * time.Millisecond) {
		if st, err := side.Status(t.Context()); err == nil && st.Ready {
			break
		}
		if st := c.status(t); st.state == stateExited || time.Now().After(end) {
			t.Fatalf("pillion run is not ready: state %d, exit code %d\n%s", st.state, st.code, c.output(t))
		}
	}
	if out, code := c.exec(t, "/pillion", "ready"); code != 0 {
		t.Errorf("it is ready, and the probe says %q", out)
	}
	return side
}

// flows waits for so many records.
func (s *sidecar) flows(t *testing.T, want int) []flow.Record {
	t.Helper()
	var all []flow.Record
	testutil.Eventually(t, rig.Limit, func() bool {
		var err error
		all, err = s.Flows(t.Context(), admin.FlowQuery{})
		return err == nil && len(all) >= want
	}, "connections that have ended: ", want)
	return all
}

// conserved fails the test unless every connection in the pod is accounted for.
func (s *sidecar) conserved(t *testing.T) {
	t.Helper()
	testutil.Eventually(t, rig.Limit, func() bool {
		st, err := s.Status(t.Context())
		return err == nil && st.Unaccounted == 0
	}, "every connection is accounted for")
}

// counters are the kernel side's.
func (s *sidecar) counters(t *testing.T) map[string]uint64 {
	t.Helper()
	st, err := s.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return st.Counters
}

// ask has a new container of the pod connect as soon as it runs, and returns what
// it was told, a line for each connection.
func (p *pod) ask(t *testing.T, times int, to string) []string {
	t.Helper()
	c := p.run(t, "ask", application("ask", fmt.Sprint(times), to))
	c.wait(t)
	return strings.Split(c.output(t), "\n")
}

// answers is ask for a pod that has a sidecar: who is refused asks again, since a
// handler that a busy machine does not let run is taken for gone.
func (p *pod) answers(t *testing.T, times int, to string) []string {
	t.Helper()
	var all []string
	for end := time.Now().Add(rig.Limit); len(all) < times; {
		for _, line := range p.ask(t, times-len(all), to) {
			if !strings.HasPrefix(line, "refused true") {
				all = append(all, line)
			}
		}
		if time.Now().After(end) {
			t.Fatalf("%s answers %d times, want %d: %q", to, len(all), times, all)
		}
	}
	return all
}

// answer is what an application of the pod prints.
func answer(name string, p *pod, to string) string { return fmt.Sprintf("%s %s %s", name, p.ip, to) }
