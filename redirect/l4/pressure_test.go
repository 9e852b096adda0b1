package l4_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

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
