package l4

import (
	"math"
	"net/netip"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The loop calls the kernel by RawSyscall: every call here returns at once, and
// telling Go's scheduler of each costs up to a fifth of the whole. wait is the
// exception, see there.

const (
	epollIn = unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET

	siocOutqNSD = 0x894b // linux/sockios.h

	spliceFlags = unix.SPLICE_F_MOVE | unix.SPLICE_F_NONBLOCK
)

func sysRead(fd int32, b []byte) (int, syscall.Errno) {
	for {
		n, _, e := syscall.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		if e != unix.EINTR {
			return int(n), e
		}
	}
}

func sysSend(fd int32, b []byte) (int, syscall.Errno) {
	for {
		n, _, e := syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)),
			unix.MSG_NOSIGNAL, 0, 0)
		if e != unix.EINTR {
			return int(n), e
		}
	}
}

func sysSplice(from, to int32, n int) (int, syscall.Errno) {
	for {
		moved, _, e := syscall.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n), spliceFlags)
		if e != unix.EINTR {
			return int(moved), e
		}
	}
}

func sysClose(fd int32) {
	// Linux closes the descriptor whatever it returns.
	_, _, _ = syscall.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
}

func sysShutdownWrite(fd int32) {
	// ENOTCONN: the peer has reset it. The event that says so is on its way.
	_, _, _ = syscall.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0)
}

// sysConnected tells whether a connect is over, and good.
func sysConnected(fd int32) bool {
	var info [8]byte // of struct tcp_info the beginning: the state
	size := int32(len(info))
	_, _, e := syscall.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_TCP, unix.TCP_INFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	return e == 0 && (info[0] == unix.BPF_TCP_ESTABLISHED || info[0] == unix.BPF_TCP_CLOSE_WAIT)
}

func sysTCPInfo(fd int32) (info unix.TCPInfo, e syscall.Errno) {
	size := uint32(unsafe.Sizeof(info))
	_, _, e = syscall.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_TCP, unix.TCP_INFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	return info, e
}

// sysSegmentsIn returns how many segments a socket has received, or many where
// the kernel does not tell.
func sysSegmentsIn(fd int32) int {
	info, e := sysTCPInfo(fd)
	if e != 0 {
		return math.MaxInt32
	}
	return int(info.Segs_in)
}

// sysUnsent returns how many bytes a socket has not sent once yet.
func sysUnsent(fd int32) int {
	var n int32
	_, _, _ = syscall.RawSyscall(unix.SYS_IOCTL, uintptr(fd), siocOutqNSD, uintptr(unsafe.Pointer(&n)))
	return int(n)
}

func sysSetInt(fd int32, level, option, value int) syscall.Errno {
	v := int32(value)
	_, _, e := syscall.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&v)), unsafe.Sizeof(v), 0)
	return e
}

func sysSetString(fd int32, level, option int, value []byte) syscall.Errno {
	_, _, e := syscall.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&value[0])), uintptr(len(value)), 0)
	return e
}

// sysCongestion returns the name of a socket's algorithm, padded with zeroes.
func sysCongestion(fd int32) (name [16]byte) {
	size := int32(len(name))
	_, _, _ = syscall.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION,
		uintptr(unsafe.Pointer(&name)), uintptr(unsafe.Pointer(&size)), 0)
	return name
}

// sysSocketError returns what an asynchronous connect ended with, and clears it.
func sysSocketError(fd int32) syscall.Errno {
	var v, size int32 = 0, 4
	_, _, e := syscall.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_ERROR,
		uintptr(unsafe.Pointer(&v)), uintptr(unsafe.Pointer(&size)), 0)
	if e != 0 {
		return e
	}
	return syscall.Errno(v)
}

// abort makes the coming close send a reset, also the kernel's when the process is
// killed: to the peer an end of file would mean that it has everything. A socket that
// was accepted has it from its listener.
func abort(fd int32) { linger(fd, 1) }

// complete makes the coming close send a FIN, and what is unsent before it.
func complete(fd int32) { linger(fd, 0) }

func linger(fd, on int32) {
	l := [2]int32{on, 0}
	_, _, _ = syscall.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER,
		uintptr(unsafe.Pointer(&l)), unsafe.Sizeof(l), 0)
}

// sysDisconnect ends a connection as an aborting close does, also if there are more
// descriptors of it.
func sysDisconnect(fd int32) {
	none := [16]byte{} // AF_UNSPEC
	_, _, _ = syscall.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&none)), unsafe.Sizeof(none))
}

// sysShutdown ends both directions, as a close does, also if there are more
// descriptors.
func sysShutdown(fd int32) {
	_, _, _ = syscall.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_RDWR, 0)
}

// tcpInfo reads the smoothed round-trip time and the segments sent again.
func tcpInfo(fd int32) (rtt time.Duration, retransmits uint32) {
	info, e := sysTCPInfo(fd)
	if e != 0 {
		return 0, 0
	}
	return time.Duration(info.Rtt) * time.Microsecond, info.Total_retrans
}

// monotonic is CLOCK_MONOTONIC in ns, which all processes have in common.
func monotonic() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // cannot fail with this clock
	return ts.Nano()
}

// sockaddr holds a struct sockaddr_in or sockaddr_in6.
type sockaddr struct {
	raw syscall.RawSockaddrInet6
	len uint32
}

func (s *sockaddr) set(a netip.AddrPort) {
	port := (*[2]byte)(unsafe.Pointer(&s.raw.Port))
	port[0], port[1] = byte(a.Port()>>8), byte(a.Port())
	if a.Addr().Is4() {
		v4 := (*syscall.RawSockaddrInet4)(unsafe.Pointer(&s.raw))
		v4.Family = unix.AF_INET
		v4.Addr = a.Addr().As4()
		s.len = uint32(unsafe.Sizeof(*v4))
		return
	}
	s.raw.Family = unix.AF_INET6
	s.raw.Flowinfo, s.raw.Scope_id = 0, 0
	s.raw.Addr = a.Addr().As16()
	s.len = uint32(unsafe.Sizeof(s.raw))
}

// get returns the address, unmapped, or an invalid one for another family.
func (s *sockaddr) get() netip.AddrPort {
	port := (*[2]byte)(unsafe.Pointer(&s.raw.Port))
	p := uint16(port[0])<<8 | uint16(port[1])
	switch s.raw.Family {
	case unix.AF_INET:
		v4 := (*syscall.RawSockaddrInet4)(unsafe.Pointer(&s.raw))
		return netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), p)
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16(s.raw.Addr).Unmap(), p)
	default:
		return netip.AddrPort{}
	}
}

// accept takes a connection and leaves its peer in s.
func (s *sockaddr) accept(listener int32) (int32, syscall.Errno) {
	s.len = uint32(unsafe.Sizeof(s.raw))
	fd, _, e := syscall.RawSyscall6(unix.SYS_ACCEPT4, uintptr(listener), uintptr(unsafe.Pointer(&s.raw)),
		uintptr(unsafe.Pointer(&s.len)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	return int32(fd), e
}

// local reads a socket's own address into s.
func (s *sockaddr) local(fd int32) syscall.Errno {
	s.len = uint32(unsafe.Sizeof(s.raw))
	_, _, e := syscall.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&s.raw)),
		uintptr(unsafe.Pointer(&s.len)))
	return e
}

// remote reads the address of a socket's peer into s.
func (s *sockaddr) remote(fd int32) syscall.Errno {
	s.len = uint32(unsafe.Sizeof(s.raw))
	_, _, e := syscall.RawSyscall(unix.SYS_GETPEERNAME, uintptr(fd), uintptr(unsafe.Pointer(&s.raw)),
		uintptr(unsafe.Pointer(&s.len)))
	return e
}

func (s *sockaddr) connect(fd int32) syscall.Errno {
	_, _, e := syscall.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&s.raw)), uintptr(s.len))
	return e
}

func (s *sockaddr) bind(fd int32) syscall.Errno {
	_, _, e := syscall.RawSyscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&s.raw)), uintptr(s.len))
	return e
}

func sysSocket(family int) (int32, syscall.Errno) {
	fd, _, e := syscall.RawSyscall(unix.SYS_SOCKET, uintptr(family),
		unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	return int32(fd), e
}
