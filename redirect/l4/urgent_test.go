package l4_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// An urgent byte is not part of the stream, which goes on behind it: while
// messages are copied and while bulk is spliced.
func TestUrgentData(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		for _, size := range []int{0, 1, 5000, 8 << 20} {
			for round := range 5 {
				testUrgentData(t, loopback, size+round)
			}
		}
	})
}

func testUrgentData(t *testing.T, loopback netip.Addr, size int) {
	t.Helper()
	server, conns := serveTo(t, loopback)
	r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
	c := r.dial()
	b := randomBytes(size)
	done := make(chan error, 1)
	go writeWithUrgent(c, b, done)
	s := accept(t, conns)
	wantBytes(t, s, b)
	wantBytes(t, s, b)
	wantEOF(t, s)
	if err := <-done; err != nil {
		t.Error(err)
	}
	s.Close()
	wantEOF(t, c)
	r.close()
}

// writeWithUrgent writes b twice and an urgent byte in between.
func writeWithUrgent(c *net.TCPConn, b []byte, done chan<- error) {
	_, err := c.Write(b)
	err = errors.Join(err, writeUrgent(c, '!'))
	_, err2 := c.Write(b)
	done <- errors.Join(err, err2, c.CloseWrite())
}

func writeUrgent(c *net.TCPConn, b byte) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Write(func(fd uintptr) bool {
		_, sent = unix.SendmsgN(int(fd), []byte{b}, nil, nil, unix.MSG_OOB)
		return !errors.Is(sent, unix.EAGAIN)
	})
	return errors.Join(err, sent)
}

// The urgent byte and all that follows it are received before the relay gets
// there, so no further event says that there is more behind it.
func TestUrgentDataUnderBackPressure(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server, conns := serveTo(t, loopback)
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		for round := range 4 {
			c := r.dial()
			b := randomBytes(2<<20 + round<<20)
			done := make(chan error, 1)
			go writeWithUrgent(c, b, done)
			s := accept(t, conns)
			// Let the writer get as far as it can.
			stuck := time.After(500 * time.Millisecond)
			select {
			case err := <-done:
				done <- err
			case <-stuck:
			}
			wantBytes(t, s, b)
			wantBytes(t, s, b)
			wantEOF(t, s)
			if err := <-done; err != nil {
				t.Error(err)
			}
			s.Close()
			wantEOF(t, c)
		}
	})
}

// Many urgent bytes, faster than they are read: an overtaken one becomes part of
// the stream, so only its length is bounded, but it has to end.
func TestManyUrgentBytes(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server, conns := serveTo(t, loopback)
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		c := r.dial()
		const n, portion = 200, 100 << 10
		done := make(chan error, 1)
		go writeManyUrgent(c, n, portion, done)
		s := accept(t, conns)
		got, err := io.Copy(io.Discard, testutil.PastMarks(s))
		if err != nil || got < n*portion || got > n*(portion+1) {
			t.Errorf("got %d bytes and %v", got, err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func writeManyUrgent(c *net.TCPConn, n, portion int, done chan<- error) {
	b := make([]byte, portion)
	for range n {
		_, err := c.Write(b)
		if err = errors.Join(err, writeUrgent(c, '!')); err != nil {
			done <- err
			return
		}
	}
	done <- c.CloseWrite()
}

// An urgent byte arrives as one, where it was in the stream.
func TestUrgentIsUrgent(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server, conns := serveTo(t, loopback)
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		c, s := r.opened(t, conns)
		for _, to := range []struct{ from, to *net.TCPConn }{{c, s}, {s, c}} {
			mustWrite(t, to.from, []byte("before"))
			if err := writeUrgent(to.from, '!'); err != nil {
				t.Fatal(err)
			}
			mustWrite(t, to.from, []byte("after"))
			if got := readUrgent(t, to.to); got != '!' {
				t.Errorf("urgent byte %q", got)
			}
			wantBytes(t, to.to, []byte("before"))
			wantBytes(t, to.to, []byte("after"))
		}
		c.Close()
		s.Close()
	})
}

// readUrgent waits for an urgent byte.
func readUrgent(t *testing.T, c *net.TCPConn) byte {
	t.Helper()
	var b [1]byte
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}
			if n, err := poll(ready); n != 1 {
				t.Error("no urgent byte:", err)
			}
			if _, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_OOB); err != nil {
				t.Error(err)
			}
		})
	}
	if err != nil {
		t.Error(err)
	}
	return b[0]
}

// An urgent byte that arrives just when the relay reads is passed on like any other: who
// reads them in their places gets every byte.
func TestUrgentInPlace(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server, conns := serveTo(t, loopback)
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		c, s := r.opened(t, conns)
		inline(t, c)
		inline(t, s)
		for range 2000 {
			for _, to := range []struct{ from, to *net.TCPConn }{{c, s}, {s, c}} {
				mustWrite(t, to.from, []byte("before"))
				if err := writeUrgent(to.from, '!'); err != nil {
					t.Fatal(err)
				}
				mustWrite(t, to.from, []byte("after"))
				wantBytes(t, to.to, []byte("before!after"))
			}
		}
		c.Close()
		s.Close()
	})
}

// The first urgent byte of a connection is not lost when it comes while bulk is spliced,
// and is the next to be read before an event has told of it.
func TestUrgentBehindBulk(t *testing.T) {
	server, conns := serveTo(t, loopback4)
	r := newRig(t, setup{endpoints: []netip.AddrPort{server}})
	for n := range 200 {
		c, s := r.opened(t, conns)
		inline(t, s)
		b := randomBytes(200_000 + n*97)
		done := make(chan error, 1)
		go writeWithUrgent(c, b, done)
		wantBytes(t, s, b)
		wantBytes(t, s, []byte("!"))
		wantBytes(t, s, b)
		wantEOF(t, s)
		if err := <-done; err != nil {
			t.Error(err)
		}
		s.Close()
		wantEOF(t, c)
	}
}

// inline has urgent bytes read in their places.
func inline(t *testing.T, c *net.TCPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			if err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1); err != nil {
				t.Error(err)
			}
		})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// An urgent byte that arrives just when the relay reads is never one of the stream, for
// who does not read them in their places.
func TestUrgentBeside(t *testing.T) {
	server, conns := serveTo(t, loopback4)
	r := newRig(t, setup{endpoints: []netip.AddrPort{server}})
	c, s := r.opened(t, conns)
	for n := range 10_000 {
		for _, to := range []struct{ from, to *net.TCPConn }{{c, s}, {s, c}} {
			mustWrite(t, to.from, []byte("before"))
			// By then the relay has read that, and is about to see that there is no more.
			pause := 5*time.Microsecond + time.Duration(n%200)*100*time.Nanosecond
			for begun := time.Now(); time.Since(begun) < pause; {
			}
			if err := writeUrgent(to.from, '!'); err != nil {
				t.Fatal(err)
			}
			mustWrite(t, to.from, []byte("after"))
			wantBytes(t, to.to, []byte("beforeafter"))
		}
	}
	c.Close()
	s.Close()
}

// With a signal pending the kernel reads nothing at an urgent mark, as if nothing were
// there. The Go runtime sends such signals to its threads.
func TestUrgentSignalled(t *testing.T) {
	server, conns := serveTo(t, loopback4)
	r := newRig(t, setup{endpoints: []netip.AddrPort{server}})
	c, s := r.opened(t, conns)
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- signalThreads(stop) }()
	defer func() {
		close(stop)
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	for range 5000 {
		if err := writeUrgent(c, '!'); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, c, []byte("after"))
		wantBytes(t, s, []byte("after"))
		mustWrite(t, s, []byte("y"))
		wantBytes(t, c, []byte("y"))
	}
	c.Close()
	s.Close()
}

// signalThreads sends all threads of this process signals until stop is closed.
func signalThreads(stop <-chan struct{}) error {
	for {
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		for _, thread := range threads {
			id, err := strconv.Atoi(thread.Name())
			if err != nil {
				return err
			}
			if err := unix.Tgkill(os.Getpid(), id, unix.SIGURG); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
		select {
		case <-stop:
			return nil
		default:
		}
	}
}

// Of two urgent bytes that come together the kernel drops the first one, if it is the next
// to be read and the socket does not read them in their places. The relay's does so from
// the first one on that it has seen, so that much is lost that would not be without it.
func TestUrgentOvertaken(t *testing.T) {
	for name, test := range map[string]struct {
		relayed      bool
		before       string
		first, later string // what comes of the first two, and of others
	}{
		"direct":                {false, "", "12", "12"},
		"relay":                 {true, "", "2", "12"},
		"direct, behind others": {false, "a", "a12", "a12"},
		"relay, behind others":  {true, "a", "a12", "a12"},
	} {
		t.Run(name, func(t *testing.T) {
			server, conns := serveTo(t, loopback4)
			r := newRig(t, setup{endpoints: []netip.AddrPort{server}})
			to := server
			if test.relayed {
				to = r.listeners[0]
			}
			c, err := dialTo(to)
			if err != nil {
				t.Fatal(err)
			}
			mustWrite(t, c, []byte("x"))
			s := accept(t, conns)
			wantBytes(t, s, []byte("x"))
			inline(t, c)
			inline(t, s)
			for _, way := range []struct{ from, to *net.TCPConn }{{c, s}, {s, c}} {
				for _, want := range []string{test.first, test.later} {
					f := r.freeze() // before it has looked
					mustWrite(t, way.from, []byte(test.before))
					for _, b := range []byte("12") {
						if err := writeUrgent(way.from, b); err != nil {
							t.Fatal(err)
						}
					}
					f.Thaw()
					mustWrite(t, way.from, []byte("end"))
					wantBytes(t, way.to, []byte(want+"end"))
				}
			}
			c.Close()
			s.Close()
		})
	}
}

// An urgent byte that is the very first one, and there when the connection is accepted, is
// skipped by the first read, and is no part of the record either.
func TestUrgentFirst(t *testing.T) {
	server, conns := serveTo(t, loopback4)
	r := newRig(t, setup{endpoints: []netip.AddrPort{server}})
	f := r.freeze() // before it has accepted
	c := r.dial()
	if err := writeUrgent(c, '!'); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, c, []byte("after"))
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	f.Thaw()
	s := accept(t, conns)
	inline(t, s)
	wantBytes(t, s, []byte("after"))
	wantEOF(t, s)
	s.Close()
	wantEOF(t, c)
	if rec := r.awaitEnded(1)[0]; rec.End != flow.ReasonClosed || rec.Sent != uint64(len("after")) {
		t.Errorf("record %+v", rec)
	}
}
