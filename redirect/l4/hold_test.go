package l4_test

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// The application's handshake ends when the dial has, and what the endpoint said
// before is there then.
func TestHeldUntilAnswered(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server := serve(t, loopback, func(c *net.TCPConn) {
			mustWrite(t, c, []byte("220 "))
			echo(c)
		})
		var told []time.Duration
		r, q := newHeldRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{server}, options: func(o *l4.Options) {
			o.Answered = func(_ netip.AddrPort, lasts time.Duration) { told = append(told, lasts) }
		}})
		c := q.connect(r.listeners[0]).conn()
		defer c.Close()
		wantBytes(t, c, []byte("220 "))
		mustExchange(t, c, "hello")
		c.Close()
		rec := r.awaitEnded(1)[0]
		wantEnd(t, rec, flow.ReasonClosed)
		r.close()
		if len(told) != 1 || told[0] <= 0 {
			t.Errorf("answers told: %v, want one", told)
		}
	})
}

// What the network answers is what the application gets.
func TestHeldAndRefused(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		var told []time.Duration
		r, q := newHeldRig(t, setup{loopback: loopback, endpoints: []netip.AddrPort{refusing(t, loopback)}, options: func(o *l4.Options) {
			o.Answered = func(_ netip.AddrPort, lasts time.Duration) { told = append(told, lasts) }
		}})
		q.connect(r.listeners[0]).wantRefusal(unix.ECONNREFUSED)
		wantEnd(t, r.awaitEnded(1)[0], flow.ReasonDialRefused)
		r.close()
		if len(told) != 1 || told[0] != 0 {
			t.Errorf("answers told: %v, want that there is none", told)
		}
		if s := r.relay.Stats(); s.Refused != 1 || s.Accepted != 0 {
			t.Errorf("stats: %+v", s)
		}
	})
}

// A retry is hidden: the application hears of the endpoint that answers.
func TestHeldWhileAnotherIsTried(t *testing.T) {
	good := serve(t, loopback4, echo)
	r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{refusing(t, loopback4), refusing(t, loopback4), good}})
	c := q.connect(r.listeners[0]).conn()
	defer c.Close()
	mustExchange(t, c, "hello")
	c.Close()
	if rec := r.awaitEnded(1)[0]; rec.Endpoint != good || rec.Attempts != 3 {
		t.Errorf("record: %+v", rec)
	}
}

// Errors that the system call gives at once are passed on as they are.
func TestHeldAndUnreachable(t *testing.T) {
	r, q := newHeldRig(t, setup{
		endpoints: []netip.AddrPort{netip.MustParseAddrPort("[fe80::1]:9")}, // without a scope
	})
	q.connect(r.listeners[0]).wantRefusal(unix.EINVAL)
	wantEnd(t, r.awaitEnded(1)[0], flow.ReasonDialFailed)
}

// An answer is repeated until the application shows that it has it.
func TestReleaseIsRepeated(t *testing.T) {
	server, conns := serveTo(t, loopback4)
	r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{server}})
	a := q.connect(r.listeners[0])
	c := a.conn()
	defer c.Close()
	receive(t, a.released) // it has not said anything
	mustWrite(t, c, []byte("x"))
	wantBytes(t, accept(t, conns), []byte("x"))
	for len(a.released) > 0 {
		<-a.released
	}
	select {
	case <-a.released:
		t.Error("repeated after it was heard")
	case <-time.After(300 * time.Millisecond): // three times as often
	}
}

// A refusal that the application's kernel misses is repeated until it is heard.
func TestRefusalIsRepeated(t *testing.T) {
	r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{refusing(t, loopback4)}})
	q.deaf = 5
	a := q.connect(r.listeners[0])
	for range 6 {
		if got := receive(t, a.refused); got != unix.ECONNREFUSED {
			t.Errorf("refused with %v", got)
		}
	}
	r.awaitEnded(1)
	r.close()
	if len(a.refused) != 0 {
		t.Errorf("refused %d times more after it was heard", len(a.refused))
	}
}

// The time for that is the same for a worker that has much else to do.
func TestRefusalIsRepeatedByABusyWorker(t *testing.T) {
	bad, good := refusing(t, loopback4), serve(t, loopback4, echo)
	r, q := newHeldRig(t, setup{perWorker: 2, endpoints: []netip.AddrPort{bad}, others: []netip.AddrPort{good}, direct: twoClusters})
	r.next.Store(0)
	busy := r.dial() // to the second listener
	done := make(chan struct{})
	var running sync.WaitGroup
	defer running.Wait()
	defer close(done)
	running.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				mustExchange(t, busy, "hello")
			}
		}
	})
	const times = 30
	q.deaf = times
	a := q.connect(r.listeners[0])
	receive(t, a.refused)
	receive(t, a.refused) // at once
	began := time.Now()
	for range times - 2 {
		receive(t, a.refused)
	}
	if d := time.Since(began); d < times/2*time.Millisecond {
		t.Errorf("%d refusals took %s", times-2, d)
	}
	receive(t, a.refused)
}

// Silence stays silence, and the next SYN is the next dial.
func TestHeldInSilence(t *testing.T) {
	listener, silent := hanging(t, loopback4)
	r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{silent}, options: func(o *l4.Options) {
		o.DialTimeout, o.DialBudget, o.Attempts = 200*time.Millisecond, 300*time.Millisecond, 1
	}})
	a := q.connect(r.listeners[0])
	r.awaitStats("the dial has failed", func(s l4.Stats) bool { return s.DialFailures == 1 })
	if s := r.relay.Stats(); len(a.refused) != 0 || s.Live != 1 || s.Dials != 1 {
		t.Errorf("%d refusals, %+v; want a connection that waits", len(a.refused), s)
	}
	acceptOne(t, listener) // room for the next dial
	a.again()
	c := a.conn()
	acceptOne(t, listener)
	c.Close()
	wantEnd(t, r.awaitEnded(1)[0], flow.ReasonClosed)
}

// An application that gives up takes its dial with it, also when only a look
// finds out.
func TestHeldAndGivenUp(t *testing.T) {
	for _, told := range []bool{true, false} {
		_, silent := hanging(t, loopback4)
		r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{silent}})
		a := q.connect(r.listeners[0])
		r.awaitStats("it is dialed", func(s l4.Stats) bool { return s.Dials == 1 })
		a.giveUp()
		if told {
			gone := a.held
			gone.Gone = true
			q.tell(gone)
		}
		wantEnd(t, r.awaitEnded(1)[0], flow.ReasonAbandoned)
		receive(t, a.forgot)
		r.close()
		if len(a.refused) != 0 {
			t.Errorf("told %v: refused one that gave up", told)
		}
	}
}

// Who gave up before anybody looked is no connection, and none that is unknown.
func TestHeldAndGone(t *testing.T) {
	r, q := newHeldRig(t, setup{direct: func(*rig, netip.AddrPort, netip.AddrPort) (l4.Target, error) {
		return l4.Target{}, flow.NewError(flow.ReasonNotOurs, "gone")
	}})
	a := q.connect(r.listeners[0])
	receive(t, a.forgot)
	r.close()
	if s := r.relay.Stats(); s != (l4.Stats{}) {
		t.Errorf("stats: %+v", s)
	}
}

// Another socket at the same address is another connection, also when the end of
// the first was lost.
func TestHeldAtTheSameAddress(t *testing.T) {
	_, silent := hanging(t, loopback4)
	r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{silent}})
	a := q.connect(r.listeners[0])
	r.awaitStats("it is dialed", func(s l4.Stats) bool { return s.Dials == 1 })
	a.giveUp()
	a.again()
	r.awaitStats("the other is dialed", func(s l4.Stats) bool { return s.Dials == 2 })
	wantEnd(t, r.awaitEnded(1)[0], flow.ReasonAbandoned)
}

// An answer that was let through after all makes the connection early.
func TestHeldAndLetThrough(t *testing.T) {
	listener, silent := hanging(t, loopback4)
	r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{silent}})
	a := q.connect(r.listeners[0])
	r.awaitStats("it is dialed", func(s l4.Stats) bool { return s.Dials == 1 })
	if err := unix.Connect(a.fd, sockaddrOf(a.held.Slot)); err != nil {
		t.Fatal(err)
	}
	c := a.file()
	mustWrite(t, c, []byte("early"))
	r.awaitStats("it is accepted", func(s l4.Stats) bool { return s.Accepted == 1 })
	acceptOne(t, listener) // the one that filled the queue
	fd, _, err := unix.Accept(listener)
	if err != nil {
		t.Fatal(err)
	}
	server := connOf(t, fd)
	defer server.Close()
	if err := server.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	wantBytes(t, server, []byte("early"))
	server.Close()
	c.Close()
	r.awaitEnded(1)
	if len(a.released) != 0 {
		t.Error("released what was let through")
	}
}

// News of a connection that was let through since, and accepted, is old.
func TestHeldIsOldNews(t *testing.T) {
	server, conns := serveTo(t, loopback4)
	r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{server}, direct: func(r *rig, local, remote netip.AddrPort) (l4.Target, error) {
		target := r.target(local, remote)
		target.Downstream.Waits = false
		return target, nil
	}})
	c := r.dial()
	mustWrite(t, c, []byte("x"))
	accept(t, conns)
	q.connect(r.listeners[0]) // its answer was let through as well
	r.awaitStats("the news is read", func(l4.Stats) bool { q.mu.Lock(); defer q.mu.Unlock(); return len(q.news) == 0 })
	mustWrite(t, c, []byte("y"))
	c.Close()
	for s := r.relay.Stats(); s.Dials != 1 || s.Live > 1; s = r.relay.Stats() {
		t.Fatalf("old news is dialed for: %+v", s)
	}
}

// An endpoint that resets at once has connected: so has the application.
func TestHeldAndResetAtOnce(t *testing.T) {
	server := serve(t, loopback4, reset)
	r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{server}})
	for range 50 {
		c := q.connect(r.listeners[0]).conn()
		if err := checkReset(c, nil); err != nil && !errors.Is(err, unix.EPIPE) {
			t.Error(err)
		}
		c.Close()
	}
	for _, rec := range r.awaitEnded(50) {
		wantEnd(t, rec, flow.ReasonUpstreamReset)
	}
}

// A container that has all its connections is refused another.
func TestHeldAndOverItsShare(t *testing.T) {
	server, conns := serveTo(t, loopback4)
	r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{server}, options: func(o *l4.Options) { o.MaxPerGroup = 1 }})
	first := q.connect(r.listeners[0]).conn()
	defer first.Close()
	accept(t, conns)
	q.connect(r.listeners[0]).wantRefusal(unix.ECONNREFUSED)
	wantEnd(t, r.awaitEnded(1)[0], flow.ReasonConnQuota)
}

// Draining lets those go on that wait for a dial, and refuses those that wait for
// nobody.
func TestDrainWhileHeld(t *testing.T) {
	listener, slow := hanging(t, loopback4)
	_, silent := hanging(t, loopback4)
	r, q := newHeldRig(t, setup{
		perWorker: 2, endpoints: []netip.AddrPort{slow}, others: []netip.AddrPort{silent}, direct: twoClusters,
		options: func(o *l4.Options) { o.DialTimeout, o.Attempts = 4*time.Second, 1 },
	})
	waits := q.connect(r.listeners[1])
	r.awaitStats("nobody answers", func(s l4.Stats) bool { return s.DialFailures == 1 })
	dialed := q.connect(r.listeners[0])
	r.awaitStats("it is dialed", func(s l4.Stats) bool { return s.Dials == 2 })
	r.drain()
	waits.wantRefusal(unix.ECONNREFUSED)
	acceptOne(t, listener)
	c := dialed.conn()
	acceptOne(t, listener)
	c.Close()
	testutil.Eventually(t, patience, func() bool { return r.relay.Stats().Live == 0 }, "the relay is drained")
}

// A connection that took the last place before accepting was tried again is
// accepted: it is the one that waits.
func TestHeldAtTheLimit(t *testing.T) {
	server := serve(t, loopback4, echo)
	r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{server}, options: func(o *l4.Options) { o.MaxConns = 1 }})
	first := r.dial()
	mustExchange(t, first, "hello")
	more := r.dial() // more than may be: accepting stops
	r.awaitStats("accepting has stopped", func(s l4.Stats) bool { return s.Pauses > 0 })
	reset(more)
	reset(first)
	r.awaitStats("a place is free", func(s l4.Stats) bool { return s.Ended > 0 })
	a := q.connect(r.listeners[0])
	testutil.Eventually(t, patience, func() bool {
		if len(a.released) > 0 {
			return true
		}
		a.again()
		return false
	}, "the place is its own")
	a.conn().Close()
}

// An answer that was let through after a silence begins another round of dials,
// which may take as long as any: how long it was silent does not count.
func TestHeldInSilenceAndLetThrough(t *testing.T) {
	listener, silent := hanging(t, loopback4)
	r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{silent}, options: func(o *l4.Options) {
		o.DialTimeout, o.DialBudget, o.Attempts = 4*time.Second, 4*time.Second, 1
	}})
	a := q.connect(r.listeners[0])
	r.awaitStats("the dial has failed", func(s l4.Stats) bool { return s.DialFailures == 1 })
	if err := unix.Connect(a.fd, sockaddrOf(a.held.Slot)); err != nil {
		t.Fatal(err)
	}
	c := a.file()
	r.awaitStats("it is dialed again", func(s l4.Stats) bool { return s.Dials == 2 })
	acceptOne(t, listener) // the SYN that comes again after a second finds room
	acceptOne(t, listener)
	c.Close()
	wantEnd(t, r.awaitEnded(1)[0], flow.ReasonClosed)
}

// What comes when the listeners are closed is refused: nobody would accept it.
func TestHeldAfterTheListeners(t *testing.T) {
	server := serve(t, loopback4, echo)
	r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{server}})
	open := r.dial()
	mustExchange(t, open, "hello")
	r.drain()
	testutil.Eventually(t, patience, func() bool {
		c, err := dialTo(r.listeners[0])
		if err == nil {
			c.Close()
		}
		return errors.Is(err, unix.ECONNREFUSED)
	}, "the listeners are closed")
	q.connect(r.listeners[0]).wantRefusal(unix.ECONNREFUSED)
	testutil.Eventually(t, patience, func() bool {
		r.records = r.relay.Ended(r.records)
		return slices.ContainsFunc(r.records, func(rec flow.Record) bool { return rec.End == flow.ReasonDrained })
	}, "it is on record")
	mustExchange(t, open, "hello")
	open.Close()
	r.close()
}

// A drain does not wait for those who wait for nobody, also when that is known
// only later.
func TestDrainBeforeSilence(t *testing.T) {
	_, silent := hanging(t, loopback4)
	r, q := newHeldRig(t, setup{endpoints: []netip.AddrPort{silent}, options: func(o *l4.Options) {
		o.DialTimeout, o.Attempts = 200*time.Millisecond, 1
	}})
	a := q.connect(r.listeners[0])
	r.awaitStats("it is dialed", func(s l4.Stats) bool { return s.Dials == 1 })
	r.drain()
	a.wantRefusal(unix.ECONNREFUSED)
	wantEnd(t, r.awaitEnded(1)[0], flow.ReasonDrained)
}
