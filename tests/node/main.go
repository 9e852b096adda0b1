package node

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The environment of what runs inside.
const (
	envDir    = "PILLION_NODE_DIR"
	envCgroup = "PILLION_NODE_CGROUP"
	envLayout = "PILLION_NODE_LAYOUT"
)

// Layout is how a node has its control groups.
type Layout string

// The layouts.
const (
	// V2 is cgroup v2 alone, as on every new node.
	V2 Layout = "v2"
	// Hybrid is cgroup v1 beside v2, as this machine may have it itself.
	Hybrid Layout = "hybrid"
)

// here is the layout of the node that the caller is inside of, or nothing.
func here() Layout { return Layout(os.Getenv(envLayout)) }

// prefix is that of the cgroups of nodes; the process id of who made them follows.
const prefix = "pillion-kubelet-"

// Main runs a package's tests once in every layout, each time on a machine of
// its own as far as processes, mounts, networks and names of cgroups go. binary
// is the environment variable that names what make builds for them; without it
// they are run here, where [New] skips.
func Main(m *testing.M, binary string, layouts ...Layout) {
	switch {
	case filepath.Base(os.Args[0]) == shim:
		os.Exit(runShim())
	case os.Getenv(binary) == "" || os.Geteuid() != 0 || here() != "":
		os.Exit(m.Run())
	}
	// What is started dies with the thread that starts it.
	runtime.LockOSThread()
	sweep()
	code := 0
	for _, l := range layouts {
		if _, err := os.Stat("/sys/fs/cgroup/unified"); err != nil && l == Hybrid {
			fmt.Println("not run: the layout hybrid, which this machine does not have")
			continue
		}
		fmt.Printf("on a node with cgroups as %s\n", l)
		if err := inside(l); err != nil {
			fmt.Fprintf(os.Stderr, "on a node with cgroups as %s: %v\n", l, err)
			code = 1
		}
	}
	os.Exit(code)
}

// inside runs the tests in namespaces of their own, and removes what these do not
// take with them.
func inside(l Layout) (err error) {
	name := prefix + strconv.Itoa(os.Getpid())
	dir := filepath.Join(os.TempDir(), name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("make a directory: %w", err)
	}
	defer os.Remove(dir) // empty, for those out here
	for _, d := range ownDirs {
		if os.Mkdir(d, 0o755) == nil {
			defer os.Remove(d)
		}
	}
	defer func() {
		if e := removeCgroups(name); e != nil && err == nil {
			err = e
		}
	}()
	// The shell is the first process, and waits for those that lost their parent.
	args := append([]string{"--net", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--propagation", "private",
		"bash", "-c", `"$0" "$@"; exit $?`}, os.Args[0])
	for _, a := range os.Args[1:] {
		args = append(args, sooner(a))
	}
	cmd := exec.Command("unshare", args...)
	cmd.Env = append(os.Environ(), envDir+"="+dir, envCgroup+"="+name, envLayout+"="+string(l))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd.Run()
}

// sooner takes a minute from the time limit, so that who times out is inside.
func sooner(arg string) string {
	value, ok := strings.CutPrefix(arg, "-test.timeout=")
	if !ok {
		return arg
	}
	d, err := time.ParseDuration(value)
	if err != nil || d < 2*time.Minute {
		return arg
	}
	return "-test.timeout=" + (d - time.Minute).String()
}

// hierarchies are the places where a cgroup may be made.
func hierarchies() []string {
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	for i, d := range dirs {
		dirs[i] = filepath.Dir(d)
	}
	return append(dirs, "/sys/fs/cgroup")
}

// removeCgroups removes a cgroup with all below it, from every hierarchy. Its
// processes are dead, but may not be gone.
func removeCgroups(name string) error {
	for _, h := range hierarchies() {
		dir := filepath.Join(h, name)
		if !isCgroup(dir) {
			continue
		}
		// v1 has no such file.
		_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
		for deadline := time.Now().Add(20 * time.Second); isCgroup(dir); time.Sleep(50 * time.Millisecond) {
			out, err := exec.Command("find", dir, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+").CombinedOutput()
			if err != nil && time.Now().After(deadline) {
				return fmt.Errorf("remove the cgroup %s: %w\n%s", dir, err, out)
			}
		}
	}
	// The kubelet wants the one controller that a machine with v1 has left in v2.
	// If somebody else uses it, it stays.
	_ = os.WriteFile("/sys/fs/cgroup/unified/cgroup.subtree_control", []byte("-hugetlb"), 0)
	return nil
}

func isCgroup(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "cgroup.procs"))
	return err == nil
}

// sweep removes the cgroups and directories of those that were killed.
func sweep() {
	for _, parent := range append(hierarchies(), os.TempDir()) {
		dirs, _ := filepath.Glob(filepath.Join(parent, prefix+"*"))
		for _, d := range dirs {
			pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(d), prefix))
			if err == nil && syscall.Kill(pid, 0) == syscall.ESRCH {
				_ = removeCgroups(filepath.Base(d)) // the next one tries again
				_ = os.Remove(d)
			}
		}
	}
}
