package testutil

import (
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// PastMarks reads c where urgent bytes may come. With a signal pending the kernel reads
// nothing at an urgent mark, as if nothing were there (EAGAIN), and what is there makes no
// event again: who then waits for one, as the net package does, waits for ever. The Go
// runtime sends such signals to its threads. c stays its owner's; deadlines hold.
func PastMarks(c *net.TCPConn) io.Reader { return pastMarks{c} }

type pastMarks struct{ c *net.TCPConn }

func (p pastMarks) Read(b []byte) (int, error) {
	raw, err := p.c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n int
	var e error
	err = raw.Read(func(fd uintptr) bool {
		for {
			n, e = unix.Read(int(fd), b)
			if !errors.Is(e, unix.EAGAIN) {
				return true
			}
			var is bool
			if is, e = readable(int32(fd)); e != nil || !is {
				return e != nil
			}
		}
	})
	switch {
	case err != nil:
		return 0, err
	case e != nil:
		return 0, fmt.Errorf("read: %w", e)
	case n == 0 && len(b) > 0:
		return 0, io.EOF
	}
	return n, nil
}

// readable tells whether a read of fd has something to say. An urgent byte that is not
// read in its place is nothing.
func readable(fd int32) (bool, error) {
	for {
		p := []unix.PollFd{{Fd: fd, Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0, err
		}
	}
}
