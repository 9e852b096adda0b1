package l4

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const siocAtMark = 0x8905 // asm-generic/sockios.h

// sawUrgent notes that side k has urgent bytes. From then on they are read in their
// places in the stream (SO_OOBINLINE): another read would skip one that comes between
// the look for it and the read, and the kernel's counters of what was read would not
// tell what was passed on; see recover.go. Not before, since who reads without looking
// would take it for one like others.
func (w *worker) sawUrgent(c *conn, k int) {
	s := &c.sides[k]
	if s.urgent {
		return
	}
	s.urgent = true
	sysInline(s.fd, 1)
	c.keepFlag(keptUrgent << k)
}

// passUrgent passes on an urgent byte of side k that is next in the stream. A read
// stops before it, and the next would take it for one like others. It returns false
// when side k is not to be read now.
func (w *worker) passUrgent(c *conn, k int) bool {
	s, d := &c.sides[k], &c.sides[1-k]
	// A byte that is here is urgent or not, for good; one that comes after the look for
	// the mark may be urgent, and the read would not tell.
	if s.drained() {
		s.readable = false
		return false
	}
	if !sysAtMark(s.fd) {
		return true
	}
	w.readingUrgent(c, k)
	b := w.buf[:1]
	n, e := sysRead(s.fd, b)
	w.hasRead(n)
	switch {
	case e == unix.EAGAIN:
		w.later(c, k) // it is here: at the mark a pending signal ends a read
		return false
	case n != 1 || e != 0:
		return true // what it is the next read says too
	}
	fault(faultUrgent)
	_, e = w.writeUrgent(d, b)
	switch {
	case e == unix.EAGAIN:
		s.restUrgent = true
		w.saveRest(c, k, b)
		w.block(d)
		return false
	case e != 0:
		s.readable = false
		w.broken(c, 1-k)
		return false
	}
	s.moved++
	c.active = w.now
	fault(faultUrgent)
	return true
}

// drained tells whether there is nothing to read before the next event: nothing at all,
// or an urgent byte that no event has told of.
func (s *side) drained() bool { return !s.fin && sysQueued(s.fd, unix.SIOCINQ) == 0 }

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

func sysInline(fd int32, on int) { sysSetInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, on) }

func sysSendUrgent(fd int32, b []byte) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)),
		unix.MSG_OOB|unix.MSG_NOSIGNAL, 0, 0)
	return int(n), e
}
