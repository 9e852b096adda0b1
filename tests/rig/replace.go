package rig

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/testutil"
)

// Replace has a process of another build take the instance over, and waits until the
// one before has ended, without an error, and the other is ready.
func (i *Instance) Replace(t testing.TB, binary string) {
	t.Helper()
	i.Succeeded(t, i.Successor(t, binary))
}

// succeeds starts a process of the binary, and waits until the one before has ended.
func (i *Instance) succeeds(t testing.TB, binary string) *exec.Cmd {
	t.Helper()
	cmd := i.Successor(t, binary)
	i.left(t, cmd)
	return cmd
}

// left waits until the process before cmd has ended.
func (i *Instance) left(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	select {
	case <-i.done:
	case <-time.After(Limit):
		cmd.Process.Kill()
		t.Fatalf("the process before does not end\n%s", i.log)
	}
}

// Succeeded waits until a process of [Instance.Successor] has the instance, and the one
// before has ended without an error.
func (i *Instance) Succeeded(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	i.left(t, cmd)
	if i.err != nil {
		t.Fatalf("the process before ended: %v\n%s", i.err, i.log)
	}
	i.await(t, cmd)
}

// Contend is Replace where either process may end as the one that runs the instance. It
// tells whether the other one does. The one that does not
// must end: the one before without an error.
func (i *Instance) Contend(t testing.TB, binary string) (replaced bool) {
	t.Helper()
	before, after := i.done, make(chan struct{})
	cmd := i.Successor(t, binary)
	failed := make(chan error, 1)
	go func() { failed <- cmd.Wait(); close(after) }()
	select {
	case <-failed:
		return false
	case <-before:
	case <-time.After(Limit):
		cmd.Process.Kill()
		<-after
		t.Fatalf("neither process ends\n%s", i.log)
	}
	if i.err != nil {
		t.Fatalf("the process before ended: %v\n%s", i.err, i.log)
	}
	i.Cmd, i.done = cmd, make(chan struct{})
	go func(done chan<- struct{}) { i.err = <-failed; close(done) }(i.done)
	return true
}

// await makes cmd the process of the instance, when it is ready.
func (i *Instance) await(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	after := make(chan struct{})
	i.Cmd, i.done = cmd, after
	go i.wait(cmd, after)
	testutil.Eventually(t, Limit, func() bool {
		select {
		case <-after:
			t.Fatalf("the process that takes over ended: %v\n%s", i.err, i.log)
		default:
		}
		s, err := i.Status(context.Background())
		return err == nil && (s.Pid == cmd.Process.Pid || parent(s.Pid) == cmd.Process.Pid) && s.Ready && s.State == admin.StateServing
	}, "the process that takes over is ready\n", i.log)
}

// Successor starts a process that is to take the instance over, with more flags. The
// caller waits for it.
func (i *Instance) Successor(t testing.TB, binary string, flags ...string) *exec.Cmd {
	t.Helper()
	line := slices.Concat(i.rig.Wrap, []string{binary}, i.args, []string{"--take-over"}, flags)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Env = append(os.Environ(), i.rig.Env...)
	cmd.Stdout, cmd.Stderr = i.log, i.log
	if err := i.rig.home().Start(cmd); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// Inherits is Replace for a process before that is killed meanwhile.
func (i *Instance) Inherits(t testing.TB, binary string) {
	t.Helper()
	i.await(t, i.succeeds(t, binary))
}

// parent returns the parent of a process: of one that has a keeper, that.
func parent(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The name may have anything in it, and ends with the last parenthesis.
	var state string
	var ppid int
	fmt.Sscan(string(b[bytes.LastIndexByte(b, ')')+1:]), &state, &ppid)
	return ppid
}
