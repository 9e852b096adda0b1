package loader

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// envFind makes this test binary one that finds its pod, and says what it found
// as JSON: what it sees of the hierarchy, the uid to look for, and whether it is
// the first.
const envFind = "PILLION_TEST_FIND_POD"

// What a process sees of the hierarchy.
const (
	seesAll     = "all"     // the node's
	seesOwn     = "own"     // its own cgroup, in a namespace of cgroups
	seesNothing = "nothing" // no mount at all, in no namespace of its own
	seesLost    = "lost"    // no mount, in a namespace of cgroups
	seesNode    = "node"    // what a node in a container sees, from the first level on
)

// podAnswer is what the process says.
type podAnswer struct {
	Path, UID                string
	ID, Own, Sandbox, Netns  uint64
	Level                    uint32
	Active                   bool
	Populated, Opens, Hidden bool
	Error                    string
	NoPod, Unseen            bool
}

func findPodHere() {
	runtime.LockOSThread()
	w := strings.Split(os.Getenv(envFind), "|")
	var a podAnswer
	err := narrow(w[0])
	var p Pod
	if err == nil {
		p, err = FindPod(PodOptions{UID: w[1], First: w[2] != ""})
	}
	if err != nil {
		a.Error, a.NoPod, a.Unseen = err.Error(), errors.Is(err, ErrNoPod), errors.Is(err, ErrHidden)
	} else {
		a = podAnswer{
			Path: p.Scope.Path, UID: p.UID, ID: p.Scope.ID, Own: p.Own, Sandbox: p.Sandbox, Netns: p.Scope.Netns,
			Level: p.Scope.Level, Populated: p.Scope.Populated(), Hidden: p.Scope.hidden != nil,
		}
		ids, err := cgroupsBelow(p.Scope.dir())
		a.Opens = err == nil && ids[p.Scope.ID] && ids[p.Own]
		if a.Active, err = p.Active(p.Sandbox); err != nil {
			a.Error = err.Error()
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(a); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// narrow gives this thread mounts of its own that show what a container sees.
func narrow(sees string) error {
	what, at, _ := strings.Cut(sees, ":")
	if what == seesAll {
		return nil
	}
	flags := unix.CLONE_NEWNS
	if what == seesOwn || what == seesLost {
		flags |= unix.CLONE_NEWCGROUP
	}
	if err := unix.Unshare(flags); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	const dir = "/sys/fs/cgroup"
	node := -1
	if what == seesNode {
		var err error
		if node, err = unix.OpenTree(unix.AT_FDCWD, at, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC); err != nil {
			return fmt.Errorf("clone the mount of %s: %w", at, err)
		}
	}
	b, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return err
	}
	lines := strings.Split(string(b), "\n")
	for n := len(lines) - 1; n >= 0; n-- {
		if w := strings.Fields(lines[n]); len(w) > 4 && strings.Contains(lines[n], " - cgroup2 ") {
			if err := unix.Unmount(w[4], unix.MNT_DETACH); err != nil {
				return fmt.Errorf("unmount %s: %w", w[4], err)
			}
		}
	}
	switch what {
	case seesOwn:
		return unix.Mount("none", dir, "cgroup2", unix.MS_RDONLY, "")
	case seesNode:
		return unix.MoveMount(node, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	return nil
}

// tree is a pod made by hand: a sandbox, this process's container, and one with an
// application, with real processes, in a network namespace of the pod's own.
type tree struct {
	top, pod, sandbox, leaf, app *testutil.Cgroup
	own                          uint64
	ns                           *testutil.NS
}

func newTree(t *testing.T, path string) *tree {
	t.Helper()
	r := &tree{ns: testutil.NewNS(t), top: testutil.NewCgroup(t)}
	pod, rest, _ := strings.Cut(path, "|")
	at := r.top
	for _, name := range strings.Split(pod, "/") {
		at = at.Child(t, name)
	}
	r.pod = at
	r.sandbox = at.Child(t, strings.Replace(first(rest), id1, id2, 1))
	for n, name := range strings.Split(rest, "/") {
		at = at.Child(t, name)
		if n == 0 {
			r.own = at.ID
		}
	}
	r.leaf = at
	r.app = r.pod.Child(t, strings.Replace(first(rest), id1, id3, 1))
	return r
}

func first(path string) string {
	name, _, _ := strings.Cut(path, "/")
	return name
}

// run puts a program that does nothing into a cgroup. It ends with the test.
func (r *tree) run(t *testing.T, at *testutil.Cgroup) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := (testutil.Place{NS: r.ns, Cgroup: at}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd
}

// find starts a process in the container that finds its pod. caps are all that it
// may; none: everything.
func (r *tree) find(t *testing.T, sees, uid string, first bool, caps ...uintptr) podAnswer {
	t.Helper()
	var a podAnswer
	cmd := exec.Command("/proc/self/exe")
	more := ""
	if first {
		more = "first"
	}
	cmd.Env = append(os.Environ(), envFind+"="+sees+"|"+uid+"|"+more)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	place := testutil.Place{NS: r.ns, Cgroup: r.leaf}
	if len(caps) > 0 {
		place = place.With(caps...)
	}
	if err := place.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, errs.String())
	}
	if err := json.Unmarshal(out.Bytes(), &a); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	return a
}

// TestFindPod finds the pod in every layout, from what a container may see.
func TestFindPod(t *testing.T) {
	testutil.CheckLeaks(t)
	root := testutil.CgroupRoot(t)
	for name, path := range layouts {
		t.Run(name, func(t *testing.T) {
			r := newTree(t, path)
			r.run(t, r.sandbox)
			r.run(t, r.app)
			rel, err := filepath.Rel(root, r.pod.Path)
			if err != nil {
				t.Fatal(err)
			}
			want := podAnswer{
				Path: r.pod.Path, UID: uidPlain, ID: r.pod.ID, Own: r.own, Sandbox: r.sandbox.ID, Netns: r.ns.Cookie(t),
				Level: uint32(strings.Count(rel, "/") + 1), Populated: true, Opens: true, Active: true,
			}
			if strings.HasPrefix(name, "podman") {
				want.UID = id3
			}
			if strings.HasPrefix(name, "CRI-O") {
				want.Sandbox = 0 // its pods may have none
			}
			if diff := cmp.Diff(want, r.find(t, seesAll, "", false)); diff != "" {
				t.Errorf("with all in view: %s", diff)
			}
			want.Path, want.Hidden = "/"+rel, true
			if diff := cmp.Diff(want, r.find(t, seesOwn, "", false)); diff != "" {
				t.Errorf("with its own cgroup in view: %s", diff)
			}
		})
	}
}

// TestFindPodViews finds one pod from all that a process may see and be allowed.
func TestFindPodViews(t *testing.T) {
	testutil.CheckLeaks(t)
	r := newTree(t, layouts["CRI-O, systemd, crun"])
	r.run(t, r.sandbox)
	node := filepath.Join(r.top.Path, "kubepods.slice")
	least := []uintptr{unix.CAP_BPF, unix.CAP_NET_ADMIN}
	mounts := append([]uintptr{unix.CAP_SYS_ADMIN}, least...)
	byID := append([]uintptr{unix.CAP_DAC_READ_SEARCH}, mounts...)
	for name, c := range map[string]struct {
		sees   string
		caps   []uintptr
		hidden bool
		fails  string
	}{
		"all":                            {sees: seesAll},
		"all, two capabilities":          {sees: seesAll, caps: least},
		"own":                            {sees: seesOwn, hidden: true},
		"own, by id":                     {sees: seesOwn, caps: byID, hidden: true},
		"own, not by id":                 {sees: seesOwn, caps: mounts, fails: "some names cannot be read"},
		"nothing":                        {sees: seesNothing, hidden: true},
		"nothing, mounts":                {sees: seesNothing, caps: mounts, hidden: true},
		"nothing, in a namespace":        {sees: seesLost, hidden: true},
		"nothing, in a namespace, by id": {sees: seesLost, caps: byID, hidden: true},
		"a nested node":                  {sees: seesNode + ":" + node},
		"a nested node, not by id":       {sees: seesNode + ":" + r.top.Path, caps: mounts},
		"no capability":                  {sees: seesAll, caps: []uintptr{unix.CAP_NET_ADMIN}, fails: "operation not permitted"},
	} {
		got := r.find(t, c.sees, uidDashes, true, c.caps...)
		if c.fails != "" {
			if !got.Unseen || !strings.Contains(got.Error, c.fails) {
				t.Errorf("%s: %+v, want that it fails: %s", name, got, c.fails)
			}
			continue
		}
		if got.ID != r.pod.ID || got.Own != r.own || got.Sandbox != r.sandbox.ID || got.Hidden != c.hidden || !got.Opens || got.Active || got.Error != "" {
			t.Errorf("%s: %+v, want pod %d, own %d, sandbox %d, hidden %t", name, got, r.pod.ID, r.own, r.sandbox.ID, c.hidden)
		}
	}
}

// TestFindPodRefused does not take another pod than the one that it is told to
// look for, nor a cgroup that is none.
func TestFindPodRefused(t *testing.T) {
	testutil.CheckLeaks(t)
	r := newTree(t, layouts["containerd, systemd, burstable"])
	got := r.find(t, seesOwn, "11111111-2222-3333-4444-555555555555", false)
	if !got.NoPod || !strings.Contains(got.Error, "the uid to look for is 11111111") {
		t.Errorf("with another uid: %+v", got)
	}
	r.leaf = r.top
	if got := r.find(t, seesAll, "", false); !got.NoPod || !strings.Contains(got.Error, filepath.Base(r.top.Path)) {
		t.Errorf("outside of a pod: %+v", got)
	}
}

// TestSandbox tells the sandbox from applications, where it can.
func TestSandbox(t *testing.T) {
	testutil.CheckLeaks(t)
	r := newTree(t, layouts["containerd, cgroupfs, burstable"])
	sandbox := r.run(t, r.sandbox)
	if got := r.find(t, seesOwn, "", false); got.Sandbox != r.sandbox.ID || got.Active {
		t.Errorf("alone: %+v, want sandbox %d, nothing else active", got, r.sandbox.ID)
	}
	app := r.run(t, r.app)
	if got := r.find(t, seesOwn, "", false); got.Sandbox != r.sandbox.ID || !got.Active {
		t.Errorf("with an application: %+v, want sandbox %d, active", got, r.sandbox.ID)
	}
	app.Process.Kill()
	app.Wait()
	if got := r.find(t, seesOwn, "", false); got.Active {
		t.Errorf("after the application: %+v, want nothing active", got)
	}
	// conmon is the runtime's own.
	r.run(t, r.pod.Child(t, "crio-conmon-"+id3+".scope"))
	if got := r.find(t, seesOwn, "", false); got.Active {
		t.Errorf("with a runtime's monitor: %+v, want nothing active", got)
	}
	// Two processes: not what only waits.
	r.run(t, r.sandbox)
	if got := r.find(t, seesOwn, "", false); got.Sandbox != 0 || !got.Active {
		t.Errorf("with two processes in the first container: %+v, want no sandbox", got)
	}
	sandbox.Process.Kill()
	sandbox.Wait()
}
