package rig

import (
	"fmt"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// preferred is the nice value of an instance that is to have the processor when
// it needs it.
const preferred = -15

// Prefer gives an instance precedence over everything else on the machine. On a
// busy one it beats late otherwise, and connections are passed by: rightly, but
// not what a test of what relaying does wants to see.
func (i *Instance) Prefer(t testing.TB) {
	t.Helper()
	pid := i.Cmd.Process.Pid
	// A thread inherits the value of the one that starts it, which may be
	// before or after this list is read: the second time nothing is new.
	for range 2 {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Setpriority(unix.PRIO_PROCESS, tid, preferred); err != nil {
				t.Logf("give thread %d precedence: %v", tid, err)
			}
		}
	}
}
