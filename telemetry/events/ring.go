package events

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// batch is the most events that one read takes: somewhat more than the ring
// holds, so that a flood of events cannot keep a poll from ending.
const batch = 16384

// ring is the map events. Its methods are called by one goroutine at a time,
// but for wait, which may overlap read.
type ring struct {
	window *window
	bell   *os.File // a second descriptor of the map
	conn   syscall.RawConn
}

// openRing opens the map for reading. The map stays the caller's.
func openRing(m *ebpf.Map) (*ring, error) {
	if m.Type() != ebpf.RingBuf {
		return nil, fmt.Errorf("open ring buffer: the map is of type %s", m.Type())
	}
	bell, err := openBell(m.FD())
	if err != nil {
		return nil, fmt.Errorf("watch ring buffer: %w", err)
	}
	conn, err := bell.SyscallConn()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("watch ring buffer: %w", err), bell.Close())
	}
	w, err := openWindow(conn, int(m.MaxEntries()))
	if err != nil {
		return nil, errors.Join(err, bell.Close())
	}
	return &ring{window: w, bell: bell, conn: conn}, nil
}

// openBell gives the map to Go's poller, which watches for edges: it reports the
// kernel side's wake-ups and nothing else. The library's reader has an epoll instance
// that is level-triggered, and once woken returns at every event.
func openBell(fd int) (*os.File, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate descriptor: %w", err)
	}
	// Without it the file would not be given to the poller.
	if err := unix.SetNonblock(dup, true); err != nil {
		return nil, errors.Join(fmt.Errorf("set non-blocking: %w", err), unix.Close(dup))
	}
	bell := os.NewFile(uintptr(dup), "events")
	if err := bell.SetReadDeadline(time.Time{}); err != nil {
		return nil, errors.Join(err, bell.Close())
	}
	return bell, nil
}

// read calls each with what is in the ring, at most a batch. The bytes are
// valid during the call. all is false if something was in the way: who writes an
// event and lost the processor there holds up all that come after it.
func (r *ring) read(each func(raw []byte)) (all bool, err error) {
	for range batch {
		raw, err := r.window.peek()
		if err != nil {
			return false, fmt.Errorf("read ring buffer: %w", err)
		}
		if raw == nil {
			return !r.window.busy, nil
		}
		each(raw)
		r.window.advance()
	}
	return true, nil // more than was in it at the beginning
}

// wait returns when the kernel side says that the ring fills up, after d, or
// when ctx is done.
func (r *ring) wait(ctx context.Context, d time.Duration) {
	err := r.bell.SetReadDeadline(time.Now().Add(d))
	stop := context.AfterFunc(ctx, func() { _ = r.bell.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err == nil {
		woken := false
		err = r.conn.Read(func(uintptr) bool {
			// The first call comes before the wait, the second after it.
			done := woken
			woken = true
			return done
		})
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		// The next read tells what is wrong; it must not come at once.
		pause(ctx, d)
	}
}

func (r *ring) close() error { return errors.Join(r.window.close(), r.bell.Close()) }

// pause returns after d or when ctx is done.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
