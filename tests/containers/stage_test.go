package containers

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/testutil"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// envNode makes this test binary the first process of a node: see stage.
	envNode = "PILLION_TEST_NODE"
	// shimName makes it the runtime that containerd calls where it sees v2 alone.
	shimName = "runc-unified"
)

func TestMain(m *testing.M) {
	var err error
	switch {
	case filepath.Base(os.Args[0]) == shimName:
		err = shim(os.Args[1:])
	case os.Getenv(envNode) != "":
		err = stage(strings.Split(os.Getenv(envNode), "|"))
	default:
		testutil.Main(m)
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// stage is the first process of new namespaces: it makes them a node's, starts a
// command, and waits for it, and for orphans. words are directory, view and command.
func stage(words []string) error {
	dir, view, command := words[0], words[1], words[2:]
	if err := furnish(view); err != nil {
		return err
	}
	env := append(os.Environ(), "TMPDIR="+dir)
	p, err := os.StartProcess(command[0], command, &os.ProcAttr{Env: env, Files: []*os.File{nil, os.Stdout, os.Stderr}})
	if err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("wait: %w", err)
		}
		if pid == p.Pid {
			return fmt.Errorf("%s ended: %v", command[0], status)
		}
	}
}

// furnish gives the namespaces what a node has, and hides what is the machine's.
func furnish(view string) error {
	mounts := []struct {
		from, to, kind string
		flags          uintptr
	}{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE},
		{"proc", "/proc", "proc", 0},
		{"tmpfs", "/run", "tmpfs", 0},
		{"tmpfs", "/var/lib", "tmpfs", 0},
		{"bpf", "/sys/fs/bpf", "bpf", 0},
	}
	for _, m := range mounts {
		if err := unix.Mount(m.from, m.to, m.kind, m.flags, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.to, err)
		}
	}
	if view == viewUnified {
		if err := unify(); err != nil {
			return err
		}
	}
	// As on a node of systemd's: a container may get mounts that are made later.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share mounts: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("raise lo: %w", err)
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
}

// unify puts v2 where a node without v1 has it.
func unify() error {
	for unix.Unmount(cgroupDir, unix.MNT_DETACH) == nil {
	}
	if err := unix.Mount("cgroup2", cgroupDir, "cgroup2", 0, ""); err != nil {
		return fmt.Errorf("mount cgroup v2: %w", err)
	}
	return nil
}

// shim is runc for a hierarchy that lacks the controllers of processor, memory and
// processes, since v1 has them: without the settings of these.
func shim(args []string) error {
	bundle, verb := ".", ""
	for i, a := range args {
		switch a {
		case "--bundle", "-b":
			bundle = args[i+1]
		case "create", "run", "update":
			if verb == "" {
				verb = a
			}
		}
	}
	switch verb {
	case "update":
		os.Exit(0)
	case "create", "run":
		if err := keepDevices(filepath.Join(bundle, "config.json")); err != nil {
			return err
		}
	}
	return unix.Exec("/usr/sbin/runc", append([]string{"runc"}, args...), os.Environ())
}

// keepDevices takes all resources but devices out of a bundle's configuration.
func keepDevices(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var c map[string]any
	if err := json.Unmarshal(b, &c); err != nil {
		return err
	}
	if l, ok := c["linux"].(map[string]any); ok {
		if r, ok := l["resources"].(map[string]any); ok {
			l["resources"] = map[string]any{"devices": r["devices"]}
		}
	}
	if b, err = json.Marshal(c); err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o600)
}
