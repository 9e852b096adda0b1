package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// BPFFS is where the system keeps pins.
const BPFFS = "/sys/fs/bpf"

// pinRoot is the directory of all instances.
func pinRoot(bpffs string) string { return filepath.Join(bpffs, "pillion") }

// pinDir is where the pins of an instance are. The bpf file system keeps dots in names
// for itself (EPERM), and units have them: a colon, which no name has, stands for one.
func pinDir(bpffs, name string) string {
	return filepath.Join(pinRoot(bpffs), strings.ReplaceAll(name, ".", ":"))
}

// instanceOf returns whose pins are in a directory.
func instanceOf(path string) string {
	return strings.ReplaceAll(filepath.Base(path), ":", ".")
}

var (
	// ErrInUse means that a process runs the instance.
	ErrInUse = errors.New("the instance is running")
	// ErrExists means that the instance was made before.
	ErrExists = errors.New("the instance exists")
	// ErrNotFound means that there is no such instance.
	ErrNotFound = errors.New("no such instance")
	// ErrIncomplete means that whoever made the instance did not get to the
	// end. Remove it and make it anew.
	ErrIncomplete = errors.New("the instance is incomplete")
	// ErrABI means that the pins are of another version of Pillion.
	ErrABI = errors.New("the pins have another layout")
	// ErrOtherScope means that the instance is of another cgroup or network
	// namespace.
	ErrOtherScope = errors.New("the instance has another scope")
	// ErrNoBPFFS means that there is no directory for the bpf file system.
	ErrNoBPFFS = errors.New("no bpf file system")
	// ErrName means that a name cannot be that of an instance.
	ErrName = errors.New("want 1 to 64 letters, digits, dots, dashes, underscores or @, not starting with a dot")
)

var nameForm = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._@-]{0,63}$`)

// CheckName fails with [ErrName] when an instance cannot be called so.
func CheckName(name string) error {
	if !nameForm.MatchString(name) {
		return fmt.Errorf("instance name %q: %w", name, ErrName)
	}
	return nil
}

// mountBPFFS makes sure that a bpf file system is mounted. It fails with ENOTEMPTY where
// something else is.
func mountBPFFS(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%w: %s is not there; in a pod, mount the node's %s there: a hostPath volume with mountPropagation: HostToContainer", ErrNoBPFFS, dir, BPFFS)
	} else if err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	if st.Type == unix.BPF_FS_MAGIC {
		return nil
	}
	// A name that was mistaken is not to hide what is there.
	if all, err := os.ReadDir(dir); err != nil || len(all) > 0 {
		return fmt.Errorf("mount the bpf file system on %s: want an empty directory, it has %d files: %w", dir, len(all), errors.Join(err, unix.ENOTEMPTY))
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	err := unix.Mount("bpf", dir, "bpf", flags, "mode=0700")
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("mount the bpf file system on %s, which takes CAP_SYS_ADMIN, or in a pod a hostPath volume with mountPropagation: HostToContainer: %w", dir, err)
	}
	if err != nil {
		return fmt.Errorf("mount the bpf file system on %s: %w", dir, err)
	}
	return nil
}

// dir is a locked directory of pins. The lock is the kernel's, so it ends with
// the process however that ends.
type dir struct {
	path string
	file *os.File
}

// lockDir opens a directory and locks it. It fails with [ErrInUse] when another
// process has, unless wait is set.
func lockDir(path string, wait bool) (*dir, error) {
	for {
		f, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%w: %s", ErrNotFound, instanceOf(path))
		}
		if err != nil {
			return nil, fmt.Errorf("open pins: %w", err)
		}
		how := unix.LOCK_EX
		if !wait {
			how |= unix.LOCK_NB
		}
		if err := unix.Flock(int(f.Fd()), how); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("%w: %s", ErrInUse, instanceOf(path))
			}
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		// It may have been removed, and made again, before we had the lock.
		if same(f, path) {
			return &dir{path: path, file: f}, nil
		}
		f.Close()
	}
}

// lockInstance locks the pins of an instance for a process that is to run it. Others
// hold them for moments, to look at them or to sweep, and only with the directory
// of all instances locked: so what is locked while we have that one is run.
func lockInstance(bpffs, name string) (*dir, error) {
	path := pinDir(bpffs, name)
	held, err := lockDir(path, false)
	if !errors.Is(err, ErrInUse) {
		return held, err
	}
	root, err := lockDir(pinRoot(bpffs), true)
	if err != nil {
		return nil, err
	}
	defer root.unlock()
	return lockDir(path, false)
}

func same(f *os.File, path string) bool {
	now, err := os.Stat(path)
	return err == nil && (&dir{file: f}).is(now)
}

// is tells whether d is what was found at its path.
func (d *dir) is(now os.FileInfo) bool {
	then, err := d.file.Stat()
	return err == nil && os.SameFile(now, then)
}

// lockRoot makes and locks the directory of all instances. Whoever creates, removes
// or looks at one holds it, for moments.
func lockRoot(bpffs string) (*dir, error) {
	root := pinRoot(bpffs)
	for {
		err := os.Mkdir(root, 0o700)
		if errors.Is(err, unix.EACCES) && strings.HasPrefix(root, "/sys/") {
			return nil, fmt.Errorf("create %s: in a container, AppArmor's usual profile lets nobody write below /sys: mount the node's %s elsewhere, and name that with --bpffs: %w", root, BPFFS, err)
		}
		if err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("create %s: %w", root, err)
		}
		locked, err := lockDir(root, true)
		if errors.Is(err, ErrNotFound) {
			continue // the last instance went, and took it along
		}
		if err != nil {
			return nil, err
		}
		// The modes of a directory that somebody else made are not ours.
		if err := checkPrivate(root); err != nil {
			locked.unlock()
			return nil, err
		}
		return locked, nil
	}
}

func checkPrivate(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fmt.Errorf("look at %s: %w", path, err)
	}
	if uid := os.Geteuid(); int(st.Uid) != uid || st.Mode&0o077 != 0 {
		return fmt.Errorf("%s: owner %d, mode %o: want one that only uid %d can enter", path, st.Uid, st.Mode&0o777, uid)
	}
	return nil
}

// removeRoot removes the directory of all instances if there is none.
func removeRoot(bpffs string) {
	root, err := lockRoot(bpffs)
	if err != nil {
		return
	}
	defer root.unlock()
	_ = os.Remove(root.path) // ENOTEMPTY: there is one
}

// unlock lets go of the directory.
func (d *dir) unlock() {
	if d.file != nil { // nil: the lock is another process's still
		d.file.Close()
	}
}

// pin returns the path of a pin.
func (d *dir) pin(name string) string { return filepath.Join(d.path, name) }

// Pins of links stand beside those of maps, under the name of their program.
const linkPrefix = "link_"

// remove takes every pin and the directory away: links first, and of those
// connect before all, so that nothing is redirected to what is gone; the record
// last, so that whoever finds the rest knows what it belongs to. release, if it
// is not nil, takes away what is no pin, while the record still tells of it; if
// it fails, the record stays for the next try.
func (d *dir) remove(release func() error) error {
	entries, err := os.ReadDir(d.path)
	gone := errors.Is(err, os.ErrNotExist) // somebody was faster; the rest is to go too
	if err != nil && !gone {
		return fmt.Errorf("list pins: %w", err)
	}
	var errs []error
	for pass := range passes {
		if pass == passMaps && release != nil {
			if err := release(); err != nil {
				return errors.Join(append(errs, err)...)
			}
		}
		for _, e := range entries {
			if removeIn(e.Name()) == pass {
				errs = append(errs, os.Remove(d.pin(e.Name())))
			}
		}
	}
	if !gone {
		errs = append(errs, os.Remove(d.path))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}

// The order in which pins are removed.
const (
	passConnect = iota
	passLinks
	passMaps
	passRecord
	passes
)

func removeIn(name string) (pass int) {
	switch {
	case strings.HasPrefix(name, linkPrefix+"pl_connect"):
		return passConnect
	case strings.HasPrefix(name, linkPrefix):
		return passLinks
	case name == instancePin:
		return passRecord
	default:
		return passMaps
	}
}
