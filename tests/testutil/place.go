package testutil

import (
	"fmt"
	"io"
	"os/exec"
	"syscall"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Place says where a process is started. The zero value is: here.
type Place struct {
	// NS is the network namespace, nil for the test's own.
	NS *NS
	// Cgroup is the cgroup that the process is born in, nil for the test's
	// own. Its first instruction already runs there.
	Cgroup *Cgroup
	// Caps, when Limited, are all the capabilities that the process has
	// and can get, for example unix.CAP_BPF. It stays uid 0.
	Caps    []uintptr
	Limited bool
	// Nice is the process's nice value, where the test may give it: that of
	// precedence needs CAP_SYS_NICE.
	Nice int
}

// With returns a copy of p that limits the process to the given capabilities.
func (p Place) With(caps ...uintptr) Place {
	p.Caps, p.Limited = caps, true
	return p
}

// Start starts cmd at p. The caller waits for cmd. cmd must not set Pdeathsig:
// the thread that starts it does not live on.
func (p Place) Start(cmd *exec.Cmd) error {
	return onThread(func() error {
		if p.NS != nil {
			if err := netns.Set(p.NS.handle); err != nil {
				return fmt.Errorf("enter network namespace: %w", err)
			}
		}
		if p.Cgroup != nil {
			if cmd.SysProcAttr == nil {
				cmd.SysProcAttr = &syscall.SysProcAttr{}
			}
			cmd.SysProcAttr.UseCgroupFD = true
			cmd.SysProcAttr.CgroupFD = p.Cgroup.FD()
		}
		if p.Nice != 0 {
			// Of this thread.
			if err := unix.Setpriority(unix.PRIO_PROCESS, 0, p.Nice); err != nil && err != unix.EACCES {
				return fmt.Errorf("set the nice value: %w", err)
			}
		}
		if p.Limited {
			if err := limitCaps(p.Caps); err != nil {
				return err
			}
		}
		return cmd.Start()
	})
}

// limitCaps takes everything but keep out of the thread's bounding set, which
// is what a root process gets its capabilities from when it is executed.
func limitCaps(keep []uintptr) error {
	kept := map[uintptr]bool{}
	for _, c := range keep {
		kept[c] = true
	}
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		if kept[c] {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if err == unix.EINVAL {
			// The kernel is older than our list and ends here.
			break
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	// What is inheritable survives an execve past the bounding set.
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("clear inheritable capabilities: %w", err)
	}
	return nil
}

// Pipes returns what goes to a command that is not started yet, and what comes from it.
func Pipes(t testing.TB, cmd *exec.Cmd) (in io.WriteCloser, out io.ReadCloser) {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if out, err = cmd.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	return in, out
}
