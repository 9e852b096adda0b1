package loader

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Pod is the pod that this process is in one container of.
type Pod struct {
	// Scope is all of the pod: every container, also one that starts later.
	Scope Scope
	// Own is the id of the cgroup of this process's container.
	Own uint64
	// UID is the pod's, in lower-case hex digits without separators.
	UID string
	// Sandbox is the id of the cgroup of the container that holds the pod's
	// namespaces and does nothing else, or 0 where which one that is cannot be
	// known.
	Sandbox uint64
}

// PodOptions are what is known of a pod before it is looked for.
type PodOptions struct {
	// UID is the pod's, with or without separators: what is found must have it.
	// Empty: not known.
	UID string
	// First tells that no application runs in the pod yet: so what runs beside
	// this process is the sandbox.
	First bool
}

var (
	// ErrNoPod means that this process is in no pod, or that which one cannot be
	// told.
	ErrNoPod = errors.New("the pod's cgroup is not found")
	// ErrHidden means that this process may not look where the pod's cgroup is.
	ErrHidden = errors.New("own cgroups are hidden from this process")
)

// FindPod finds the cgroup of the pod that the calling thread is in: the nearest
// above its own that is named as Kubernetes's kubelet or podman name one. Neither
// /proc/self/cgroup nor a mount of the whole hierarchy is needed. It fails with
// [ErrNoPod] when there is none or it is not the one that o.UID says, and with
// [ErrHidden] when a privilege or a mount is missing.
func FindPod(o PodOptions) (Pod, error) {
	ids, err := ownAncestry()
	if err != nil {
		return Pod{}, fmt.Errorf("%w: %w", ErrHidden, err)
	}
	v, err := openView("/proc/thread-self/mountinfo", ids)
	if err != nil {
		return Pod{}, fmt.Errorf("%w: %w", ErrHidden, err)
	}
	defer v.close()
	return findPod(v, o)
}

func findPod(v *view, o PodOptions) (Pod, error) {
	at, err := findPodLevel(v.names)
	if err != nil {
		for n, name := range v.names[1:] {
			if name == "" {
				dir, why := v.open(n)
				if why == nil {
					dir.Close()
					why = os.ErrNotExist
				}
				return Pod{}, fmt.Errorf("%w: of the path %s some names cannot be read; that takes CAP_DAC_READ_SEARCH, or a mount of the node's /sys/fs/cgroup: %w", ErrHidden, pathOf(v.names), why)
			}
		}
		return Pod{}, err
	}
	if want := plainUID(o.UID); want != "" && want != at.uid {
		return Pod{}, fmt.Errorf("%w: in %s the nearest pod is %s, but the uid to look for is %s", ErrNoPod, pathOf(v.names), at.uid, o.UID)
	}
	p := Pod{UID: at.uid, Own: v.ids[at.level+1], Scope: Scope{ID: v.ids[at.level], Level: uint32(at.level)}}
	dir, err := v.open(at.level)
	if err != nil {
		return Pod{}, fmt.Errorf("%w: %w", ErrHidden, err)
	}
	if path := v.visible(at.level); path != "" && v.path != "" {
		p.Scope.Path = filepath.Join(v.path, path)
	} else {
		p.Scope.Path, p.Scope.hidden = pathOf(v.names[:at.level+1]), dir
	}
	if p.Scope.Netns, err = netnsCookie(); err == nil {
		err = p.check(dir)
	}
	if err == nil && (o.First || !at.crio) {
		p.Sandbox, err = oldest(dir, p.Own)
	}
	if err != nil || p.Scope.hidden == nil {
		dir.Close()
	}
	return p, err
}

// check proves that a hook at the pod's cgroup sees this process, in its network
// namespace and below its container.
func (p *Pod) check(dir *os.File) error {
	s, err := see(dir, int(p.Scope.Level))
	if err != nil {
		return fmt.Errorf("%w: look from the pod's cgroup %s: %w", ErrHidden, p.Scope.Path, err)
	}
	if want := (sight{netns: p.Scope.Netns, scope: p.Scope.ID, own: p.Own}); s != want {
		return fmt.Errorf("%w: a hook at %s sees network namespace %d, cgroups %d and %d of this process, want %d, %d and %d", ErrNoPod,
			p.Scope.Path, s.netns, s.scope, s.own, want.netns, want.scope, want.own)
	}
	return nil
}

// oldest returns the id of the first container that a pod was given, other than
// own, if it is one thread: runtimes begin with the sandbox, whose program only
// waits. The kernel numbers cgroups in the order in which they are made.
func oldest(pod *os.File, own uint64) (uint64, error) {
	children, err := containersOf(pod)
	if err != nil {
		return 0, err
	}
	first := uint64(0)
	idle := false
	for _, c := range children {
		if c.id != own && c.populated && (first == 0 || c.id < first) {
			first, idle = c.id, c.single
		}
	}
	if !idle {
		return 0, nil
	}
	return first, nil
}

// monitor is in the name of a cgroup of a runtime's own: conmon waits there for the
// end of a container.
const monitor = "-conmon-"

// child is a container of a pod.
type child struct {
	id        uint64
	populated bool // something runs in it
	single    bool // and that is one thread
}

// containersOf lists the cgroups right below a pod's.
func containersOf(pod *os.File) ([]child, error) {
	// A directory of its own: reading moves on in the one that we have.
	fd, err := unix.Openat(int(pod.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	dir := os.NewFile(uintptr(fd), "pod")
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	var all []child
	for _, name := range names {
		var st unix.Stat_t
		err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR || strings.Contains(name, monitor) {
			continue // a file, or a container that ended while we looked
		}
		c := child{id: st.Ino}
		events, err := readAt(fd, name+"/cgroup.events")
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look at a container: %w", err)
		}
		c.populated = bytes.Contains(events, []byte("populated 1"))
		// The threads of other namespaces count, as zeros.
		threads, err := readAt(fd, name+"/cgroup.threads")
		c.single = err == nil && bytes.Count(threads, []byte("\n")) == 1
		all = append(all, c)
	}
	return all, nil
}

// readAt reads a file below an open directory.
func readAt(dir int, name string) ([]byte, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	return io.ReadAll(f)
}

// Active tells whether a container of the pod has a process, other than this
// process's own and that of id sandbox (0: none).
func (p *Pod) Active(sandbox uint64) (bool, error) {
	dir, err := os.Open(p.Scope.dir())
	if err != nil {
		return false, fmt.Errorf("open the pod's cgroup: %w", err)
	}
	defer dir.Close()
	all, err := containersOf(dir)
	for _, c := range all {
		if c.populated && c.id != p.Own && c.id != sandbox {
			return true, err
		}
	}
	return false, err
}
