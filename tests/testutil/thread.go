package testutil

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// onThread runs f on an operating-system thread of its own, which is ended
// afterwards: whatever f did to the thread (namespace, capabilities) ends with
// it. A process that f starts lives on, unless it has a Pdeathsig.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go runLocked(f, done)
	return <-done
}

// runLocked is onThread's goroutine. It ends without UnlockOSThread, which is
// what makes the Go runtime end the thread.
func runLocked(f func() error, done chan<- error) {
	runtime.LockOSThread()
	err := errGoexit
	// Deferred, so that a t.FailNow in f does not leave onThread waiting.
	defer func() { done <- err }()
	err = f()
}

// Pin keeps the calling thread on one processor, the same for all who call it. The
// cookies of sockets follow each other there (each processor has 4096 at a time: the
// kernel's COOKIE_LOCAL_BATCH), so that no two have one cell. The goroutine is locked to
// its thread.
func Pin() error {
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return err
	}
	for cpu := 0; one.Count() == 0; cpu++ {
		if all.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	return unix.SchedSetaffinity(0, &one)
}
