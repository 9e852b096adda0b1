package probe

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// probeCgroup begins the name of the cgroup that is made for a moment.
const probeCgroup = "pillion-probe-"

// scope is the cgroup to look at: what the options say, or the root.
func (m *machine) scope() (dir, root string, err error) {
	root, err = m.cgroupRoot()
	if err != nil {
		return "", "", err
	}
	dir = root
	if m.cgroup != "" {
		dir = filepath.Clean(m.cgroup)
	}
	if dir != root && !strings.HasPrefix(dir, strings.TrimSuffix(root, "/")+"/") {
		return "", "", fmt.Errorf("%s is not below %s", dir, root)
	}
	return dir, root, nil
}

// checkAttach attaches every hook to an empty cgroup inside the scope, where it
// sees no socket, and removes it again. Below the scope, because a program that
// sits there without "multi" forbids others, and that is felt below only.
func checkAttach(ctx context.Context, m *machine) []Finding {
	const name = "attach"
	dir, _, err := m.scope()
	if errors.Is(err, ErrUnsupported) {
		return []Finding{noMount(name)}
	}
	if err != nil {
		return []Finding{failure(name, "name a cgroup of the v2 hierarchy", "%v", err)}
	}
	if !m.capabilities().enough() {
		return []Finding{m.unchecked(name, errors.New("the capabilities are missing"))}
	}
	tmp, err := os.MkdirTemp(dir, probeCgroup)
	if err != nil {
		return []Finding{cannotMake(name, dir, err)}
	}
	found := attachTo(ctx, m, tmp)
	// rmdir, never a recursive removal: it is empty, or somebody moved in.
	if err := unix.Rmdir(tmp); err != nil {
		found = append(found, warning(name, "rmdir "+tmp, "the cgroup of the probe is left: %v", err))
	}
	return append(found, checkNetnsAttach(m))
}

// cannotMake is no failure in itself: Pillion attaches to cgroups that exist.
// Only `pillion exec` makes its own.
func cannotMake(name, dir string, err error) Finding {
	if errors.Is(err, fs.ErrNotExist) {
		return failure(name, "name a cgroup that exists", "there is no cgroup %s", dir)
	}
	return warning(name, "mount the cgroup file system read-write (in a pod: a hostPath volume of /sys/fs/cgroup) and let this user make directories there, or ignore this",
		"not tried, since no cgroup can be made in %s (only `pillion exec` needs one): %v", dir, err)
}

func attachTo(ctx context.Context, m *machine, dir string) []Finding {
	const name = "attach"
	cgroup, err := os.Open(dir)
	if err != nil {
		return []Finding{warning(name, "look who removes cgroups", "not tried: %v", err)}
	}
	defer cgroup.Close()
	var found []Finding
	for _, h := range hooks {
		if err := ctx.Err(); err != nil {
			return append(found, warning(name, "run it again with more time", "not all checked: %v", err))
		}
		err := attachOne(h, int(cgroup.Fd()))
		switch {
		case err == nil:
		case errors.Is(err, unix.EPERM):
			found = append(found, failure(name+" "+h.name,
				m.whyDenied()+"; or detach the program that claims the hook of a cgroup above for itself (bpftool cgroup tree)", "%s", short(err)))
		default:
			found = append(found, failure(name+" "+h.name, "boot Linux 5.9 or later", "%s", short(err)))
		}
	}
	if len(found) == 0 {
		found = append(found, good(name, "every hook, to a cgroup in %s", filepath.Dir(dir)))
	}
	return found
}

// attachOne makes a link and takes it away. It does not fall back to attaching
// without one, since only links outlive the process by a pin.
func attachOne(h hook, cgroup int) error {
	p, err := load(h.typ, h.at, proceed())
	if err != nil {
		return fmt.Errorf("load: %w", err)
	}
	defer p.Close()
	l, err := link.AttachRawLink(link.RawLinkOptions{Target: cgroup, Program: p, Attach: h.at})
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	return l.Close()
}

// checkNetnsAttach attaches sk_lookup to a network namespace that exists only
// for it: in ours the program would see real packets.
func checkNetnsAttach(m *machine) Finding {
	const name = "attach sk_lookup"
	if !m.capabilities().has(capSysAdmin) {
		return good(name, "not tried: without CAP_SYS_ADMIN there is no namespace to try it in")
	}
	done := make(chan error, 1)
	go attachInNewNetns(done)
	err := <-done
	switch {
	case err == nil:
		return good(name, "to a network namespace")
	case errors.Is(err, errNoNetns):
		return warning(name, "allow unshare(2) in this process's seccomp profile, or ignore this", "not tried: %s", short(err))
	case errors.Is(err, unix.EPERM):
		return failure(name, m.whyDenied(), "%s", short(err))
	}
	return failure(name, "boot Linux 5.9 or later", "%s", short(err))
}

var errNoNetns = errors.New("make a network namespace")

// attachInNewNetns ends its goroutine without unlocking the thread, so that the
// runtime ends the thread, and the namespace with it.
func attachInNewNetns(done chan<- error) {
	runtime.LockOSThread()
	done <- attachHere()
}

func attachHere() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("%w: %w", errNoNetns, err)
	}
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return fmt.Errorf("%w: %w", errNoNetns, err)
	}
	defer ns.Close()
	p, err := load(ebpf.SkLookup, ebpf.AttachSkLookup, proceed())
	if err != nil {
		return fmt.Errorf("load: %w", err)
	}
	defer p.Close()
	l, err := link.AttachNetNs(int(ns.Fd()), p)
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	return l.Close()
}
