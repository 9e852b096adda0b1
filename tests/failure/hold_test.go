package failure

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// envHold has the test binary be the tracer of a thread, by its number.
const envHold = "PILLION_FAILURE_HOLD"

// hold stops a thread, and no other of its process, until what it returns is called. A
// process of its own does it: the parent of the thread's process waits for its end, and
// might take the news that it is stopped.
func hold(t *testing.T, tid int) (undo func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envHold+"="+strconv.Itoa(tid))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	undo = sync.OnceFunc(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("let thread %d go on: %v", tid, err)
		}
	})
	t.Cleanup(undo)
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatalf("stop thread %d: %v", tid, err)
	}
	return undo
}

// holdMain stops a thread, says so, and lets it go when its input ends.
func holdMain(number string) {
	runtime.LockOSThread() // whoever seizes it must let it go
	tid, err := strconv.Atoi(number)
	if err == nil {
		err = unix.PtraceSeize(tid)
	}
	if err == nil {
		err = unix.PtraceInterrupt(tid)
	}
	if err == nil {
		_, err = unix.Wait4(tid, nil, unix.WALL, nil)
	}
	if err == nil {
		_, err = fmt.Println()
	}
	if err == nil {
		_, _ = io.Copy(io.Discard, os.Stdin) // until whoever started it is done, or gone
		err = unix.PtraceDetach(tid)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "hold thread %d: %v\n", tid, err)
		os.Exit(1)
	}
}

// TestHold holds the first thread of a process that somebody waits for.
func TestHold(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it has ended or will
		<-ended
	})
	for range 20 {
		undo := hold(t, cmd.Process.Pid)
		if got := stateOf(t, cmd.Process.Pid); got != "t" {
			t.Errorf("it is in state %q, want t: stopped by a tracer", got)
		}
		undo()
		testutil.Eventually(t, rig.Limit, func() bool { return stateOf(t, cmd.Process.Pid) == "S" }, "it goes on")
	}
	select {
	case err := <-ended:
		ended <- err
		t.Errorf("whoever waits for its end takes a stop for that: %v", err)
	default:
	}
}

// stateOf is what ps calls a process's state.
func stateOf(t *testing.T, pid int) string {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return rest[:1]
}
