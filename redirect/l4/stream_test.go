package l4_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"golang.org/x/sys/unix"
)

func TestRequestResponse(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{serve(t, loopback, echo)}})
		c := r.dial()
		for i := range 1000 {
			mustExchange(t, c, strings.Repeat("request ", 1+i%50))
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		wantEOF(t, c)
		if got := r.awaitEnded(1)[0].End; got != flow.ReasonClosed {
			t.Errorf("ended by %v", got)
		}
	})
}

func TestServerSpeaksFirst(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server := serve(t, loopback, func(c *net.TCPConn) {
			_, _ = io.WriteString(c, "220 ready\r\n")
			echo(c)
		})
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		for range 50 {
			c := r.dial()
			wantBytes(t, c, []byte("220 ready\r\n"))
			mustExchange(t, c, "HELO\r\n")
			c.Close()
		}
	})
}

// The application ends its side and gets the whole answer after that.
func TestHalfCloseByApplication(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server := serve(t, loopback, func(c *net.TCPConn) {
			b, err := io.ReadAll(c)
			if err != nil {
				return
			}
			sum := sha256.Sum256(b)
			_, _ = c.Write(sum[:])
			_, _ = c.Write(b)
		})
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		for _, size := range []int{0, 1, 100, 64 << 10, 65<<10 + 1, 3 << 20} {
			c := r.dial()
			b := randomBytes(size)
			mustWrite(t, c, b)
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256(b)
			wantBytes(t, c, sum[:])
			wantBytes(t, c, b)
			wantEOF(t, c)
		}
		for _, rec := range r.awaitEnded(6) {
			if rec.End != flow.ReasonClosed || rec.Received != rec.Sent+sha256.Size {
				t.Errorf("ended by %v with %d and %d bytes", rec.End, rec.Sent, rec.Received)
			}
		}
	})
}

// The server ends its side first, and still gets what the application says.
func TestHalfCloseByServer(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		got := make(chan []byte, 10)
		server := serve(t, loopback, func(c *net.TCPConn) {
			_, _ = io.WriteString(c, "bye")
			_ = c.CloseWrite()
			b, _ := io.ReadAll(c)
			got <- b
		})
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		for _, size := range []int{0, 1, 100 << 10, 3 << 20} {
			c := r.dial()
			wantBytes(t, c, []byte("bye"))
			wantEOF(t, c)
			b := randomBytes(size)
			mustWrite(t, c, b)
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(receive(t, got), b) {
				t.Errorf("the server got something else than the %d bytes", size)
			}
		}
		for _, rec := range r.awaitEnded(4) {
			if rec.End != flow.ReasonClosed {
				t.Errorf("ended by %v", rec.End)
			}
		}
	})
}

// A half-closed connection stays open for as long as the other half is.
func TestHalfCloseStaysOpen(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server, conns := serveTo(t, loopback)
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		c := r.dial()
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		s := accept(t, conns)
		wantEOF(t, s)
		for i := range 100 {
			b := []byte(strconv.Itoa(i))
			mustWrite(t, s, b)
			wantBytes(t, c, b)
		}
		if n := len(r.live()); n != 1 {
			t.Errorf("%d connections are open", n)
		}
		s.Close()
		wantEOF(t, c)
	})
}

// All that the application ever says is there before the relay looks.
func TestFINWithData(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{serve(t, loopback, echo)}})
		for i := range 300 {
			c := r.dial()
			b := randomBytes(i * 7)
			mustWrite(t, c, b)
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			wantBytes(t, c, b)
			wantEOF(t, c)
			c.Close()
		}
	})
}

func TestEmptyConnection(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{serve(t, loopback, echo)}})
		const n = 200
		for i := range n {
			c := r.dial()
			if i%2 == 0 {
				c.Close()
				continue
			}
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			wantEOF(t, c)
			c.Close()
		}
		for _, rec := range r.awaitEnded(n) {
			if rec.End != flow.ReasonClosed || rec.Sent+rec.Received != 0 || rec.Attempts != 1 {
				t.Errorf("an empty connection: %+v", rec)
			}
		}
	})
}

// FIN arrives, with and without data, while the dial has no answer yet.
func TestFINBeforeDialIsAnswered(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		for _, said := range []string{"", "said early"} {
			ln, addr := hanging(t, loopback)
			r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{addr}})
			c := r.dial()
			r.awaitStats("a dial", func(s l4.Stats) bool { return s.Dials == 1 })
			mustWrite(t, c, []byte(said))
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			s := acceptSecond(t, ln)
			wantBytes(t, s, []byte(said))
			wantEOF(t, s)
			mustWrite(t, s, []byte("late"))
			s.Close()
			wantBytes(t, c, []byte("late"))
			wantEOF(t, c)
			if rec := r.awaitEnded(1)[0]; rec.End != flow.ReasonClosed || rec.Sent != uint64(len(said)) {
				t.Errorf("record: %+v", rec)
			}
		}
	})
}

// poll waits for one of these. A signal, as the Go runtime sends them, is none.
func poll(ready []unix.PollFd) (n int, err error) {
	for end := time.Now().Add(patience); ; {
		n, err = unix.Poll(ready, int(patience.Milliseconds()))
		if !errors.Is(err, unix.EINTR) || time.Now().After(end) {
			return n, err
		}
	}
}

// acceptSecond makes room in a hanging listener and takes what comes next.
func acceptSecond(t *testing.T, ln int) *net.TCPConn {
	t.Helper()
	filler, _, err := unix.Accept(ln)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(filler)
	ready := []unix.PollFd{{Fd: int32(ln), Events: unix.POLLIN}}
	if n, err := poll(ready); n != 1 {
		t.Fatalf("no second connection: %v", err)
	}
	fd, _, err := unix.Accept4(ln, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "accepted")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(patience))
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

func TestResetByServer(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server, conns := serveTo(t, loopback)
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		for _, size := range []int{0, 1, 1000, 30000} {
			c := r.dial()
			mustWrite(t, c, []byte("x"))
			s := accept(t, conns)
			wantBytes(t, s, []byte("x"))
			b := randomBytes(size)
			mustWrite(t, s, b)
			wantBytes(t, c, b)
			reset(s)
			wantReset(t, c, nil)
		}
		for _, rec := range r.awaitEnded(4) {
			if rec.End != flow.ReasonUpstreamReset {
				t.Errorf("ended by %v", rec.End)
			}
		}
	})
}

// The last bytes and the reset are there when the relay looks: the bytes have
// to arrive, and after them a reset and no end of file.
func TestResetByServerBehindData(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		answer := randomBytes(20000)
		server := serve(t, loopback, func(c *net.TCPConn) {
			var size [8]byte
			if _, err := io.ReadFull(c, size[:]); err != nil {
				return
			}
			n, _ := strconv.Atoi(strings.TrimSpace(string(size[:])))
			_, _ = c.Write(answer[:n])
			reset(c)
		})
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		for i := range 300 {
			size := i * 61
			c := r.dial()
			mustWrite(t, c, fmt.Appendf(nil, "%8d", size))
			if err := checkReset(c, answer[:size]); err != nil {
				t.Fatalf("connection %d: %v", i, err)
			}
			c.Close()
		}
		for _, rec := range r.awaitEnded(300) {
			if rec.End != flow.ReasonUpstreamReset {
				t.Errorf("ended by %v", rec.End)
			}
		}
	})
}

func TestResetByApplication(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server, conns := serveTo(t, loopback)
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		for _, size := range []int{1, 1000, 30000} {
			c := r.dial()
			b := randomBytes(size)
			mustWrite(t, c, b)
			s := accept(t, conns)
			wantBytes(t, s, b)
			reset(c)
			wantReset(t, s, nil)
		}
		for _, rec := range r.awaitEnded(3) {
			if rec.End != flow.ReasonDownstreamReset {
				t.Errorf("ended by %v", rec.End)
			}
		}
	})
}

func TestResetByApplicationBehindData(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server, conns := serveTo(t, loopback)
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		for i := range 300 {
			c := r.dial()
			// Half of them while the connection is up, half while it begins.
			if i%2 == 0 {
				mustWrite(t, c, []byte("x"))
				s := accept(t, conns)
				wantBytes(t, s, []byte("x"))
				b := randomBytes(1 + i*50)
				mustWrite(t, c, b)
				reset(c)
				if err := checkReset(s, b); err != nil {
					t.Fatalf("connection %d: %v", i, err)
				}
				s.Close()
				continue
			}
			b := randomBytes(1 + i*50)
			mustWrite(t, c, b)
			reset(c)
			s := accept(t, conns)
			if err := checkReset(s, b); err != nil {
				t.Fatalf("connection %d: %v", i, err)
			}
			s.Close()
		}
		for _, rec := range r.awaitEnded(300) {
			if rec.End != flow.ReasonDownstreamReset {
				t.Errorf("ended by %v", rec.End)
			}
		}
	})
}

// A reset that comes after a side has ended in order is a reset all the same.
func TestResetAfterHalfClose(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server, conns := serveTo(t, loopback)
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		for i := range 4 {
			c := r.dial()
			mustWrite(t, c, []byte("x"))
			s := accept(t, conns)
			wantBytes(t, s, []byte("x"))
			ends, other := c, s
			if i%2 == 1 {
				ends, other = s, c
			}
			if err := ends.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			wantEOF(t, other)
			if i < 2 {
				reset(other)
				wantReset(t, ends, nil)
				continue
			}
			// The side that has ended resets: the other learns it by writing.
			reset(ends)
			for err := error(nil); err == nil; {
				_, err = other.Write([]byte("y"))
			}
		}
		r.awaitEnded(4)
	})
}
