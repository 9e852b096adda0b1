package testutil

import "runtime"

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
