package l4_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
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

// acceptSecond makes room in a hanging listener and takes what comes next.
func acceptSecond(t *testing.T, ln int) net.Conn {
	t.Helper()
	filler, _, err := unix.Accept(ln)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(filler)
	ready := []unix.PollFd{{Fd: int32(ln), Events: unix.POLLIN}}
	if n, err := unix.Poll(ready, int(patience.Milliseconds())); n != 1 {
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
	return c
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

// 64 MiB go both ways at once, read and written in random portions.
func TestBulkBothWays(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		const size = 64 << 20
		results := make(chan error, 2)
		server := serve(t, loopback, func(c *net.TCPConn) { results <- duplex(c, size, 1, 2) })
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		c := r.dial()
		results <- duplex(c, size, 2, 1)
		for range 2 {
			if err := receive(t, results); err != nil {
				t.Error(err)
			}
		}
		if r.relay.Stats().Pipes == 0 {
			t.Error("no pipe was used: bulk was copied")
		}
		c.Close()
		if rec := r.awaitEnded(1)[0]; rec.Sent != size || rec.Received != size || rec.End != flow.ReasonClosed {
			t.Errorf("record: %+v", rec)
		}
	})
}

// Many bulk connections share the turns of one worker, and its pipes.
func TestManyBulkBothWays(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		const size, n = 6 << 20, 30 // more directions than there are pipes
		results := make(chan error, 2*n)
		server := serve(t, loopback, func(c *net.TCPConn) { results <- duplex(c, size, 1, 2) })
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		var clients sync.WaitGroup
		for range n {
			c := r.dial()
			clients.Go(func() { results <- duplex(c, size, 2, 1) })
		}
		clients.Wait()
		for range 2 * n {
			if err := receive(t, results); err != nil {
				t.Error(err)
			}
		}
	})
}

// duplex writes size bytes of one seed and wants as many of the other, at once,
// in random portions.
func duplex(c *net.TCPConn, size int, seedOut, seedIn uint64) error {
	wrote := make(chan error, 1)
	go sendAll(c, size, seedOut, wrote)
	err := expectAll(c, size, seedIn)
	return errors.Join(err, <-wrote)
}

func sendAll(c *net.TCPConn, size int, seed uint64, done chan<- error) {
	_, err := io.CopyBuffer(onlyWriter{c}, io.LimitReader(pattern(seed), int64(size)), make([]byte, 100<<10))
	done <- errors.Join(err, c.CloseWrite())
}

// onlyWriter hides ReadFrom and writes in random portions.
type onlyWriter struct{ c net.Conn }

func (w onlyWriter) Write(b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		m := 0
		m, err = w.c.Write(b[n:min(len(b), n+1+rand.IntN(2*len(b)))])
		n += m
	}
	return n, err
}

func expectAll(c *net.TCPConn, size int, seed uint64) error {
	got, want := sha256.New(), sha256.New()
	if _, err := io.CopyN(want, pattern(seed), int64(size)); err != nil {
		return err
	}
	buf := make([]byte, 300<<10)
	total := 0
	for {
		n, err := c.Read(buf[:1+rand.IntN(len(buf))])
		got.Write(buf[:n])
		total += n
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", total, size, err)
		}
	}
	if total != size || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		return fmt.Errorf("got %d bytes, want %d, or other ones", total, size)
	}
	return nil
}

// pattern is an endless stream of reproducible bytes.
func pattern(seed uint64) io.Reader {
	return rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), 1})
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)}).Read(b)
	return b
}

// Bulk, small exchanges and bulk again on one connection: the relay has to find
// the way from copying to splicing and back.
func TestBulkThenSmallThenBulk(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{serve(t, loopback, echo)}})
		c := r.dial()
		for round := range 6 {
			sent := make(chan error, 1)
			b := randomBytes(6<<20 + round)
			go writeAll(c, b, sent)
			wantBytes(t, c, b)
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			for i := range 200 {
				mustExchange(t, c, strings.Repeat("p", 1+i*i%3000))
			}
		}
	})
}

func writeAll(c net.Conn, b []byte, done chan<- error) {
	_, err := c.Write(b)
	done <- err
}

func TestManySmallWrites(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{serve(t, loopback, echo)}})
		c := r.dial()
		const n = 50000
		want := make([]byte, 0, 4*n)
		for i := range n {
			want = append(want, strconv.Itoa(i)...)
		}
		sent := make(chan error, 1)
		go writeSmall(c, want, sent)
		wantBytes(t, c, want)
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
	})
}

func writeSmall(c net.Conn, b []byte, done chan<- error) {
	for len(b) > 0 {
		n := min(1+rand.IntN(9), len(b))
		if _, err := c.Write(b[:n]); err != nil {
			done <- err
			return
		}
		b = b[n:]
	}
	done <- nil
}

// A reader that does not read stops the writer before much is queued, costs no
// memory, holds up nobody else, and gets every byte once it reads.
func TestBackPressure(t *testing.T) {
	for _, name := range []string{"application writes", "server writes"} {
		t.Run(name, func(t *testing.T) {
			families(t, func(t *testing.T, loopback netip.Addr) {
				testBackPressure(t, loopback, name == "server writes")
			})
		})
	}
}

func testBackPressure(t *testing.T, loopback netip.Addr, serverWrites bool) {
	server, conns := serveTo(t, loopback)
	r := newRig(t, setup{
		loopback: loopback, perWorker: 2,
		direct:    twoClusters,
		endpoints: []netip.AddrPort{server},
		others:    []netip.AddrPort{serve(t, loopback, echo)},
	})
	var ends [2]*net.TCPConn
	ends[0] = mustDial(t, r.listeners[0])
	mustWrite(t, ends[0], []byte("x"))
	ends[1] = accept(t, conns)
	wantBytes(t, ends[1], []byte("x"))
	writer, reader := ends[0], ends[1]
	if serverWrites {
		writer, reader = reader, writer
	}

	before := residentBytes(t)
	// The kernel's buffers may fill: two for sending, and the one for receiving
	// that grew while it was read from. To that come a pipe and what its reader
	// began with.
	limit := 2*largestBuffer(t, "wmem") + largestBuffer(t, "rmem") + 2<<20
	total := limit + 16<<20
	source := pattern(1)
	chunk := make([]byte, 64<<10)
	left := chunk[:0] // of a chunk, unwritten
	sent := 0
	// A write that a whole second brings nothing on is a writer that stopped.
	for sent < limit {
		if len(left) == 0 {
			_, _ = io.ReadFull(source, chunk)
			left = chunk
		}
		if err := writer.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		n, err := writer.Write(left)
		sent, left = sent+n, left[n:]
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if sent >= limit {
		t.Fatalf("the writer was not stopped within %d bytes", sent)
	}
	if grown := residentBytes(t) - before; grown > 8<<20 {
		t.Errorf("the process grew by %d bytes", grown)
	}
	other := mustDial(t, r.listeners[1])
	for range 100 {
		mustExchange(t, other, "not held up")
	}
	if err := writer.SetWriteDeadline(time.Now().Add(2 * patience)); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := io.Copy(onlyWriter{writer}, io.MultiReader(
			bytes.NewReader(left), io.LimitReader(source, int64(total-sent-len(left)))))
		done <- errors.Join(err, writer.CloseWrite())
	}()
	if err := expectAll(reader, total, 1); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func mustDial(t testing.TB, addr netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := dialTo(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// largestBuffer returns what a socket's buffer may grow to.
func largestBuffer(t testing.TB, which string) int {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_" + which)
	if err != nil {
		t.Fatal(err)
	}
	size, err := strconv.Atoi(strings.Fields(string(b))[2])
	if err != nil {
		t.Fatal(err)
	}
	return size
}

func residentBytes(t testing.TB) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(b))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}

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
		got, err := io.Copy(io.Discard, struct{ io.Reader }{s})
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
