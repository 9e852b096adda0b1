package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf/link"
	"github.com/pillion-project/pillion/bpf"
)

// Found is an instance whose pins exist.
type Found struct {
	Name string
	Kind Kind
	// Running tells whether a process holds it.
	Running bool
	// Pid is the process that made it.
	Pid int
	// Cgroup is its scope's path, empty when that is gone.
	Cgroup string
	// Problem says what is wrong with its pins, or is empty.
	Problem string
}

// List returns every instance. cgroups is where cgroup v2 is mounted.
func List(bpffs, cgroups string) ([]Found, error) {
	entries, err := os.ReadDir(pinRoot(bpffs))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list instances: %w", err)
	}
	var all []Found
	for _, e := range entries {
		name := instanceOf(e.Name())
		if !e.IsDir() || CheckName(name) != nil {
			continue
		}
		all = append(all, look(bpffs, cgroups, name))
	}
	return all, nil
}

func look(bpffs, cgroups, name string) Found {
	f := Found{Name: name}
	i, err := lookAt(bpffs, name, &f.Running)
	if err != nil {
		f.Problem = err.Error()
		return f
	}
	f.Kind, f.Pid = Kind(i.Kind), int(i.Pid)
	if i.Families == 0 && !f.Running {
		f.Problem = ErrIncomplete.Error()
	}
	f.Cgroup, _ = cgroupPath(cgroups, i.Cgroup)
	return f
}

// lookAt reads the record of an instance, and whether a process runs it. It has the
// lock on all instances: see lockInstance.
func lookAt(bpffs, name string, running *bool) (bpf.Instance, error) {
	root, err := lockDir(pinRoot(bpffs), true)
	if err != nil {
		return bpf.Instance{}, err
	}
	defer root.unlock()
	path := pinDir(bpffs, name)
	held, err := lockDir(path, false)
	switch {
	case errors.Is(err, ErrInUse):
		*running = true
		held = &dir{path: path}
	case err != nil:
		return bpf.Instance{}, err
	default:
		defer held.unlock()
	}
	m, i, err := readInstance(held)
	if err != nil {
		return i, err
	}
	return i, m.Close()
}

// Remove ends an instance in any state that no process runs: it fails with
// [ErrInUse] if one does, and with [ErrNotFound].
func Remove(bpffs, cgroups, name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	err := removeIf(bpffs, cgroups, name, func(*dir, *bpf.Instance) bool { return true })
	removeRoot(bpffs)
	return err
}

// removeIf removes an instance that nobody runs, if its record is as it must
// be. One without a readable record is removed too: its maker died before
// anything was attached.
func removeIf(bpffs, cgroups, name string, want func(*dir, *bpf.Instance) bool) error {
	if _, err := os.Stat(pinRoot(bpffs)); err != nil {
		return fmt.Errorf("%w: %s", ErrNotFound, name)
	}
	root, err := lockRoot(bpffs)
	if err != nil {
		return err
	}
	defer root.unlock()
	held, err := lockDir(pinDir(bpffs, name), false)
	if err != nil {
		return err
	}
	defer held.unlock()
	m, i, err := readInstance(held)
	if errors.Is(err, ErrIncomplete) {
		return held.remove(nil)
	}
	if err != nil {
		return fmt.Errorf("instance %s: %w", name, err)
	}
	m.Close()
	if !want(held, &i) {
		return nil
	}
	return removeAll(held, cgroups, &i)
}

// removeAll takes away what a dead process left: pins, routes, and the cgroup
// of a command that has ended.
func removeAll(held *dir, cgroups string, i *bpf.Instance) error {
	return held.remove(func() error {
		var errs []error
		if cookie, err := netnsCookie(); err == nil && cookie == i.Netns {
			errs = append(errs, removeRoutes(filepath.Dir(held.path), i))
		}
		if Kind(i.Kind) == KindExec {
			path, err := cgroupPath(cgroups, i.Cgroup)
			// Only what Pillion itself would have called so.
			if err == nil && strings.HasPrefix(filepath.Base(path), ExecCgroupPrefix) {
				errs = append(errs, removeCgroup(path))
			}
		}
		return errors.Join(errs...)
	})
}

// removeCgroup removes a cgroup and those that its processes made below.
func removeCgroup(path string) error {
	var dirs []string
	err := filepath.WalkDir(path, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("list the cgroups of a command: %w", err)
	}
	for _, dir := range slices.Backward(dirs) {
		if err := os.Remove(dir); err != nil {
			return fmt.Errorf("remove the cgroup of a command: %w", err)
		}
	}
	return nil
}

// removeRoutes takes the routes of a dead instance away. A range that was only
// about to be claimed may be another's: one in the same directory of pins, whose
// lock is held, is on record there; of any other the handler listens.
func removeRoutes(root string, i *bpf.Instance) error {
	if i.Families == 0 && claimed(root, i) {
		return nil
	}
	n, err := openNetwork()
	if err != nil {
		return err
	}
	defer n.close()
	r := rangeOf(i)
	if i.Families == 0 {
		taken := false
		err := n.listening(func(s *socket) {
			a := s.local.Addr()
			taken = taken || r.prefix4().Contains(a) || r.prefix6().Contains(a)
		})
		if err != nil || taken {
			return err
		}
	}
	return n.removeRoutes(r)
}

// claimed tells whether an instance that is all there has the range that i was about
// to claim.
func claimed(root string, i *bpf.Instance) bool {
	pins, _ := filepath.Glob(filepath.Join(root, "*", instancePin))
	for _, pin := range pins {
		m, other, err := readRecord(pin)
		if errors.Is(err, ErrABI) {
			return true // or it is; what is left then, the next start removes
		}
		if err != nil {
			continue // not begun
		}
		m.Close()
		if other.Families != 0 && other.Netns == i.Netns && other.Slot6 == i.Slot6 {
			return true
		}
	}
	return false
}

// ExecCgroupPrefix begins the names of the cgroups that are made for commands.
const ExecCgroupPrefix = "pillion-"

// Sweep removes the instances that are provably dead and ours: those around a
// command whose maker is gone and whose cgroup is empty or gone, standing ones
// whose cgroup is gone, or empty with their network namespace gone, and those that
// were never finished. It returns their
// names.
func Sweep(bpffs, cgroups string) ([]string, error) {
	found, err := List(bpffs, cgroups)
	if err != nil {
		return nil, err
	}
	var swept []string
	var errs []error
	for _, f := range found {
		if f.Running {
			continue
		}
		removed := false
		err := removeIf(bpffs, cgroups, f.Name, func(held *dir, i *bpf.Instance) bool {
			// Nobody holds it, so whoever was to finish it is gone.
			removed = i.Families == 0 || dead(held, cgroups, i)
			return removed
		})
		switch {
		case errors.Is(err, ErrInUse), errors.Is(err, ErrNotFound), errors.Is(err, ErrABI):
			// Taken up or removed meanwhile, or not ours to judge.
		case err != nil:
			errs = append(errs, fmt.Errorf("sweep %s: %w", f.Name, err))
		case removed:
			swept = append(swept, f.Name)
		}
	}
	return swept, errors.Join(errs...)
}

func dead(held *dir, cgroups string, i *bpf.Instance) bool {
	path, err := cgroupPath(cgroups, i.Cgroup)
	if errors.Is(err, ErrNoScope) {
		return true
	}
	if err != nil {
		return false
	}
	if Kind(i.Kind) != KindExec {
		// podman leaves the cgroups of pods that it removes.
		return CgroupEmpty(path) && netnsGone(held)
	}
	start, err := processStart(int(i.Pid))
	if err == nil && start == i.PidStart {
		return false
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false
	}
	return CgroupEmpty(path)
}

// netnsGone tells whether the network namespace of an instance is gone: the link to
// it then leads nowhere.
func netnsGone(held *dir) bool {
	l, err := link.LoadPinnedLink(held.pin(linkPrefix+bpf.ProgLookup), nil)
	if err != nil {
		return false
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return false
	}
	ns := info.NetNs()
	return ns != nil && ns.NetnsInode == 0
}

// CgroupEmpty tells whether no process is in a cgroup or below it.
func CgroupEmpty(path string) bool {
	b, err := os.ReadFile(filepath.Join(path, "cgroup.events"))
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	return strings.Contains(string(b), "populated 0")
}
