package model

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// opLimit is how long an operation may usually take that is bound to end.
const opLimit = 30 * time.Second

// result is what came of an operation.
type result struct {
	Lane    int
	Written int
	Read    int
	// WriteError and ReadError are the errors that ended writing and reading, or
	// the error of the call.
	WriteError, ReadError unix.Errno
	EOF                   bool
	Events                int16 // of poll
	Peer                  string
	Port                  int // of a listener
	// Trouble is what must never be: a time-out, or other bytes than were sent.
	Trouble string
}

// period is how often the bytes of a stream repeat: prime, so that no two
// buffers of the usual sizes hold the same.
const period = 1048573

// noise is what streams are made of, twice.
var noise = func() []byte {
	b := make([]byte, period)
	rand.NewChaCha8([32]byte{42}).Read(b)
	return append(b, b...)
}()

// stream is one direction of a connection, as one peer knows it.
type stream struct {
	phase uint64 // which part of the noise it begins with
	at    uint64 // bytes so far
}

// next returns n bytes, at most a period, from where the stream is.
func (s *stream) next(n int) []byte {
	from := (s.phase + s.at) % period
	return noise[from : from+uint64(n)]
}

// socket is one peer's end of a connection.
type socket struct {
	fd      int
	out, in stream
	buf     []byte
	limit   time.Duration // of what is bound to end
}

func (s *socket) close() {
	if s.fd >= 0 {
		unix.Close(s.fd)
		s.fd = -1
	}
}

// errno is the number in err, 0 for nil.
func errno(err error) unix.Errno {
	if err == nil {
		return 0
	}
	return err.(unix.Errno)
}

// wait polls for events until there are some, and returns them.
func wait(fd int, events int16, limit time.Duration) (int16, string) {
	for end := time.Now().Add(limit); ; {
		left := time.Until(end)
		if left < 0 {
			return 0, "it does not come"
		}
		p := []unix.PollFd{{Fd: int32(fd), Events: events}}
		n, err := unix.Poll(p, int(left.Milliseconds())+1)
		if err != nil && err != unix.EINTR {
			return 0, "poll: " + err.Error()
		}
		if n > 0 && p[0].Revents != 0 {
			return p[0].Revents, ""
		}
	}
}

// waitHangUp polls for the end that a reset is. Its error alone is not yet that: the kernel
// sets it first, and a poll may come in between.
func waitHangUp(fd int, limit time.Duration) string {
	for end := time.Now().Add(limit); ; {
		events, trouble := wait(fd, 0, limit)
		if events&unix.POLLHUP != 0 || trouble != "" {
			return trouble
		}
		if time.Now().After(end) {
			return "there is an error, and no end"
		}
	}
}

// send sends up to n bytes by one call.
func (s *socket) send(n int) (int, unix.Errno) {
	m, err := unix.SendmsgN(s.fd, s.out.next(n), nil, nil, unix.MSG_NOSIGNAL)
	if err != nil {
		return 0, errno(err)
	}
	s.out.at += uint64(m)
	return m, 0
}

// recv reads up to n bytes by one call, and compares them.
func (s *socket) recv(n, flags int) (got int, e unix.Errno, trouble string) {
	if len(s.buf) < n {
		s.buf = make([]byte, n)
	}
	got, _, err := unix.Recvfrom(s.fd, s.buf[:n], flags)
	if err != nil {
		return 0, errno(err), ""
	}
	if !bytes.Equal(s.buf[:got], s.in.next(got)) {
		trouble = "other bytes than were sent"
	}
	if flags&unix.MSG_PEEK == 0 {
		s.in.at += uint64(got)
	}
	return got, 0, trouble
}

// move writes and reads until both is done.
func (s *socket) move(o *op, r *result) {
	writing := o.Write > 0
	reading := o.Read != 0
	awake := time.Now().Add(time.Duration(o.Nap) * time.Millisecond)
	for end := time.Now().Add(s.limit); writing || reading; {
		if !writing {
			time.Sleep(time.Until(awake))
		}
		reads := reading && !time.Now().Before(awake)
		events := int16(0)
		if writing {
			events |= unix.POLLOUT
		}
		if reads {
			events |= unix.POLLIN
		}
		limit := time.Until(end)
		if reading && !reads {
			limit = time.Until(awake)
		}
		if _, r.Trouble = wait(s.fd, events, limit); r.Trouble != "" {
			if !reads && reading {
				r.Trouble = "" // no room, and it may read now
				continue
			}
			return
		}
		if writing {
			n, e := s.send(min(o.Chunk, o.Write-r.Written))
			r.Written += n
			if e != 0 && e != unix.EAGAIN {
				r.WriteError = e
			}
			writing = r.Written < o.Write && r.WriteError == 0
		}
		if reads {
			reading = s.moveIn(o, r)
		}
	}
}

// moveIn does one read of a move, and tells whether there are more to come.
func (s *socket) moveIn(o *op, r *result) bool {
	n := min(o.Chunk, period)
	if o.Read >= 0 {
		n = min(n, o.Read-r.Read)
	}
	got, e, trouble := s.recv(n, 0)
	switch {
	case trouble != "":
		r.Trouble = trouble
	case e == unix.EAGAIN:
		return true
	case e != 0:
		r.ReadError = e
	case got == 0:
		r.EOF = true
	default:
		r.Read += got
		return o.Read < 0 || r.Read < o.Read
	}
	return false
}

// fill writes until there is no room.
func (s *socket) fill(o *op, r *result) {
	for r.Written < o.Write {
		n, e := s.send(min(o.Chunk, o.Write-r.Written))
		r.Written += n
		switch {
		case e == unix.EAGAIN && r.Written > 0:
			return
		case e == unix.EAGAIN:
			if _, r.Trouble = wait(s.fd, unix.POLLOUT, s.limit); r.Trouble != "" {
				return
			}
		case e != 0:
			r.WriteError = e
			return
		}
	}
}

// awaitBytes waits until so many bytes can be read. The kernel tells of new
// bytes, but not that there are enough of them.
func (s *socket) awaitBytes(n int, r *result) {
	if r.Events, r.Trouble = wait(s.fd, unix.POLLIN, s.limit); r.Trouble != "" {
		return
	}
	r.Trouble = s.until(func() bool {
		r.Read, r.ReadError = s.inQueue()
		return r.Read >= n || r.ReadError != 0
	})
}

// awaitClosed waits for the last state of a TCP connection.
func (s *socket) awaitClosed(r *result) {
	const closed = 7 // TCP_CLOSE
	r.Trouble = s.until(func() bool {
		info, err := unix.GetsockoptTCPInfo(s.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		r.ReadError = errno(err)
		return err != nil || info.State == closed
	})
}

// until looks, ever less often, for what there is no event for.
func (s *socket) until(done func() bool) string {
	pause := 20 * time.Microsecond
	for end := time.Now().Add(s.limit); !done(); time.Sleep(pause) {
		if time.Now().After(end) {
			return "it does not come"
		}
		pause = min(2*pause, 20*time.Millisecond)
	}
	return ""
}

func (s *socket) inQueue() (int, unix.Errno) {
	n, err := unix.IoctlGetInt(s.fd, unix.TIOCINQ)
	return n, errno(err)
}

// look tells what can be seen without doing anything.
func (s *socket) look(r *result) {
	p := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN | unix.POLLOUT | unix.POLLRDHUP | unix.POLLPRI}}
	if _, err := unix.Poll(p, 0); err != nil && err != unix.EINTR {
		r.Trouble = "poll: " + err.Error()
	}
	r.Events = p[0].Revents
	r.Read, r.ReadError = s.inQueue()
	sa, err := unix.Getpeername(s.fd)
	r.WriteError = errno(err)
	r.Peer = addrOf(sa).Addr().String()
}

func addrOf(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func sockaddr(a netip.AddrPort) (unix.Sockaddr, int) {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}, unix.AF_INET
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}, unix.AF_INET6
}
