package node

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/testutil"
)

// Limit is how long anything may take that is bound to happen.
const Limit = 3 * time.Minute

// Node is a machine with containerd and, from [Node.Kubelet] on, the kubelet.
type Node struct {
	// Dir is the node's own, and gone with it.
	Dir string
	// Layout is that of its cgroups, and Cgroup the directory of all pods'.
	Layout Layout
	Cgroup string

	t   testing.TB
	bin string
}

// New makes the machine that the tests run on into a node, with containerd and
// the images: Pillion's is that of the archive beside the layout that
// $PILLION_IMAGE names. binary names the environment variable of [Main], and target
// what of make's sets it; without it the test is skipped.
func New(t testing.TB, binary, target string) *Node {
	t.Helper()
	if os.Getenv(binary) == "" {
		t.Skipf("%s is not set: %s builds what this needs and runs it", binary, target)
	}
	testutil.RequireRoot(t)
	n := &Node{Dir: os.Getenv(envDir), Layout: here(), t: t, bin: os.Getenv(binary)}
	name := os.Getenv(envCgroup)
	n.Cgroup = filepath.Join("/sys/fs/cgroup", name)
	if n.Layout == Hybrid {
		n.Cgroup = filepath.Join("/sys/fs/cgroup/unified", name)
	}
	if err := prepare(n.Dir, n.Layout, name); err != nil {
		t.Fatal(err)
	}
	n.containerd()
	return n
}

// Path is that of a file in the node's directory.
func (n *Node) Path(name string) string { return filepath.Join(n.Dir, name) }

// Write writes a file of the node's, in one step, and returns its path.
func (n *Node) Write(t testing.TB, name, content string) string {
	t.Helper()
	path := n.Path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	// Not beside it: the kubelet would read that, too.
	if err := os.WriteFile(n.Path("new"), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(n.Path("new"), path); err != nil {
		t.Fatal(err)
	}
	return path
}

// Process is a daemon of the node.
type Process struct {
	cmd   *exec.Cmd
	stdin io.Closer
	done  chan struct{}
	err   error // when done is closed
}

// Start starts a part of Kubernetes. It ends with the test that made the node;
// if that failed, the end of its log is shown.
func (n *Node) Start(name string, args ...string) *Process {
	n.t.Helper()
	return n.start(exec.Command(n.bin, append([]string{name}, args...)...), name)
}

func (n *Node) start(cmd *exec.Cmd, name string) *Process {
	n.t.Helper()
	log, err := os.Create(n.Path(name + ".log"))
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	p := &Process{cmd: cmd, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = log, log
	if p.stdin, err = cmd.StdinPipe(); err != nil {
		n.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	go p.wait()
	n.t.Cleanup(func() {
		p.Kill()
		if n.t.Failed() {
			n.t.Logf("the end of %s's log:\n%s", name, tail(log.Name(), 12))
		}
	})
	return p
}

func (p *Process) wait() {
	p.err = p.cmd.Wait()
	close(p.done)
}

// Kill ends it.
func (p *Process) Kill() {
	p.stdin.Close()
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.done
}

// Ended tells whether it has ended by itself, and how.
func (p *Process) Ended() (bool, error) {
	select {
	case <-p.done:
		return true, p.err
	default:
		return false, nil
	}
}

func tail(name string, lines int) string {
	b, _ := os.ReadFile(name)
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// containerd starts it, and gives it the images.
func (n *Node) containerd() {
	n.t.Helper()
	testutil.Need(n.t, "containerd", "ctr", "runc", "gcc")
	runc, err := exec.LookPath("runc")
	if err != nil {
		n.t.Fatal(err)
	}
	if n.Layout == V2 {
		self, err := os.Executable()
		if err != nil {
			n.t.Fatal(err)
		}
		runc = n.Path(shim)
		if err := os.Symlink(self, runc); err != nil {
			n.t.Fatal(err)
		}
	}
	n.Write(n.t, "cni/10-pods.conflist", fmt.Sprintf(`{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipam": {"type": "host-local", "dataDir": %q,
   "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}`, n.Path("ipam"), PodRange))
	config := n.Write(n.t, "containerd.toml", strings.NewReplacer("DIR", n.Dir, "RUNC", runc, "PAUSE", pause).Replace(`version = 2
root = "DIR/containerd"
state = "/run/containerd/state"
[grpc]
  address = "DIR/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "DIR/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "PAUSE"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
        BinaryName = "RUNC"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "DIR/cni"
`))
	p := n.start(exec.Command("containerd", "--config", config), "containerd")
	n.Eventually(n.t, "containerd answers", func() bool {
		if ended, err := p.Ended(); ended {
			n.t.Fatalf("containerd ended: %v", err)
		}
		_, err := n.ctr("version")
		return err == nil
	})
	app, err := images(n.Dir)
	if err != nil {
		n.t.Fatal(err)
	}
	n.load(app)
	n.shipped()
}

// shipped loads Pillion's image, and gives it the name that deploy/ has.
func (n *Node) shipped() {
	n.t.Helper()
	archive := os.Getenv("PILLION_IMAGE")
	if archive == "" {
		n.t.Fatal("PILLION_IMAGE is not set: it names the layout that make image writes")
	}
	archive += ".tar"
	n.load(archive)
	names, err := n.ctr("images", "ls", "-q")
	if err != nil {
		n.t.Fatal(err)
	}
	for _, name := range strings.Fields(names) {
		if name == Pillion {
			return // where there is no git, that is what the build is called
		}
		if strings.HasPrefix(name, "ghcr.io/pillion-project/pillion:") {
			if out, err := n.ctr("images", "tag", name, Pillion); err != nil {
				n.t.Fatalf("name the image: %v\n%s", err, out)
			}
			return
		}
	}
	n.t.Fatalf("%s has no image of Pillion: %s", archive, names)
}

func (n *Node) load(archive string) {
	n.t.Helper()
	if out, err := n.ctr("images", "import", archive); err != nil {
		n.t.Fatalf("load %s: %v\n%s", archive, err, out)
	}
}

// ctr asks containerd.
func (n *Node) ctr(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	defer cancel()
	out, err := exec.CommandContext(ctx, "ctr", append([]string{"--address", n.Path("containerd.sock"), "--namespace", "k8s.io"}, args...)...).CombinedOutput()
	return string(out), err
}

// lookEvery paces the looks of Eventually, each of which may be a process.
const lookEvery = 50 * time.Millisecond

// Eventually polls until ok, and fails the test when that takes longer than
// [Limit].
func (n *Node) Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(Limit); !ok(); time.Sleep(lookEvery) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", Limit, what)
		}
	}
}
