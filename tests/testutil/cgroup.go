package testutil

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupLimit is how long the processes in a cgroup have to be gone after they
// were killed.
const cgroupLimit = 10 * time.Second

// Cgroup is a cgroup of the v2 hierarchy, made for one test.
type Cgroup struct {
	// Path is absolute.
	Path string
	// ID is what bpf_get_current_cgroup_id returns for a process inside.
	ID  uint64
	dir *os.File
}

// CgroupRoot returns where the v2 hierarchy is mounted, which on a machine with
// both is not /sys/fs/cgroup. It skips the test, or fails it under
// PILLION_REQUIRE_ROOT=1, when there is none.
func CgroupRoot(t testing.TB) string {
	t.Helper()
	root, err := findCgroup2("/proc/self/mounts")
	if err != nil {
		missing(t, "needs cgroup v2: %v", err)
	}
	return root
}

func findCgroup2(mounts string) (string, error) {
	f, err := os.Open(mounts)
	if err != nil {
		return "", fmt.Errorf("read mounts: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if w := strings.Fields(lines.Text()); len(w) > 2 && w[2] == "cgroup2" {
			return w[1], nil
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("read mounts: %w", err)
	}
	return "", errors.New("no cgroup2 mount")
}

// NewCgroup makes a cgroup below the root of the v2 hierarchy. It ends with the
// test, and so does every process that is in it then.
func NewCgroup(t testing.TB) *Cgroup {
	t.Helper()
	RequireRoot(t)
	path, err := os.MkdirTemp(CgroupRoot(t), uniqueName(t)+"-")
	if err != nil {
		t.Fatalf("create cgroup: %v", err)
	}
	return openCgroup(t, path)
}

// Child makes a cgroup inside c.
func (c *Cgroup) Child(t testing.TB, name string) *Cgroup {
	t.Helper()
	path := filepath.Join(c.Path, name)
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatalf("create cgroup: %v", err)
	}
	return openCgroup(t, path)
}

func openCgroup(t testing.TB, path string) *Cgroup {
	t.Helper()
	c := &Cgroup{Path: path}
	t.Cleanup(func() {
		if err := c.remove(); err != nil {
			t.Errorf("remove cgroup: %v", err)
		}
	})
	if err := c.open(); err != nil {
		t.Fatalf("open cgroup: %v", err)
	}
	return c
}

func (c *Cgroup) open() (err error) {
	if c.dir, err = os.Open(c.Path); err != nil {
		return err
	}
	h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, c.Path, 0)
	if err != nil {
		return fmt.Errorf("read id of %s: %w", c.Path, err)
	}
	c.ID = binary.NativeEndian.Uint64(h.Bytes())
	return nil
}

// Renew removes the cgroup, which must be empty, and makes it again: the same
// path, and another cgroup.
func (c *Cgroup) Renew(t testing.TB) {
	t.Helper()
	c.dir.Close()
	err := os.Remove(c.Path)
	if err == nil {
		err = os.Mkdir(c.Path, 0o755)
	}
	if err == nil {
		err = c.open()
	}
	if err != nil {
		t.Fatalf("renew cgroup: %v", err)
	}
}

// FD returns the descriptor of the cgroup's directory, which c keeps and closes.
func (c *Cgroup) FD() int { return int(c.dir.Fd()) }

// Pids returns the processes that are in c itself, not in its children.
func (c *Cgroup) Pids() ([]string, error) {
	b, err := os.ReadFile(filepath.Join(c.Path, "cgroup.procs"))
	if err != nil {
		return nil, fmt.Errorf("read processes: %w", err)
	}
	return strings.Fields(string(b)), nil
}

// Kill ends every process in c and in its children, and waits until they are
// gone.
func (c *Cgroup) Kill() error {
	if err := os.WriteFile(filepath.Join(c.Path, "cgroup.kill"), []byte("1"), 0); err != nil {
		return fmt.Errorf("kill processes of %s: %w", c.Path, err)
	}
	return c.waitEmpty(cgroupLimit)
}

// Empty tells whether no process is left in c or its children.
func (c *Cgroup) Empty() (bool, error) {
	b, err := os.ReadFile(filepath.Join(c.Path, "cgroup.events"))
	if err != nil {
		return false, fmt.Errorf("read state of cgroup: %w", err)
	}
	return strings.Contains(string(b), "populated 0"), nil
}

// waitEmpty waits for the event that the kernel raises on cgroup.events when
// the last process is gone.
func (c *Cgroup) waitEmpty(limit time.Duration) error {
	fd, err := unix.Open(filepath.Join(c.Path, "cgroup.events"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open state of cgroup: %w", err)
	}
	defer unix.Close(fd)
	for end := time.Now().Add(limit); ; {
		buf := make([]byte, 256)
		n, err := unix.Pread(fd, buf, 0)
		if err != nil {
			return fmt.Errorf("read state of cgroup: %w", err)
		}
		if strings.Contains(string(buf[:n]), "populated 0") {
			return nil
		}
		left := time.Until(end)
		if left <= 0 {
			return fmt.Errorf("processes in %s after %v", c.Path, limit)
		}
		ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}
		if _, err := unix.Poll(ready, int(left.Milliseconds())+1); err != nil && err != unix.EINTR {
			return fmt.Errorf("wait for cgroup: %w", err)
		}
	}
}

// remove ends what is in c and removes it with the cgroups below, deepest
// first. It is no error if somebody else removed it before.
func (c *Cgroup) remove() error {
	if c.dir != nil {
		defer c.dir.Close()
	}
	if err := c.Kill(); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	var dirs []string
	err := filepath.WalkDir(c.Path, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	for i := len(dirs) - 1; i >= 0; i-- {
		err = errors.Join(err, os.Remove(dirs[i]))
	}
	return err
}
