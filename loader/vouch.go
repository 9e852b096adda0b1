package loader

import (
	"context"
	"fmt"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Vouch lets the kernel tell the hooks when this process dies, until ctx is
// done. They would find out by themselves when its last listener is closed, but
// that may be tens of milliseconds later, in which a dead process is sent
// connections. It keeps one thread.
func (d *Datapath) Vouch(ctx context.Context) error {
	if err := vouch(ctx, d.state.owner()); err != nil {
		// They still find out.
		d.options.Log.Warn("the kernel does not tell when this process dies", "error", err)
	}
	return nil
}

// robust is the list of one robust futex, as in include/uapi/linux/futex.h:
// struct robust_list_head, and the only entry of its list. The futex itself is
// somewhere else, at an offset from the entry.
type robust struct {
	first   uintptr // the entry
	offset  uintptr // modulo 2^64
	pending uintptr // 0
	entry   uintptr // the next one: the head
}

const robustHeadSize = unsafe.Offsetof(robust{}.entry)

// vouch owns a futex until ctx is done. The kernel goes through the list of each
// thread as it ends, before the files of the process are closed, and sets
// FUTEX_OWNER_DIED in what the thread owns. The futex belongs to no lock: nobody
// waits for it.
func vouch(ctx context.Context, futex *uint32) error {
	// Its own, or the thread could end with somebody else's goroutine.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var old, size uintptr
	if _, _, e := unix.RawSyscall(unix.SYS_GET_ROBUST_LIST, 0, uintptr(unsafe.Pointer(&old)), uintptr(unsafe.Pointer(&size))); e != 0 {
		return fmt.Errorf("get robust list: %w", e)
	}
	list := newRobust(futex)
	if err := setRobust(uintptr(unsafe.Pointer(list))); err != nil {
		return err
	}
	own := uint32(unix.Gettid())
	atomic.StoreUint32(futex, own)
	<-ctx.Done()
	// Another process may own it by now.
	atomic.CompareAndSwapUint32(futex, own, 0)
	// The C library's own, where there is one.
	err := setRobust(old)
	runtime.KeepAlive(list)
	return err
}

// newRobust returns a list of one futex. It is not to be on a stack, which may
// move: hence not inlined.
//
//go:noinline
func newRobust(futex *uint32) *robust {
	r := &robust{}
	r.first = uintptr(unsafe.Pointer(&r.entry))
	r.offset = uintptr(unsafe.Pointer(futex)) - r.first
	r.entry = uintptr(unsafe.Pointer(r))
	return r
}

func setRobust(head uintptr) error {
	if _, _, e := unix.RawSyscall(unix.SYS_SET_ROBUST_LIST, head, robustHeadSize, 0); e != 0 {
		return fmt.Errorf("set robust list: %w", e)
	}
	return nil
}
