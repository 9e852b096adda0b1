package handover

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

const limit = 20 * time.Second

// pair is both ends of a conversation.
func pair(t *testing.T) (a, b *Conn) {
	t.Helper()
	ln, err := Listen(filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if a, err = Dial(t.Context(), ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = Accept(ln); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*Conn{a, b} {
		c.Within(limit)
		t.Cleanup(c.Close)
	}
	return a, b
}

// descriptors are n of the same pipe.
func descriptors(t *testing.T, n int) []int {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Close(p[0])
		unix.Close(p[1])
	})
	fds := make([]int, n)
	for i := range fds {
		fds[i] = p[i%2]
	}
	return fds
}

// What is sent comes as one frame, however long and with however many descriptors.
func TestFrames(t *testing.T) {
	a, b := pair(t)
	for _, tt := range []struct{ bytes, fds int }{
		{0, 0}, {1, 0}, {pieceMax, 1}, {pieceMax + 1, pieceFDs}, {0, pieceFDs + 1}, {5*pieceMax + 7, 1000}, {100, 3*pieceFDs + 5},
	} {
		data := bytes.Repeat([]byte{1, 2, 3, 4, 5, 6, 7}, tt.bytes/7+1)[:tt.bytes]
		sent := make(chan error, 1)
		fds := descriptors(t, tt.fds)
		go func() { sent <- a.Send(KindState, data, fds) }()
		f, err := b.Receive()
		if err != nil {
			t.Fatalf("%+v: %v", tt, err)
		}
		if err := <-sent; err != nil {
			t.Fatalf("%+v: %v", tt, err)
		}
		if f.Kind != KindState || !bytes.Equal(f.Data, data) || len(f.FDs) != tt.fds {
			t.Errorf("%+v: kind %d, %d bytes, %d descriptors", tt, f.Kind, len(f.Data), len(f.FDs))
		}
		var want, got unix.Stat_t
		for i, fd := range f.FDs {
			if unix.Fstat(fds[i], &want) != nil || unix.Fstat(fd, &got) != nil || want.Ino != got.Ino {
				t.Fatalf("%+v: descriptor %d is another file", tt, i)
			}
			if flags, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); flags&unix.O_ACCMODE != i%2 {
				t.Fatalf("%+v: descriptor %d is in the wrong place", tt, i)
			}
		}
		f.Close()
	}
}

// TestTooLong has somebody begin with words that never end, or with a frame that is not
// to come: he is not listened to for long.
func TestTooLong(t *testing.T) {
	for _, kind := range []Kind{KindHello, KindState, 200} {
		a, b := pair(t)
		sent := make(chan error, 1)
		go func() { sent <- a.Send(kind, make([]byte, 100*wordMax), nil) }()
		if f, err := b.Expect(KindHello); err == nil {
			t.Errorf("kind %d: %d bytes were taken", kind, len(f.Data))
		}
		b.Close()
		if err := <-sent; err == nil {
			t.Errorf("kind %d: all was read", kind)
		}
	}
}

// A refusal and an abort are errors with their words, also if the other end is closed
// by then and has not read what came.
func TestRefusal(t *testing.T) {
	for _, kind := range []Kind{KindRefusal, KindAbort} {
		a, b := pair(t)
		if err := a.Send(KindFreeze, nil, nil); err != nil { // never read
			t.Fatal(err)
		}
		if err := b.SendJSON(kind, Refusal{Why: "no time"}, nil); err != nil {
			t.Fatal(err)
		}
		b.Close()
		_, err := a.Expect(KindState)
		if !errors.Is(err, ErrRefused) || err.Error() != "the running process refuses: no time" {
			t.Errorf("kind %d: %v", kind, err)
		}
		if _, err := a.Expect(KindState); !errors.Is(err, io.EOF) {
			t.Errorf("kind %d: then %v, want the end", kind, err)
		}
	}
}

// What is out of place is an error, and its descriptors are closed.
func TestOutOfPlace(t *testing.T) {
	a, b := pair(t)
	if err := a.Send(KindCommit, nil, descriptors(t, 3)); err != nil {
		t.Fatal(err)
	}
	before := open(t)
	if _, err := b.Expect(KindState); err == nil || errors.Is(err, ErrRefused) || errors.Is(err, io.EOF) {
		t.Errorf("a frame that was not to come: %v", err)
	}
	if after := open(t); after != before {
		t.Errorf("%d descriptors are open, %d were", after, before)
	}
	// A frame that breaks off.
	if _, err := a.c.Write([]byte{byte(KindState), 1, 'x'}); err != nil {
		t.Fatal(err)
	}
	a.Close()
	if _, err := b.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("a frame that breaks off: %v", err)
	}
}

func open(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// Interrupt ends what waits.
func TestInterrupt(t *testing.T) {
	a, _ := pair(t)
	done := make(chan error, 1)
	go func() {
		_, err := a.Receive()
		done <- err
	}()
	a.Interrupt()
	if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("interrupted: %v", err)
	}
}

// TestLast: what the other end had sent is heard, also by who does not wait any more, and
// it can send nothing after that.
func TestLast(t *testing.T) {
	for name, tt := range map[string]struct {
		before func(t *testing.T, a *Conn)
		want   Kind
	}{
		"nothing":        {func(*testing.T, *Conn) {}, 0},
		"closed":         {func(_ *testing.T, a *Conn) { a.Close() }, 0},
		"said":           {func(t *testing.T, a *Conn) { send(t, a, KindCommit, nil) }, KindCommit},
		"with more":      {func(t *testing.T, a *Conn) { send(t, a, KindState, descriptors(t, 3)) }, KindState},
		"and hung up":    {func(t *testing.T, a *Conn) { send(t, a, KindCommit, nil); a.Close() }, KindCommit},
		"and was unread": {func(t *testing.T, a *Conn) { send(t, a, KindAbort, nil); a.Close() }, KindAbort},
	} {
		t.Run(name, func(t *testing.T) {
			testutil.CheckLeaks(t)
			a, b := pair(t)
			send(t, b, KindHave, nil) // which is not read
			tt.before(t, a)
			b.Interrupt()
			if got, err := b.Last(); err != nil || got != tt.want {
				t.Errorf("%d, %v; want %d", got, err, tt.want)
			}
			if err := a.Send(KindCommit, nil, nil); !errors.Is(err, unix.EPIPE) && !errors.Is(err, net.ErrClosed) {
				t.Errorf("the other end sends: %v", err)
			}
		})
	}
}

func send(t *testing.T, c *Conn, kind Kind, fds []int) {
	t.Helper()
	if err := c.Send(kind, nil, fds); err != nil {
		t.Fatal(err)
	}
}

// The socket is the user's alone. Who inherits it leaves the file, until it is its own;
// and those who connect are told of this process.
func TestListener(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	if err := os.WriteFile(path, nil, 0o600); err != nil { // stale
		t.Fatal(err)
	}
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info, err)
	}
	var heir net.Listener
	if err := FD(ln, func(fd int) { heir, err = Inherit(fd) }); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	Disown(ln)
	ln.Close()
	if err := Own(heir); err != nil {
		t.Fatal(err)
	}
	c, err := Dial(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if pid, err := c.Peer(); err != nil || pid != os.Getpid() {
		t.Errorf("the other end is %d, %v", pid, err)
	}
	heir.Close()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file is left: %v", err)
	}
}

// A socket whose file was removed is not found, also when another one is there. One
// that was moved is left to who did it.
func TestBound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	one, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	Disown(one)
	if err := errors.Join(os.Rename(path, path+".moved"), os.WriteFile(path, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if !Bound(one, path) || !Bound(one, path+".moved") {
		t.Error("it is taken for gone")
	}
	other, err := Listen(path)
	if err == nil {
		err = os.Remove(path + ".moved")
	}
	if err != nil {
		t.Fatal(err)
	}
	// Without CAP_NET_ADMIN the kernel does not say whose it is.
	if _, known := fileOf(one); known && Bound(one, path) {
		t.Error("another one's file is taken for its own")
	}
	if !Bound(other, path) {
		t.Error("the other one is taken for gone")
	}
	other.Close()
	if Bound(one, path) || Bound(other, path) {
		t.Error("what is gone is taken for there")
	}
}
