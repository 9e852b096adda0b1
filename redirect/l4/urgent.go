package l4

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const siocAtMark = 0x8905 // asm-generic/sockios.h

// passUrgent passes on an urgent byte of side k that is next in the stream. A
// read stops before it, and the next would skip it. It returns false when side k
// cannot go on now.
func (w *worker) passUrgent(c *conn, k int) bool {
	s, d := &c.sides[k], &c.sides[1-k]
	if !sysAtMark(s.fd) {
		return true
	}
	var b [1]byte
	if e := sysReadUrgent(s.fd, &b); e != 0 {
		return true // not here yet, or passed on already
	}
	_, e := w.writeUrgent(d, b[:])
	switch {
	case e == unix.EAGAIN:
		w.saveRest(c, k, b[:])
		s.restUrgent = true
		w.block(d)
		return false
	case e != 0:
		s.readable = false
		w.broken(c, 1-k)
		return false
	}
	s.moved++
	c.active = w.now
	return true
}

// writeUrgent is write for an urgent byte.
func (w *worker) writeUrgent(d *side, b []byte) (int, syscall.Errno) {
	n, e := sysSendUrgent(d.fd, b)
	if e == 0 {
		d.wrote = true
	}
	return n, e
}

// sysAtMark tells whether what is next to read is urgent.
func sysAtMark(fd int32) bool {
	var at int32
	_, _, _ = syscall.RawSyscall(unix.SYS_IOCTL, uintptr(fd), siocAtMark, uintptr(unsafe.Pointer(&at)))
	return at != 0
}

func sysReadUrgent(fd int32, b *[1]byte) syscall.Errno {
	n, _, e := syscall.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(b)), 1,
		unix.MSG_OOB|unix.MSG_DONTWAIT, 0, 0)
	if e == 0 && n == 0 {
		return unix.EAGAIN
	}
	return e
}

func sysSendUrgent(fd int32, b []byte) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)),
		unix.MSG_OOB|unix.MSG_NOSIGNAL, 0, 0)
	return int(n), e
}
