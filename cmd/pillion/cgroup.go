package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/pillion-project/pillion/loader"
	"golang.org/x/sys/unix"
)

// ownCgroup returns the directory of this process's cgroup in the v2 hierarchy
// mounted at root.
func ownCgroup(root string) (string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", fmt.Errorf("find own cgroup: %w", err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		// The v2 hierarchy has number 0 and no controllers.
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return filepath.Join(root, path), nil
		}
	}
	return "", errors.New("find own cgroup: this process is in no cgroup v2")
}

// commandCgroup is the cgroup of one command: all of its processes, and nobody
// else's.
type commandCgroup struct {
	path string
	dir  *os.File
}

// newCommandCgroup makes a cgroup beside ours. name is that of its instance.
func newCommandCgroup(root, name string) (*commandCgroup, error) {
	parent, err := ownCgroup(root)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(parent, loader.ExecCgroupPrefix+name)
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, fmt.Errorf("create a cgroup for the command: %w", err)
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the command's cgroup: %w", err), os.Remove(path))
	}
	return &commandCgroup{path: path, dir: dir}, nil
}

// leave moves what the command left running out of the cgroup, and returns what
// that is. They go on, uncaptured.
func (c *commandCgroup) leave() ([]string, error) {
	var left []string
	parent := filepath.Join(filepath.Dir(c.path), "cgroup.procs")
	// A process may fork while it is looked for, so until there is none.
	for range 100 {
		b, err := os.ReadFile(filepath.Join(c.path, "cgroup.procs"))
		if err != nil {
			return left, fmt.Errorf("list the command's processes: %w", err)
		}
		pids := strings.Fields(string(b))
		if len(pids) == 0 {
			return left, nil
		}
		for _, pid := range pids {
			err := os.WriteFile(parent, []byte(pid), 0)
			if err != nil && !errors.Is(err, unix.ESRCH) {
				return left, fmt.Errorf("move process %s out of the command's cgroup: %w", pid, err)
			}
			left = append(left, pid)
		}
	}
	return left, errors.New("the command's processes multiply faster than they can be moved")
}

// remove removes the cgroup and those that the command made below.
func (c *commandCgroup) remove() error {
	c.dir.Close()
	var dirs []string
	err := filepath.WalkDir(c.path, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	for n := len(dirs) - 1; n >= 0; n-- {
		err = errors.Join(err, os.Remove(dirs[n]))
	}
	if err != nil {
		return fmt.Errorf("remove the command's cgroup: %w", err)
	}
	return nil
}
