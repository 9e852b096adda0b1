package l4_test

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"golang.org/x/sys/unix"
)

// freeze stops the relay, and returns what it has.
func (r *rig) freeze() *l4.Frozen {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	f, err := r.relay.Freeze(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	return f
}

// encoded is what another process reads: the bytes, and descriptors of its own.
func encoded(t testing.TB, f *l4.Frozen) *l4.Given {
	t.Helper()
	data, fds, err := f.Given().Encode()
	if err != nil {
		t.Fatal(err)
	}
	own := slices.Clone(fds)
	for i, fd := range fds {
		if own[i], err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
	}
	g, err := l4.DecodeGiven(data, own)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// closeAll closes the descriptors of one side, as the end of its process does.
func closeAll(g *l4.Given) {
	for i := range g.Conns {
		c := &g.Conns[i]
		for _, fd := range []int{c.Down.FD, c.Down.PipeRead, c.Down.PipeWrite, c.Up.FD, c.Up.PipeRead, c.Up.PipeWrite} {
			if fd >= 0 {
				unix.Close(fd)
			}
		}
	}
}

// successor moves everything to a second relay, as to another process, and makes it
// the rig's. What happens between is done by meanwhile.
func (r *rig) successor(meanwhile func()) {
	r.t.Helper()
	var listeners [][]int
	for _, fds := range r.open.Listeners {
		var own []int
		for _, fd := range fds {
			dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				r.t.Fatal(err)
			}
			own = append(own, dup)
		}
		listeners = append(listeners, own)
	}
	f := r.freeze()
	g := encoded(r.t, f)
	o := r.open
	if r.killed {
		memory := memoryOf(r.t)
		openRegistry(r.t, memory).Keep(g)
		o.Registry = openRegistry(r.t, memory)
	}
	f.Leave()
	if err := receive(r.t, r.done); err != nil {
		r.t.Fatal(err)
	}
	closeAll(f.Given())
	r.records = r.relay.Ended(r.records)
	if meanwhile != nil {
		meanwhile()
	}
	if r.killed {
		g = o.Registry.Recover(false)
	}
	o.Listeners = listeners
	before := r.relay.Stats()
	relay, err := l4.New(o, r)
	if err != nil {
		r.t.Fatal(err)
	}
	r.moved.Accepted += before.Accepted
	r.moved.Refused += before.Refused
	r.moved.Ended += before.Ended
	r.moved.Unknown += before.Unknown
	r.moved.Lost += before.Lost
	r.relay, r.open = relay, o
	done := relay.Adopt(g, func(c *l4.Carried) l4.Target {
		t := l4.Target{Downstream: c.Downstream, Terms: r.terms}
		for _, cluster := range r.clusters {
			if cluster.Name == c.Cluster {
				t.Cluster = cluster
			}
		}
		return t
	})
	if done == nil {
		r.t.Fatal("a worker has ended")
	}
	r.run()
	receive(r.t, done)
}

// A connection that talks goes on, and its record is one of all of it.
func TestMoveWhileTalking(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server := serve(t, loopback, echo)
		r := newRig(t, setup{loopback: loopback, workers: 2, endpoints: []netip.AddrPort{server}})
		c := r.dial()
		begun := time.Now()
		mustExchange(t, c, "before")
		for n := range 3 {
			r.killed = n == 1
			// What comes and ends while nobody looks is seen afterwards.
			r.successor(func() { mustWrite(t, c, []byte("between")) })
			wantBytes(t, c, []byte("between"))
			mustExchange(t, c, "after")
		}
		r.successor(func() {
			if err := c.CloseWrite(); err != nil {
				t.Error(err)
			}
		})
		wantEOF(t, c)
		rec := r.awaitEnded(1)[0]
		want := uint64(len("before") + 3*len("between"+"after"))
		if rec.Sent != want || rec.Received != want || rec.End != flow.ReasonClosed || rec.Service != "web" ||
			rec.Cluster != "test" || rec.Endpoint != server || rec.Cookie != 1 || rec.Attempts != 1 || rec.Start.Sub(begun).Abs() > patience {
			t.Errorf("record %+v", rec)
		}
		r.close()
	})
}

// A reset while nobody looks is passed on.
func TestMoveReset(t *testing.T) {
	server, conns := serveTo(t, loopback4)
	r := newRig(t, setup{endpoints: []netip.AddrPort{server}})
	c, s := r.opened(t, conns)
	r.successor(func() {
		mustWrite(t, s, []byte("last words"))
		reset(s)
	})
	wantReset(t, c, []byte("last words"))
	if rec := r.awaitEnded(1)[0]; rec.End != flow.ReasonUpstreamReset {
		t.Errorf("ended by %s", rec.End)
	}
	r.close()
}

// Bytes that wait for a reader, in a buffer and in a pipe, come in their order, and
// then the end of file that was behind them.
func TestMoveUnsent(t *testing.T) {
	for name, size := range map[string]int{"some": 3 << 20, "bulk": 12 << 20, "some, killed": 3 << 20, "bulk, killed": 12 << 20} {
		t.Run(name, func(t *testing.T) {
			server, conns := serveTo(t, loopback4)
			r := newRig(t, setup{endpoints: []netip.AddrPort{server}, killed: strings.HasSuffix(name, "killed")})
			c := r.dial()
			b := randomBytes(size)
			done := make(chan error, 1)
			go func() {
				_, err := c.Write(b)
				if err == nil {
					err = c.CloseWrite()
				}
				done <- err
			}()
			s := accept(t, conns)
			wantBytes(t, s, b[:100])
			stuck := 0
			for moves := 0; moves < 4; moves++ {
				time.Sleep(20 * time.Millisecond)
				r.successor(nil)
				f := r.freeze()
				for _, g := range f.Given().Conns {
					stuck += len(g.Down.Rest) + g.Down.InPipe
				}
				f.Thaw()
			}
			wantBytes(t, s, b[100:])
			wantEOF(t, s)
			if err := <-done; err != nil {
				t.Error(err)
			}
			s.Close()
			wantEOF(t, c)
			if size > 10<<20 && stuck == 0 {
				t.Error("nothing was ever in the relay's hands")
			}
			r.close()
		})
	}
}

// A connection whose one side has ended stays half open.
func TestMoveHalfClosed(t *testing.T) {
	t.Run("given", func(t *testing.T) { moveHalfClosed(t, false) })
	t.Run("killed", func(t *testing.T) { moveHalfClosed(t, true) })
}

func moveHalfClosed(t *testing.T, killed bool) {
	server, conns := serveTo(t, loopback4)
	r := newRig(t, setup{endpoints: []netip.AddrPort{server}, killed: killed})
	c := r.dial()
	mustWrite(t, c, []byte("x"))
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	s := accept(t, conns)
	wantBytes(t, s, []byte("x"))
	wantEOF(t, s)
	r.successor(nil)
	mustWrite(t, s, []byte("still here"))
	wantBytes(t, c, []byte("still here"))
	r.successor(nil)
	s.Close()
	wantEOF(t, c)
	r.close()
}

// An urgent byte that comes while nobody looks is no part of the stream.
func TestMoveUrgent(t *testing.T) {
	for _, between := range []bool{false, true} {
		server, conns := serveTo(t, loopback4)
		r := newRig(t, setup{endpoints: []netip.AddrPort{server}})
		c := r.dial()
		mustWrite(t, c, []byte("a"))
		s := accept(t, conns)
		wantBytes(t, s, []byte("a"))
		urgent := func() {
			if err := writeUrgent(c, '!'); err != nil {
				t.Fatal(err)
			}
			mustWrite(t, c, []byte("bc"))
		}
		if !between {
			urgent()
		}
		r.successor(func() {
			if between {
				urgent()
			}
		})
		wantBytes(t, s, []byte("bc"))
		mustWrite(t, c, []byte("d"))
		r.successor(nil)
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		wantBytes(t, s, []byte("d"))
		wantEOF(t, s)
		s.Close()
		wantEOF(t, c)
		r.close()
	}
}

// A dial that is under way is answered, or fails, at the other relay.
func TestMoveDialing(t *testing.T) {
	hanger, at := hanging(t, loopback4)
	r := newRig(t, setup{endpoints: []netip.AddrPort{at}})
	c := r.dial()
	mustWrite(t, c, []byte("early"))
	r.awaitStats("a dial is under way", func(s l4.Stats) bool { return s.Dials == 1 })
	r.successor(nil)
	acceptOne(t, hanger) // room for the next
	fd, _, err := unix.Accept(hanger)
	if err != nil {
		t.Fatal(err)
	}
	s := connOf(t, fd)
	wantBytes(t, s, []byte("early"))
	s.Close()
	wantEOF(t, c)
	c.Close()
	r.close()
	if rec := r.records[0]; rec.Attempts != 1 || rec.Connect == 0 {
		t.Errorf("record %+v", rec)
	}
}

// A dial that has failed meanwhile is tried on another endpoint.
func TestMoveDialFailed(t *testing.T) {
	server := serve(t, loopback4, echo)
	hanger, at := hanging(t, loopback4)
	r := newRig(t, setup{endpoints: []netip.AddrPort{at, server}, options: func(o *l4.Options) { o.DialTimeout = 500 * time.Millisecond }})
	_ = hanger
	c := r.dial()
	r.awaitStats("a dial is under way", func(s l4.Stats) bool { return s.Dials >= 1 })
	r.successor(nil)
	mustExchange(t, c, "hello")
	c.Close()
	if rec := r.awaitEnded(1)[0]; rec.Attempts != 2 || rec.Endpoint != server {
		t.Errorf("record %+v", rec)
	}
	r.close()
}

// A handshake that waits for its dial goes on waiting at the other relay: for an
// answer, for a refusal, or with the application.
func TestMoveHeld(t *testing.T) {
	server := serve(t, loopback4, echo)
	hanger, at := hanging(t, loopback4)
	r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{at, server}})
	a := q.connect(r.listeners[0])
	r.awaitStats("a dial is under way", func(s l4.Stats) bool { return s.Dials == 1 })
	r.successor(nil)
	acceptOne(t, hanger)
	fd, _, err := unix.Accept(hanger)
	if err != nil {
		t.Fatal(err)
	}
	s := connOf(t, fd)
	c := a.conn()
	mustWrite(t, c, []byte("to the first"))
	wantBytes(t, s, []byte("to the first"))
	s.Close()
	wantEOF(t, c)
	c.Close()
	wantEnd(t, r.awaitEnded(1)[0], flow.ReasonClosed)
	r.close()
}

// One that gives up while nobody looks is abandoned.
func TestMoveHeldGivesUp(t *testing.T) {
	_, at := hanging(t, loopback4)
	r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{at}})
	a := q.connect(r.listeners[0])
	r.awaitStats("a dial is under way", func(s l4.Stats) bool { return s.Dials == 1 })
	r.successor(a.giveUp)
	wantEnd(t, r.awaitEnded(1)[0], flow.ReasonAbandoned)
	r.close()
}

// After a freeze that came to nothing everything goes on, and ends when it is to,
// although somebody has copies.
func TestFreezeIsTakenBack(t *testing.T) {
	server, conns := serveTo(t, loopback4)
	r := newRig(t, setup{workers: 2, endpoints: []netip.AddrPort{server}})
	var apps, servers [2]*net.TCPConn
	for i := range apps {
		apps[i] = r.dial()
		mustWrite(t, apps[i], []byte("x"))
		servers[i] = accept(t, conns)
		wantBytes(t, servers[i], []byte("x"))
	}
	f := r.freeze()
	copies := encoded(t, f)
	defer closeAll(copies)
	if len(copies.Conns) != 2 {
		t.Fatalf("%d connections, want 2", len(copies.Conns))
	}
	mustWrite(t, apps[0], []byte("meanwhile"))
	f.Copied()
	f.Thaw()
	wantBytes(t, servers[0], []byte("meanwhile"))
	if err := apps[0].CloseWrite(); err != nil {
		t.Fatal(err)
	}
	wantEOF(t, servers[0])
	servers[0].Close()
	wantEOF(t, apps[0])
	reset(servers[1])
	wantReset(t, apps[1], nil)
	r.close()
}

// A worker that does not come to rest is not waited for, and nothing has happened.
func TestFreezeInVain(t *testing.T) {
	server := serve(t, loopback4, echo)
	r := newRig(t, setup{workers: 2, endpoints: []netip.AddrPort{server}})
	c := r.dial()
	mustExchange(t, c, "before")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for range 100 {
		f, err := r.relay.Freeze(ctx)
		if err == nil {
			f.Thaw() // both were quick
		}
	}
	mustExchange(t, c, "after")
	c.Close()
	r.close()
}
