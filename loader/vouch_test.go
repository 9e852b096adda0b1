package loader

import (
	"context"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// shared is a futex in memory that is like a map's.
func shared(t *testing.T) *uint32 {
	t.Helper()
	page, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(page) })
	return (&sharedState{page: page}).owner()
}

// TestVouch has a thread that vouches, and ends.
func TestVouch(t *testing.T) {
	futex := shared(t)
	ctx, cancel := context.WithCancel(t.Context())
	end := make(chan error)
	go func() { end <- vouch(ctx, futex) }()
	testutil.Eventually(t, 10*time.Second, func() bool { return atomic.LoadUint32(futex) != 0 }, "it is owned")
	if got := atomic.LoadUint32(futex); got&bpf.OwnerDied != 0 {
		t.Errorf("%#x while it is owned", got)
	}
	cancel()
	if err := <-end; err != nil {
		t.Fatal(err)
	}
	if got := atomic.LoadUint32(futex); got != 0 {
		t.Errorf("%#x afterwards", got)
	}
}

// TestVouchDeath has a thread that ends while it vouches.
func TestVouchDeath(t *testing.T) {
	futex := shared(t)
	list := newRobust(futex)
	failed := make(chan error, 1)
	// The thread ends with the goroutine that was locked to it for good, but not
	// the first one, which is kept until another has been had.
	var end func()
	end = func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			go end()
			<-t.Context().Done()
			runtime.UnlockOSThread()
			return
		}
		err := setRobust(uintptr(unsafe.Pointer(list)))
		atomic.StoreUint32(futex, uint32(unix.Gettid()))
		failed <- err
	}
	go end()
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, 10*time.Second, func() bool { return atomic.LoadUint32(futex) == bpf.OwnerDied }, "the kernel says that it died")
	runtime.KeepAlive(list)
}
