package l4_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

// A reset in the middle of bulk: a part of the stream arrives, and then the
// reset, never an end of file.
func TestResetInBulk(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server, conns := serveTo(t, loopback)
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		const n = 40
		b := randomBytes(5 << 20)
		for i := range n {
			c := r.dial()
			mustWrite(t, c, []byte("x"))
			s := accept(t, conns)
			wantBytes(t, s, []byte("x"))
			from, to := c, s
			if i%2 == 1 {
				from, to = s, c
			}
			done := make(chan error, 1)
			go writeAndReset(from, b, done)
			got, err := io.ReadAll(to)
			if !errors.Is(err, syscall.ECONNRESET) || !bytes.HasPrefix(b, got) {
				t.Fatalf("connection %d: got %d bytes and then %v", i, len(got), err)
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			c.Close()
			s.Close()
		}
		for i, rec := range r.awaitEnded(n) {
			want := flow.ReasonDownstreamReset
			if i%2 == 1 {
				want = flow.ReasonUpstreamReset
			}
			if rec.End != want {
				t.Errorf("connection %d ended by %v, want %v", i, rec.End, want)
			}
		}
	})
}

func writeAndReset(c *net.TCPConn, b []byte, done chan<- error) {
	_, err := c.Write(b)
	reset(c)
	done <- err
}

// A reader that does not read is told of a reset all the same, and what was on
// its way is given up: the writer's, the reader's own.
func TestResetUnderBackPressure(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server, conns := serveTo(t, loopback)
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}})
		for i := range 4 {
			c := r.dial()
			mustWrite(t, c, []byte("x"))
			s := accept(t, conns)
			wantBytes(t, s, []byte("x"))
			writer, reader := c, s
			if i%2 == 1 {
				writer, reader = s, c
			}
			fill(t, writer)
			if i < 2 {
				reset(writer)
				if _, err := io.Copy(io.Discard, struct{ io.Reader }{reader}); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("case %d: the reader got %v, want a reset", i, err)
				}
			} else {
				reset(reader)
				wantReset(t, writer, nil)
			}
			r.awaitEnded(i + 1)
			writer.Close()
			reader.Close()
		}
	})
}

// fill writes until there is no more room.
func fill(t *testing.T, c *net.TCPConn) {
	t.Helper()
	b := make([]byte, 256<<10)
	for err := error(nil); err == nil; {
		if err = c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		_, err = c.Write(b)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
	}
}

// An endpoint that accepts and resets has not refused: it is tried once, and
// counts as connected.
func TestResetAtOnce(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		r := newRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{serve(t, loopback, reset)}})
		const n = 1500
		for i := range n {
			c, err := r.tryDial()
			if errors.Is(err, syscall.ECONNRESET) {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if i%2 == 0 {
				_, err = c.Write([]byte("said early"))
			}
			if err == nil { // the write did not see the reset already
				err = checkReset(c, nil)
			} else if errors.Is(err, syscall.ECONNRESET) {
				err = nil
			}
			if err != nil {
				t.Fatalf("connection %d: %v", i, err)
			}
			c.Close()
		}
		for _, rec := range r.awaitEnded(n) {
			if rec.End != flow.ReasonUpstreamReset || rec.Attempts != 1 {
				t.Fatalf("record: %+v", rec)
			}
		}
		if s := r.cluster.Endpoints[0].State(); s.Connects != n || s.Failures != 0 {
			t.Errorf("endpoint: %+v", s)
		}
	})
}
