package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/cmd/pillion/handover"
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
	// What it left besides connections: see loader.Options and sockets. They are taken
	// out when they are used.
	handles map[string]int
	sockets map[string]int
	litter  []int    // descriptors that are nobody's any more; see clean
	text    *os.File // what lastGood is in
	build   string   // whose handles are of use; empty: nobody's
}

// survive finds what the worker before left. It comes before anything is opened: the
// descriptors of then are that worker's.
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
	s.build = thisBuild()
	if s.again = s.registry.Began(open); !s.again {
		return s, nil
	}
	ours := s.ours()
	known := s.registry.Names()
	s.handles = s.others(known, s.registry.Handles(s.build))
	s.sockets = s.others(known, s.registry.Sockets())
	if fd, ok := s.sockets[lastGood]; ok {
		delete(s.sockets, lastGood)
		s.text = os.NewFile(uintptr(fd), lastGood)
	}
	if how, fd := s.registry.Giving(); how != l4.GivingNothing {
		known[fd] = true
	}
	if how, fd := s.registry.Taking(); how != l4.TakingNothing && fd >= 0 {
		known[fd] = true
	}
	for _, fd := range open {
		switch {
		case known[fd]:
		case ours && onSlot(fd) && l4.Untouched(fd):
			s.accepted = append(s.accepted, fd)
		default:
			// Of files, epoll instances, and of connections that were being closed
			// or not yet dialed.
			s.litter = append(s.litter, fd)
		}
	}
	return s, nil
}

// clean closes what is nobody's any more. It takes some milliseconds.
func (s *survival) clean() {
	if s == nil {
		return
	}
	for _, fd := range s.litter {
		unix.Close(fd)
	}
	s.litter = nil
}

// thisBuild is the file that this process runs, also when another one has its name by
// now.
func thisBuild() string {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/exe", &st); err != nil {
		return ""
	}
	return fmt.Sprintf("%d:%d:%d:%d", st.Dev, st.Ino, st.Size, st.Mtim.Nano())
}

// others are descriptors that are to stay open, which it adds to known. If one is there
// already they are none: the registry is wrong.
func (s *survival) others(known map[int]bool, all map[string]int) map[string]int {
	for _, fd := range all {
		if known[fd] {
			return nil
		}
	}
	for _, fd := range all {
		known[fd] = true
	}
	return all
}

// keepHandles has the next worker know the descriptors of the kernel side; nil: there
// are none.
func (s *survival) keepHandles(all map[string]int) {
	if s == nil || s.build == "" {
		return
	}
	if all == nil {
		s.registry.DropHandles()
	} else {
		s.registry.SetHandles(s.build, all)
	}
}

// resume goes on with the kernel side of the earlier worker. It returns nil if there is
// none to go on with.
func (s *survival) resume(o loader.Options) *loader.Datapath {
	if s == nil || len(s.handles) == 0 {
		return nil
	}
	o.Handles, s.handles = s.handles, nil
	d, err := loader.Resume(o)
	if err != nil {
		o.Log.Warn("the programs are loaded again", "why", err)
		return nil
	}
	return d
}

// socket returns one of the earlier worker; nil: there was none.
func (s *survival) socket(name string) net.Listener {
	if s == nil {
		return nil
	}
	fd, ok := s.sockets[name]
	if !ok {
		return nil
	}
	delete(s.sockets, name)
	defer unix.Close(fd)
	ln, err := handover.Inherit(fd)
	if err == nil {
		s.keepSocket(name, ln)
		err = handover.Own(ln)
	}
	if err != nil {
		s.registry.DropSocket(name)
		return nil
	}
	return ln
}

// socketAt is socket for one that is only of use at a certain address.
func (s *survival) socketAt(name string, a netip.AddrPort) net.Listener {
	ln := s.socket(name)
	if ln == nil || ln.Addr().String() == a.String() {
		return ln
	}
	s.dropSocket(name)
	ln.Close()
	return nil
}

// keepSocket has the next worker find it: who connects meanwhile waits. It is closed by
// dropSocket, or after it.
func (s *survival) keepSocket(name string, ln net.Listener) {
	if s != nil && ln != nil {
		_ = handover.FD(ln, func(fd int) { s.registry.KeepSocket(name, fd) })
	}
}

// dropSocket comes before it is closed.
func (s *survival) dropSocket(name string) {
	if s != nil {
		s.registry.DropSocket(name)
	}
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

// reviving tells whether the instance goes on where an earlier worker was killed.
func (i *instance) reviving() bool { return i.global.survival.revived() && i.taking == nil }

// inCharge tells whether an earlier worker had the instance already, so that there is
// nobody to take it over from.
func (s *survival) inCharge() bool { return s.revived() && s.registry.Charged() }

// owned has the next worker know that the instance is this process's, and its sockets.
func (i *instance) owned() {
	s := i.global.survival
	if s == nil {
		return
	}
	for _, at := range i.sockets() {
		s.keepSocket(at.name, at.ln)
	}
	s.registry.SetCharged()
	s.noteTaking(nil, l4.TakingNothing)
}

// revive has the connections of the earlier worker go on, before all else. Accepting, and
// dialing, wait for the endpoints.
func (i *instance) revive(carry func()) error {
	if !i.reviving() {
		return nil
	}
	s := i.global.survival
	fault, how := s.keeper.Crashed()
	given := s.registry.Recover(fault)
	if _, err := i.handler.Adopt(given); err != nil {
		i.handler.Close()
		return err
	}
	carry()
	i.log.Warn("the handler was killed: its connections go on", "connections", len(given.Conns), "accepted", len(s.accepted),
		"how", how, "deaths", s.keeper.Deaths(), "pause", s.keeper.Since().Round(time.Microsecond))
	if i.datapath.Resumed() {
		return i.resume()
	}
	return nil
}

// resume is what a start does before it has connections, when they go on already.
func (i *instance) resume() error {
	i.global.survival.clean()
	if err := i.datapath.Charge(); err != nil {
		return err
	}
	if _, err := i.datapath.Sync(); err != nil {
		return err
	}
	return i.assembleRest(i.rules(i.plan.config, i.control.list()))
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

// inherited are listeners of an earlier process.
func (i *instance) inherited() [2][]int {
	if i.taking != nil {
		return i.taking.takeListeners()
	}
	return i.global.survival.listeners()
}

// earlier returns a socket of the process before; nil: there was none.
func (i *instance) earlier(name string) net.Listener {
	if ln := i.taking.socket(name); ln != nil {
		return ln
	}
	return i.global.survival.socket(name)
}

// queues are how the workers hear of handshakes that wait.
func (i *instance) queues(workers int) ([]l4.Queue, error) {
	list, err := i.datapath.Joined(), error(nil)
	if i.taking == nil && !i.datapath.Resumed() {
		list, err = i.datapath.Queues(workers)
	}
	all := make([]l4.Queue, 0, len(list))
	for _, q := range list {
		all = append(all, q)
	}
	return all, err
}
