package containers

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// How a node sees cgroups.
const (
	viewHybrid  = "hybrid"  // v1, and v2 beside it, as this machine is
	viewUnified = "unified" // v2 alone, at /sys/fs/cgroup
)

// cgroupDir is where every node has its cgroups.
const cgroupDir = "/sys/fs/cgroup"

// node is a runtime in mount, process and network namespaces of its own, with
// directories of its own: nothing of it is outside but cgroups, which are below one
// name.
type node struct {
	*runtimeClient
	dir   string // seen by the same name inside
	view  string
	top   string // begins the path of every cgroup
	cmd   *exec.Cmd
	log   *rig.Log
	ended chan struct{}
	images
}

// topPrefix begins the names of the nodes' cgroups; the process's number follows.
const topPrefix = "pillion-containers-"

var nodes atomic.Int64

// newNode starts a node with containerd. It ends with the test, and takes its cgroups
// along.
func newNode(t *testing.T, view string) *node {
	t.Helper()
	n := emptyNode(t, view)
	testutil.Need(t, "containerd", "ctr", "runc")
	images := n.images
	n.start(t)
	for _, archive := range []string{images.pillion, images.app, images.pause} {
		out, err := exec.Command("ctr", "--address", n.socket(), "--namespace", "k8s.io", "images", "import", archive).CombinedOutput()
		if err != nil {
			t.Fatalf("import %s: %v\n%s\n%s", archive, err, out, n.log)
		}
	}
	for _, image := range []string{images.pillionName, appName, pauseName} {
		testutil.Eventually(t, rig.Limit, func() bool {
			f, err := n.call(t.Context(), "ImageService/ImageStatus", message(nil).message(1, message(nil).text(1, image)))
			return err == nil && f.bytes[1] != nil
		}, "the runtime has the image "+image)
	}
	return n
}

// emptyNode is one where nothing runs yet.
func emptyNode(t *testing.T, view string) *node {
	t.Helper()
	needImage(t)
	testutil.RequireRoot(t)
	n := &node{dir: shortDir(t), view: view, log: &rig.Log{}, ended: make(chan struct{})}
	n.images = newImages(t, n.dir)
	forgetDead(t)
	n.top = fmt.Sprintf("%s%d-%d", topPrefix, os.Getpid(), nodes.Add(1))
	if view == viewUnified {
		keepControllers(t)
	}
	t.Cleanup(func() { forgetCgroups(t, n.top) })
	return n
}

// shortDir makes a directory whose path leaves room for that of a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pillion-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func (n *node) socket() string { return filepath.Join(n.dir, "c.sock") }

// start runs containerd.
func (n *node) start(t *testing.T) {
	t.Helper()
	n.configure(t)
	n.launch(t, "/usr/bin/containerd", "--config", filepath.Join(n.dir, "config.toml"))
	n.runtimeClient = dialRuntime(n.socket())
	t.Cleanup(n.close)
	testutil.Eventually(t, rig.Limit, func() bool {
		select {
		case <-n.ended:
			t.Fatalf("containerd ended\n%s", n.log)
		default:
		}
		_, err := n.call(t.Context(), "RuntimeService/Version", nil)
		return err == nil
	}, "containerd answers\n", n.log)
}

// launch makes the namespaces, with a command in them, and the first process that
// waits for it. They end with the test.
func (n *node) launch(t *testing.T, command ...string) {
	t.Helper()
	n.cmd = exec.Command("/proc/self/exe")
	n.cmd.Env = append(os.Environ(), envNode+"="+strings.Join(append([]string{n.dir, n.view}, command...), "|"))
	n.cmd.Stdout, n.cmd.Stderr = n.log, n.log
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWIPC}
	// It ends when nobody holds the other end: with this process at the latest.
	hold, err := n.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go n.wait()
	t.Cleanup(func() {
		n.cmd.Process.Kill() // and everybody in its namespace of processes
		<-n.ended
		hold.Close()
		if t.Failed() {
			t.Logf("log of the node:\n%s", tail(n.log.String(), 15))
		}
	})
}

func (n *node) wait() {
	_ = n.cmd.Wait()
	close(n.ended)
}

// tail returns the last lines of a text.
func tail(s string, lines int) string {
	all := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

func (n *node) configure(t *testing.T) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	binary := ""
	if n.view == viewUnified {
		binary = filepath.Join(n.dir, shimName)
		if err := os.Symlink(self, binary); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{
		"config.toml":          fmt.Sprintf(containerdConfig, n.dir, pauseName, binary),
		"cni/10-pods.conflist": fmt.Sprintf(networkConfig, n.dir),
	} {
		path := filepath.Join(n.dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// A machine that may not raise its limits cannot lower a score of the OOM killer.
const containerdConfig = `version = 2
root = "%[1]s/root"
state = "%[1]s/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "%[1]s/c.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "%[2]s"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
      BinaryName = "%[3]s"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "%[1]s/cni"
`

const networkConfig = `{
  "cniVersion": "0.4.0", "name": "pods",
  "plugins": [{
    "type": "bridge", "bridge": "pods0", "isGateway": true, "hairpinMode": true,
    "ipam": {
      "type": "host-local", "dataDir": "%s/ipam",
      "ranges": [[{"subnet": "10.202.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]
    }
  }]
}
`

// path returns how a path of the node is reached from here.
func (n *node) path(path string) string {
	return filepath.Join("/proc", strconv.Itoa(n.cmd.Process.Pid), "root", path)
}

// pins are the names of the instances on the node.
func (n *node) pins(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir(n.path("/sys/fs/bpf/pillion"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// hierarchies are where cgroups are mounted here.
func hierarchies(t *testing.T) []string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	var dirs []string
	for line := range strings.Lines(string(mounts)) {
		if w := strings.Fields(line); len(w) > 2 && (w[2] == "cgroup" || w[2] == "cgroup2") {
			dirs = append(dirs, w[1])
		}
	}
	return dirs
}

// forgetCgroups removes a cgroup and all below from every hierarchy.
func forgetCgroups(t *testing.T, top string) {
	t.Helper()
	for _, h := range hierarchies(t) {
		var err error
		// A process that was killed a moment ago may be there still.
		for end := time.Now().Add(rig.Limit); ; time.Sleep(20 * time.Millisecond) {
			if err = removeTree(filepath.Join(h, top)); err == nil || time.Now().After(end) {
				break
			}
		}
		if err != nil {
			t.Errorf("remove cgroups: %v", err)
		}
	}
}

// forgetDead removes the cgroups of tests that were killed.
func forgetDead(t *testing.T) {
	t.Helper()
	for _, h := range hierarchies(t) {
		tops, err := filepath.Glob(filepath.Join(h, topPrefix+"*-*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, top := range tops {
			pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(top), topPrefix), "-")
			if n, err := strconv.Atoi(pid); err == nil && unix.Kill(n, 0) == unix.ESRCH {
				_ = removeTree(top) // what something is in still is not ours to end
			}
		}
	}
}

func removeTree(top string) error {
	var dirs []string
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	for i := len(dirs) - 1; i >= 0; i-- {
		if e := unix.Rmdir(dirs[i]); e != nil && e != unix.ENOENT {
			err = errors.Join(err, fmt.Errorf("rmdir %s: %w", dirs[i], e))
		}
	}
	return err
}

// keepControllers gives back what runc switches on for all of v2.
func keepControllers(t *testing.T) {
	t.Helper()
	file := filepath.Join(testutil.CgroupRoot(t), "cgroup.subtree_control")
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	had := strings.Fields(string(before))
	t.Cleanup(func() {
		after, err := os.ReadFile(file)
		if err != nil {
			t.Error(err)
			return
		}
		for _, c := range strings.Fields(string(after)) {
			if contains(had, c) {
				continue
			}
			// Busy for a moment after the last cgroup below has gone, or for as long
			// as another test has it on: then that one gives it back.
			for end := time.Now().Add(rig.Limit / 10); ; time.Sleep(50 * time.Millisecond) {
				if err = os.WriteFile(file, []byte("-"+c), 0); err == nil || time.Now().After(end) {
					break
				}
			}
			if err != nil {
				t.Logf("give back %s: %v", c, err)
			}
		}
	})
}

func contains(all []string, s string) bool {
	for _, a := range all {
		if a == s {
			return true
		}
	}
	return false
}

// limited is a context for what a runtime does.
func limited(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*rig.Limit)
	t.Cleanup(cancel)
	return ctx
}
