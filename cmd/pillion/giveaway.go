package main

import (
	"bytes"
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/cmd/pillion/handover"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"github.com/pillion-project/pillion/telemetry/events"
	"golang.org/x/sys/unix"
)

// This file is the side of the process that gives its instance away; takeover.go is
// that of the one that takes it.

const (
	// prepareLimit is how long a taker may take from its first word until it is
	// ready: it loads programs and asks its sources. Nothing waits for it.
	prepareLimit = 2 * time.Minute
	// settleLimit is how long a taker waits while this process, which has taken over a
	// moment ago itself, moves the maps: less than helloLimit.
	settleLimit = 20 * time.Second
	// restLimit is how long the parts of this process may take to come to rest.
	restLimit = 5 * time.Second
	// haveLimit is how long a taker may take to say that it has everything, and
	// haveEach how much longer for each connection. The open connections stand still
	// meanwhile, and go on here when it is over.
	haveLimit = 2 * time.Second
	haveEach  = 50 * time.Microsecond
	// lastBeat is how much longer than that the last sign of life holds, so that
	// connections are redirected until the taker has its own.
	lastBeat = 500 * time.Millisecond
	// farewellLimit bounds what comes after all is done.
	farewellLimit = 5 * time.Second
)

// haveWithin is the limit for so many connections.
func haveWithin(connections int) time.Duration {
	return haveLimit + time.Duration(connections)*haveEach
}

// errHandedOver ends a process whose instance is another's by now.
var errHandedOver = errors.New("another process has taken over")

// handed is what is given, beside the connections themselves.
type handed struct {
	// At is when everything stood still, in ns of CLOCK_MONOTONIC.
	At          int64
	Connections []byte // of l4.Given
	Halves      []events.Half
	Services    []handover.Service
	Removals    []handedRemoval
	Former      map[string][]formerly // as in note
	Totals      handedTotals
}

// handedRemoval is an endpoint whose connections are to be ended, after so long.
type handedRemoval struct {
	Service        string
	Addr, Endpoint netip.AddrPort
	After          time.Duration
}

// farewell is what comes when the taker is at work already.
type farewell struct {
	History []flow.Record
}

func (i *instance) takeoverPath() string { return i.global.takeoverPath(i.name) }

// listenForTakers opens the socket that takers come to, or takes it over too.
func (i *instance) listenForTakers() error {
	var err error
	if i.takers = i.earlier("takers"); i.takers == nil {
		i.takers, err = handover.Listen(i.takeoverPath())
	}
	return err
}

// giveAway serves takers, one after the other, until ctx is done or one has the
// instance: then it returns errHandedOver. Where somebody has removed their socket it
// makes that again, but not while it talks to one, who has the old one.
func (i *instance) giveAway(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { i.takersSocket().Close() })
	defer stop()
	for {
		conn, err := acceptWithin(i.takersSocket(), socketEvery)
		if errors.Is(err, net.ErrClosed) || ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			if err := i.renewTakers(ctx); err != nil {
				return nil // it ends
			}
			continue
		}
		if err != nil {
			i.log.Error("somebody came to take over, and was sent away", "error", err)
			if !pauseFor(ctx, time.Second) {
				return nil
			}
			continue
		}
		interrupt := context.AfterFunc(ctx, conn.Interrupt)
		gave, err := i.talkTo(ctx, conn)
		interrupt()
		conn.Close()
		if gave {
			return errHandedOver
		}
		i.log.Warn("nothing was handed over: this process goes on", "why", err)
	}
}

// pauseFor waits, and returns false when ctx is done first.
func pauseFor(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// talkTo talks to one taker, and tells whether it has the instance.
func (i *instance) talkTo(ctx context.Context, conn *handover.Conn) (gave bool, err error) {
	conn.Within(prepareLimit)
	f, err := conn.Expect(handover.KindHello)
	if err != nil {
		return false, fmt.Errorf("a taker came, and said nothing: %w", err)
	}
	f.Close()
	var hello handover.Hello
	if err := json.Unmarshal(f.Data, &hello); err != nil {
		return false, refuse(conn, fmt.Errorf("its first word is not understood: %w", err))
	}
	if err := i.suits(&hello); err != nil {
		return false, refuse(conn, err)
	}
	settling, cancel := context.WithTimeout(ctx, settleLimit)
	err = i.datapath.Settled(settling)
	cancel()
	if err != nil {
		return false, refuse(conn, fmt.Errorf("this process is moving the maps itself: %w", err))
	}
	if err := i.welcome(conn); err != nil {
		return false, err
	}
	i.log.Info("another process prepares to take over", "pid", hello.Pid, "version", hello.Build)
	if _, err := conn.Expect(handover.KindFreeze); err != nil {
		return false, fmt.Errorf("the taker has not become ready: %w", err)
	}
	if err := i.suits(&hello); err != nil { // it may have begun to drain meanwhile
		return false, refuse(conn, err)
	}
	i.giving.Lock()
	defer i.giving.Unlock()
	if i.gone.Load() {
		return false, refuse(conn, errHandedOver)
	}
	still, err := i.comeToRest(ctx)
	if err != nil {
		return false, refuse(conn, err)
	}
	given, err := i.give(conn, still)
	if err != nil {
		still.goOn()
		return false, abort(conn, err)
	}
	history, err := still.leave()
	if err != nil {
		i.log.Error("not all of what was handed over could be let go of", "error", err)
	}
	i.log.Info("handed over", "pid", hello.Pid, "version", hello.Build, "connections", given)
	// Only the main process may say who that is, as a rule.
	if pid, err := conn.Peer(); err == nil && pid > 0 {
		_ = notify(fmt.Sprintf("MAINPID=%d", pid))
	}
	conn.Within(farewellLimit)
	var b bytes.Buffer
	if err := gob.NewEncoder(&b).Encode(farewell{History: history}); err == nil {
		_ = conn.Send(handover.KindFarewell, b.Bytes(), nil)
	}
	return true, nil
}

// refuse tells a taker why it gets nothing, and returns that.
func refuse(conn *handover.Conn, why error) error {
	conn.Within(time.Second)
	return errors.Join(why, conn.SendJSON(handover.KindRefusal, handover.Refusal{Why: why.Error()}, nil))
}

// abort is refuse for one that has something in hand.
func abort(conn *handover.Conn, why error) error {
	conn.Within(time.Second)
	return errors.Join(why, conn.SendJSON(handover.KindAbort, handover.Refusal{Why: why.Error()}, nil))
}

// suits says what speaks against a taker.
func (i *instance) suits(h *handover.Hello) error {
	switch {
	case h.Protocol != handover.Protocol:
		return fmt.Errorf("protocol %d is asked for, this process (%s) speaks %d", h.Protocol, buildVersion(), handover.Protocol)
	case h.Instance != i.name:
		return fmt.Errorf("instance %q is asked for, this is %q", h.Instance, i.name)
	case h.ABI != bpf.ABI && !h.Moves:
		return fmt.Errorf("its maps have layout %d, those of this process (%s) have %d", h.ABI, buildVersion(), bpf.ABI)
	case h.Carry != l4.CarryVersion:
		return fmt.Errorf("it reads connections of version %d, this process (%s) writes %d", h.Carry, buildVersion(), l4.CarryVersion)
	case i.draining.Load():
		return errors.New("this process is draining")
	case !i.ready.Load():
		return errors.New("this process is not ready itself")
	default:
		return nil
	}
}

// welcome sends what a taker prepares with. All of it goes on being used here.
func (i *instance) welcome(conn *handover.Conn) error {
	h := i.datapath.Handover()
	v4, v6 := i.handler.Listeners()
	w := handover.Welcome{
		Build: buildVersion(), Pid: os.Getpid(), FrameTag: h.FrameTag,
		Listeners: [2]int{len(v4), len(v6)}, Rings: len(h.Rings), Services: i.control.tell(),
		Live: i.handler.Stats().Live, Answered: i.discovered(),
	}
	var fds []int
	for _, list := range [][]int{v4, v6, h.Rings} {
		fds = append(fds, list...)
	}
	for _, s := range i.sockets() {
		if s.ln == nil {
			continue
		}
		err := handover.FD(s.ln, func(fd int) {
			dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
			if err == nil {
				w.Sockets = append(w.Sockets, s.name)
				fds = append(fds, dup)
			}
		})
		if err != nil {
			i.log.Warn("a socket is not handed over", "socket", s.name, "error", err)
		}
	}
	err := conn.SendJSON(handover.KindWelcome, w, fds)
	for _, fd := range fds[len(fds)-len(w.Sockets):] {
		unix.Close(fd)
	}
	return err
}

// tell returns the services in force for a taker.
func (c *control) tell() []handover.Service {
	var all []handover.Service
	for _, v := range c.list() {
		h := handover.Service{Name: v.Name, Addr: v.Addr}
		for _, e := range v.endpoints {
			h.Endpoints = append(h.Endpoints, handover.Endpoint{Addr: e.Addr, Weight: e.Weight, Zone: e.Zone})
		}
		if v.known {
			all = append(all, h)
		}
	}
	return all
}

// namedSocket is one that serves over HTTP, or takers.
type namedSocket struct {
	name string
	ln   net.Listener
}

func (i *instance) sockets() []namedSocket {
	return []namedSocket{{"admin", i.adminSocket()}, {"takers", i.takersSocket()}, {"metrics", i.public}, {"probes", i.probes}}
}

// standstill is an instance of which nothing moves.
type standstill struct {
	i     *instance
	since time.Time
	ends  []func(left bool) error // in the order in which it was made
	loud  func()                  // ends that no garbage is collected
	relay *l4.Frozen
	halve []events.Half
}

// comeToRest stops everything that changes anything, in the order in which one
// depends on the other: the connections last, so that they stand still for the
// shortest time.
func (i *instance) comeToRest(ctx context.Context) (*standstill, error) {
	ctx, cancel := context.WithTimeout(ctx, restLimit)
	defer cancel()
	s := &standstill{i: i, loud: quiet()}
	end, err := i.control.freeze(ctx)
	if err != nil {
		s.goOn()
		return nil, err
	}
	s.ends = append(s.ends, func(left bool) error { end(left); return nil })
	thaw := i.datapath.Freeze()
	s.ends = append(s.ends, func(left bool) error { thaw(left); return nil })
	collector := i.collector.Freeze()
	s.ends = append(s.ends, func(left bool) error {
		if left {
			return collector.Leave()
		}
		collector.Thaw()
		return nil
	})
	beat, err := i.beat.Freeze(haveWithin(i.handler.Stats().Live) + lastBeat)
	s.ends = append(s.ends, func(left bool) error { beat(left); return nil })
	if err == nil {
		s.since = time.Now()
		s.relay, err = i.handler.Freeze(ctx)
	}
	if err != nil {
		s.goOn()
		return nil, err
	}
	s.halve = collector.Halves()
	return s, nil
}

// goOn undoes comeToRest.
func (s *standstill) goOn() {
	defer s.loud()
	if s.relay != nil {
		s.relay.Thaw()
	}
	for n := range s.ends {
		_ = s.ends[len(s.ends)-1-n](false)
	}
}

// leave lets go of everything for good, and returns the history of flows.
func (s *standstill) leave() ([]flow.Record, error) {
	defer s.loud()
	s.relay.Leave()
	s.i.gone.Store(true)
	for _, n := range s.i.sockets() {
		handover.Disown(n.ln)
	}
	history := s.i.collector.History()
	var errs []error
	for n := range s.ends {
		errs = append(errs, s.ends[len(s.ends)-1-n](true))
	}
	return history, errors.Join(errs...)
}

// give sends everything, and returns how many connections that were, when the taker
// has it all. An error means that it has nothing.
func (i *instance) give(conn *handover.Conn, s *standstill) (connections int, err error) {
	conn.Within(haveWithin(len(s.relay.Given().Conns)))
	left := i.global.survival
	defer func() {
		if err != nil {
			left.noteGiving(conn, l4.GivingNothing)
		}
	}()
	left.noteGiving(conn, l4.GivingBegun)
	n, err := i.giveState(conn, s)
	if err != nil {
		return 0, err
	}
	left.noteGiving(conn, l4.GivingSent)
	if _, err := conn.Expect(handover.KindHave); err != nil {
		return 0, fmt.Errorf("the taker has not said that it has everything: %w", err)
	}
	left.noteGiving(conn, l4.GivingGone)
	if err := conn.Send(handover.KindCommit, nil, nil); err != nil {
		return 0, fmt.Errorf("hand over: %w", err)
	}
	return n, nil
}

// giveState sends what is not in the welcome, and returns how many connections that
// is.
func (i *instance) giveState(conn *handover.Conn, s *standstill) (connections int, err error) {
	given := s.relay.Given()
	data, fds, err := given.Encode()
	if err != nil {
		return 0, err
	}
	state := handed{Connections: data, Services: i.control.tell(), Former: i.control.former, Halves: s.halve, At: monotonicNow() - int64(time.Since(s.since))}
	for _, r := range i.control.removals.all() {
		state.Removals = append(state.Removals, handedRemoval{
			Service: r.service, Addr: r.addr, Endpoint: r.endpoint, After: max(time.Until(r.at), 0),
		})
	}
	state.Totals = i.totals()
	var b bytes.Buffer
	if err := gob.NewEncoder(&b).Encode(state); err != nil {
		return 0, fmt.Errorf("encode what is handed over: %w", err)
	}
	s.relay.Copied()
	// The lock goes first.
	if err := conn.Send(handover.KindState, b.Bytes(), append([]int{i.datapath.Lock()}, fds...)); err != nil {
		return 0, fmt.Errorf("hand over: %w", err)
	}
	return len(given.Conns), nil
}

// quiet has no garbage collected until the returned function is called: it would take
// its share of a pause that is as short as one.
func quiet() (loud func()) {
	before := debug.SetGCPercent(-1)
	return func() { debug.SetGCPercent(before) }
}

func monotonicNow() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // cannot fail with this clock
	return ts.Nano()
}
