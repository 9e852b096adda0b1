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
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
)

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
