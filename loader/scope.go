package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Scope is whose sockets an instance captures: those that were made in a cgroup
// or below, in one network namespace.
type Scope struct {
	// Path is the cgroup's directory, absolute. Where it is hidden from this
	// process (see [FindPod]) it is that in the whole hierarchy, to be shown only.
	Path string
	// ID is the cgroup's id, as the kernel side sees it.
	ID uint64
	// Level is the cgroup's depth: 0 is the root of the hierarchy.
	Level uint32
	// Netns is the cookie of the calling thread's network namespace.
	Netns uint64
	// hidden is the directory if Path does not lead there; open for the life of
	// the process.
	hidden *os.File
}

// dir returns a path that leads to the cgroup from this process.
func (s *Scope) dir() string {
	if s.hidden == nil {
		return s.Path
	}
	// The dot makes it a directory to those who do not follow links.
	return "/proc/self/fd/" + strconv.Itoa(int(s.hidden.Fd())) + "/."
}

// Populated tells whether a process is in the cgroup or below it.
func (s *Scope) Populated() bool { return !CgroupEmpty(s.dir()) }

// ErrNoScope means that a cgroup does not exist, or is no cgroup v2.
var ErrNoScope = errors.New("no such cgroup")

// FindScope returns the scope of the cgroup at path in the namespace of the
// calling thread. root is where cgroup v2 is mounted.
func FindScope(root, path string) (Scope, error) {
	s := Scope{}
	abs, err := filepath.Abs(path)
	if err != nil {
		return s, fmt.Errorf("find cgroup %s: %w", path, err)
	}
	var st unix.Statfs_t
	switch err := unix.Statfs(abs, &st); {
	case errors.Is(err, unix.ENOENT):
		return s, fmt.Errorf("%w: %s", ErrNoScope, path)
	case err != nil:
		return s, fmt.Errorf("find cgroup %s: %w", path, err)
	case st.Type != unix.CGROUP2_SUPER_MAGIC:
		return s, fmt.Errorf("%w: %s is not in a cgroup v2 hierarchy (that is at %s)", ErrNoScope, path, root)
	}
	if info, err := os.Stat(abs); err == nil && !info.IsDir() {
		return s, fmt.Errorf("%w: %s is a file in one", ErrNoScope, path)
	}
	rel, err := filepath.Rel(root, abs)
	if err != nil || strings.HasPrefix(rel, "..") {
		return s, fmt.Errorf("%w: %s is not below %s", ErrNoScope, path, root)
	}
	s.Path = abs
	if rel != "." {
		s.Level = uint32(strings.Count(rel, "/") + 1)
	}
	if s.ID, err = cgroupID(abs); err != nil {
		return s, err
	}
	s.Netns, err = netnsCookie()
	return s, err
}

// cgroupID returns the id of the cgroup at path: the number of its inode, which
// cgroup v2 makes 64 bits wide for this.
func cgroupID(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("read id of cgroup %s: %w", path, err)
	}
	return st.Ino, nil
}

// netnsCookie names the calling thread's network namespace.
func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("read cookie of the network namespace: %w", err)
	}
	return cookie, nil
}

// kernfsHandle is the type of a file handle that holds a cgroup's id
// (FILEID_KERNFS in include/linux/exportfs.h).
const kernfsHandle = 0xfe

// cgroupPath finds a cgroup by its id, in the hierarchy mounted at root. It
// fails with [ErrNoScope] when there is none.
func cgroupPath(root string, id uint64) (string, error) {
	mount, err := os.Open(root)
	if err != nil {
		return "", fmt.Errorf("open %s: %w", root, err)
	}
	defer mount.Close()
	handle := unix.NewFileHandle(kernfsHandle, binary.NativeEndian.AppendUint64(nil, id))
	fd, err := unix.OpenByHandleAt(int(mount.Fd()), handle, unix.O_RDONLY|unix.O_CLOEXEC)
	if errors.Is(err, unix.ESTALE) || errors.Is(err, unix.ENOENT) {
		return "", fmt.Errorf("%w: id %d", ErrNoScope, id)
	}
	if errors.Is(err, unix.EPERM) {
		return searchCgroup(root, id)
	}
	if err != nil {
		return "", fmt.Errorf("open cgroup %d: %w", id, err)
	}
	defer unix.Close(fd)
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return "", fmt.Errorf("find cgroup %d: %w", id, err)
	}
	if strings.HasSuffix(path, " (deleted)") {
		return "", fmt.Errorf("%w: id %d", ErrNoScope, id)
	}
	// A handle also opens what lies above the part that is mounted at root, and
	// then the link does not tell its path.
	if n, err := cgroupID(path); err != nil || n != id {
		return "", fmt.Errorf("find cgroup %d: it is outside of %s", id, root)
	}
	return path, nil
}

// rootCgroup is the id of the root of the hierarchy.
const rootCgroup = 1

// searchCgroup is cgroupPath for a process without CAP_DAC_READ_SEARCH, which
// may not open by id. That there is none it only says when it sees all: in a
// cgroup namespace it does not.
func searchCgroup(root string, id uint64) (string, error) {
	found := ""
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err != nil || !e.IsDir() {
			return nil // it ended while we looked
		}
		if n, err := cgroupID(path); err == nil && n == id {
			found = path
			return fs.SkipAll
		}
		return nil
	})
	if found != "" {
		return found, nil
	}
	if err != nil {
		return "", fmt.Errorf("search cgroup %d: %w", id, err)
	}
	if n, err := cgroupID(root); err != nil || n != rootCgroup {
		return "", fmt.Errorf("search cgroup %d: %s does not show all: %w", id, root, unix.EPERM)
	}
	return "", fmt.Errorf("%w: id %d", ErrNoScope, id)
}

// processStart returns when a process started, in clock ticks since boot, which
// together with its number names it for good. It fails with os.ErrNotExist when
// there is no such process.
func processStart(pid int) (uint64, error) {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			err = os.ErrNotExist
		}
		return 0, fmt.Errorf("read process %d: %w", pid, err)
	}
	// The name stands in parentheses and may hold anything, also those.
	i := strings.LastIndexByte(string(stat), ')')
	fields := strings.Fields(string(stat[i+1:]))
	if i < 0 || len(fields) < 20 {
		return 0, fmt.Errorf("read process %d: unexpected form", pid)
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read process %d: %w", pid, err)
	}
	return start, nil
}
