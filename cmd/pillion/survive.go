package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/cmd/pillion/keeper"
	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"github.com/pillion-project/pillion/telemetry/events"
	"github.com/pillion-project/pillion/telemetry/flowlog"
	"golang.org/x/sys/unix"
)

// settledAfter is how long a worker must have served for its death to be a new matter:
// see [keeper.Keeper.Settled].
const settledAfter = 10 * time.Second

// survival is what a worker of a keeper has of those before it. The nil pointer is
// that of a process without a keeper.
type survival struct {
	keeper   *keeper.Keeper
	registry *l4.Registry
	again    bool  // there was a worker before
	accepted []int // sockets that it accepted, and then nothing
}

// survive finds what the worker before left, and closes what is nobody's any more. It
// comes before anything is opened: the descriptors of then are that worker's.
func survive() (*survival, error) {
	k := keeper.Of()
	if k == nil {
		return nil, nil
	}
	open, err := k.Descriptors()
	if err != nil {
		return nil, err
	}
	s := &survival{keeper: k}
	if s.registry, err = l4.OpenRegistry(k.Memory, keeper.PageSize); err != nil {
		return nil, err
	}
	if s.again = s.registry.Began(open); !s.again {
		return s, nil
	}
	known := s.registry.Names()
	for _, fd := range open {
		switch {
		case known[fd]:
		case onSlot(fd) && l4.Untouched(fd):
			s.accepted = append(s.accepted, fd)
		default:
			// Of maps, programs, files, epoll instances, and of connections that
			// were being closed or not yet dialed.
			unix.Close(fd)
		}
	}
	return s, nil
}

// onSlot tells whether a descriptor is a socket whose own address is a slot.
func onSlot(fd int) bool {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return false
	}
	var addr netip.Addr
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		addr = netip.AddrFrom4(a.Addr)
	case *unix.SockaddrInet6:
		addr = netip.AddrFrom16(a.Addr).Unmap()
	default:
		return false
	}
	for _, p := range loader.Supernets() {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}

// startKeeper makes this process a keeper and its worker if the configuration asks for
// that and it is not yet. It returns only if there is nothing to do, or it fails.
func (g *global) startKeeper(c *config.Config) error {
	if c.Survive != config.SurviveCrash || g.survival != nil {
		return nil
	}
	if err := keeper.Start(); err != nil {
		return &exitError{code: exitUnsupported, err: fmt.Errorf("survive: crash: %w", err)}
	}
	return nil
}

// mainPID is the process that a service manager started.
func (s *survival) mainPID() int {
	if s == nil {
		return os.Getpid()
	}
	return os.Getppid()
}

// oneSignal is how far apart two signals are that are meant as two. A service manager
// or a terminal signals keeper and worker, and the keeper passes its own on.
const oneSignal = time.Second

// onceMore calls f when a signal that comes from then on is a second one.
func (s *survival) onceMore(f func()) {
	if s == nil {
		f()
		return
	}
	time.AfterFunc(oneSignal, f)
}

// memory is the registry; nil: there is none.
func (s *survival) memory() *l4.Registry {
	if s == nil {
		return nil
	}
	return s.registry
}

// revived tells whether connections of an earlier worker go on.
func (s *survival) revived() bool { return s != nil && s.again }

// follow has the registry hear of records that are written, or given to all sinks where
// nothing writes them.
func (s *survival) follow(sinks []events.Sink, log *flowlog.Log) []events.Sink {
	switch {
	case s == nil:
	case log != nil:
		log.Written(s.registry.Recorded)
	default:
		sinks = append(sinks, s)
	}
	return sinks
}

// Record implements [events.Sink].
func (s *survival) Record(r *flow.Record) { s.registry.Recorded(r) }

// frameTag is what the programs of the earlier worker know frames by. They are at work
// until this one's are attached, and connections are answered before; 0: a new one.
func (s *survival) frameTag() uint64 {
	if !s.revived() {
		return 0
	}
	return s.registry.Tag()
}

// keepTag has the next worker know it; d is nil where it could not be opened.
func (s *survival) keepTag(d *loader.Datapath) {
	if s != nil && d != nil {
		s.registry.SetTag(d.Handover().FrameTag)
	}
}

// listeners are those of the earlier worker, with what waits to be accepted.
func (s *survival) listeners() (all [2][]int) {
	if s.revived() {
		all = s.registry.Listeners()
	}
	return all
}

// workers is how many there were; 0: there were none.
func (s *survival) workers() int {
	all := s.listeners()
	return max(len(all[0]), len(all[1]))
}

// revive has the connections of the earlier worker go on. Accepting, and dialing, wait
// for the endpoints.
func (i *instance) revive() error {
	s := i.global.survival
	if !s.revived() {
		return nil
	}
	fault, how := s.keeper.Crashed()
	given := s.registry.Recover(fault)
	i.log.Warn("the handler was killed: its connections go on", "connections", len(given.Conns), "accepted", len(s.accepted),
		"how", how, "deaths", s.keeper.Deaths(), "pause", s.keeper.Since().Round(time.Microsecond))
	_, err := i.handler.Adopt(given)
	return err
}

// acceptAgain begins what revive put off.
func (i *instance) acceptAgain() {
	if s := i.global.survival; s.revived() {
		i.handler.Accept(s.accepted)
	}
}

// tellKeeper says that this process serves, until ctx is done.
func (i *instance) tellKeeper(ctx context.Context) error {
	s := i.global.survival
	s.keeper.Ready()
	if pauseFor(ctx, settledAfter) {
		s.keeper.Settled()
	}
	<-ctx.Done()
	return nil
}
