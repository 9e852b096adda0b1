package main

import (
	"bytes"
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/cmd/pillion/handover"
	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/capture"
	"github.com/pillion-project/pillion/redirect/l4"
	"github.com/pillion-project/pillion/redirect/upstream/discover"
	"github.com/pillion-project/pillion/telemetry/admin"
	"golang.org/x/sys/unix"
)

const (
	// helloLimit is how long a giver may take to answer: it may be talking to
	// another taker.
	helloLimit = 30 * time.Second
	// commitLimit is how long its last word may take.
	commitLimit = 5 * time.Second
	// deathLimit is how long a dying process may keep its lock.
	deathLimit = 2 * time.Second
	// leaveLimit is how long one may that has given all, and ends: who reads from its
	// sockets is waited for.
	leaveLimit = 10 * time.Second
)

// taking is an instance that is being taken over from another process. The nil
// pointer is one that is not.
type taking struct {
	conn    *handover.Conn
	welcome handover.Welcome
	// What came with the welcome, and is not used yet.
	listeners [2][]int
	rings     []int
	sockets   map[string]net.Listener
	byName    map[string]int // where services are in it; nil: see told

	state handed // once it is there
	lock  *os.File
	given *l4.Given
	conns int           // how many that are
	at    time.Time     // when the instance became ours
	pause time.Duration // how long connections stood still, once that is over
	loud  func()        // ends that no garbage is collected
}

// status is for the admin socket.
func (t *taking) status() *admin.TakenOver {
	if t == nil {
		return nil
	}
	return &admin.TakenOver{
		At: t.at, Pid: t.welcome.Pid, Version: t.welcome.Build, Connections: t.conns, Pause: t.pause,
	}
}

func (g *global) takeoverPath(name string) string { return filepath.Join(g.runtime, name+".takeover") }

// takeFrom finds the process that runs an instance and asks it for that. It returns
// nil when nobody does. Nothing has changed when it fails.
func takeFrom(ctx context.Context, p *plan) (*taking, error) {
	path := p.global.takeoverPath(p.name)
	conn, err := handover.Dial(ctx, path)
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) {
		p.log.Info("nobody is there to take over from: starting as usual", "instance", p.name)
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("take over %s: %w", p.name, err)
	}
	stop := context.AfterFunc(ctx, conn.Interrupt)
	defer stop()
	p.global.survival.noteTaking(nil, l4.TakingBegun)
	t := &taking{conn: conn, sockets: map[string]net.Listener{}}
	if err := t.hello(p.name); err != nil {
		t.close()
		return nil, fmt.Errorf("take over %s: %w", p.name, err)
	}
	p.log.Info("taking over from another process", "instance", p.name, "pid", t.welcome.Pid, "version", t.welcome.Build)
	return t, nil
}

func (t *taking) hello(name string) error {
	t.conn.Within(helloLimit)
	err := t.conn.SendJSON(handover.KindHello, handover.Hello{
		Protocol: handover.Protocol, ABI: bpf.ABI, Moves: true, Carry: l4.CarryVersion,
		Build: buildVersion(), Instance: name, Pid: os.Getpid(),
	}, nil)
	if err != nil {
		return err
	}
	return t.welcomed()
}

// welcomed takes what is prepared with.
func (t *taking) welcomed() error {
	f, err := t.conn.Expect(handover.KindWelcome)
	if err != nil {
		return err
	}
	defer f.Close() // what is left of them
	w := &t.welcome
	if err := json.Unmarshal(f.Data, w); err != nil {
		return fmt.Errorf("the answer is not understood: %w", err)
	}
	if w.Listeners[0]+w.Listeners[1]+w.Rings+len(w.Sockets) != len(f.FDs) || max(w.Listeners[0], w.Listeners[1]) < 1 {
		return errors.New("the answer does not have the descriptors that it tells of")
	}
	take := func(n int) []int {
		taken := f.FDs[:n:n]
		f.FDs = f.FDs[n:]
		return taken
	}
	t.listeners = [2][]int{take(w.Listeners[0]), take(w.Listeners[1])}
	t.rings = take(w.Rings)
	for n, name := range w.Sockets {
		ln, err := handover.Inherit(f.FDs[n])
		if err != nil {
			return err
		}
		t.sockets[name] = ln
	}
	return nil
}

// socket returns one that was handed over, which is the caller's then; nil: there was
// none.
func (t *taking) socket(name string) net.Listener {
	if t == nil {
		return nil
	}
	ln := t.sockets[name]
	delete(t.sockets, name)
	return ln
}

// socketAt is socket for one that is only of use at a certain address.
func (t *taking) socketAt(name string, addr netip.AddrPort) net.Listener {
	if t == nil || t.sockets[name] == nil || t.sockets[name].Addr().String() != addr.String() {
		return nil
	}
	return t.socket(name)
}

// workers is how many the handler has to have; 0: as many as it likes.
func (t *taking) workers() int {
	if t == nil {
		return 0
	}
	return max(t.welcome.Listeners[0], t.welcome.Listeners[1])
}

// takeListeners returns the listeners of both families, which are the caller's then.
func (t *taking) takeListeners() (all [2][]int) {
	if t != nil {
		all, t.listeners = t.listeners, all
	}
	return all
}

// close gives up what is not used.
func (t *taking) close() {
	if t == nil {
		return
	}
	t.conn.Close()
	for _, list := range [][]int{t.listeners[0], t.listeners[1], t.rings} {
		for _, fd := range list {
			unix.Close(fd)
		}
	}
	t.listeners, t.rings = [2][]int{}, nil
	for _, ln := range t.sockets {
		ln.Close()
	}
	if t.lock != nil {
		t.lock.Close()
	}
}

// join loads the programs for an instance that another process runs.
func (t *taking) join(o loader.Options) (*loader.Datapath, error) {
	rings := t.rings
	t.rings = nil
	return loader.Join(o, loader.Handover{FrameTag: t.welcome.FrameTag, Rings: rings})
}

// takeOver makes the instance this process's, when there is another one to take it
// from. All that takes long is done by then; when it fails, the other one goes on.
func (i *instance) takeOver(ctx context.Context) error {
	t := i.taking
	if t == nil {
		return nil
	}
	stop := context.AfterFunc(ctx, t.conn.Interrupt)
	defer stop()
	// The first connection that comes must find the endpoints of its service.
	if err := i.control.answers(ctx); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return fmt.Errorf("take over %s: told to stop before that", i.name)
	}
	i.log.Debug("prepared to take over")
	if err := t.fits(); err != nil {
		return fmt.Errorf("take over %s: %w", i.name, err)
	}
	t.makeRoom()
	t.loud = quiet()
	err := t.receive(i.global.survival)
	if errors.Is(err, io.EOF) {
		// It died, or else it has its lock still.
		if i.log.Warn("the other process ended meanwhile: going on without it"); t.lock != nil {
			t.lock.Close()
			t.lock = nil
		}
		t.lock, err = i.datapath.LockPins(deathLimit)
	}
	if err != nil {
		return fmt.Errorf("take over %s: %w", i.name, err)
	}
	t.at, t.conns = time.Now(), len(t.given.Conns)
	i.charge.Store(true)
	i.owned()
	i.answered.Store(t.welcome.Answered)
	for _, s := range i.sockets() {
		if err := handover.Own(s.ln); err != nil {
			i.log.Warn("a socket tells of another process", "socket", s.name, "error", err)
		}
	}
	done, err := i.handler.Adopt(t.given)
	if err != nil {
		return err
	}
	i.adopted = done
	return nil
}

// fits tells whether there is room for the connections that are open, before they stand
// still for nothing. Pipes and new connections may still take what there is.
func (t *taking) fits() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil // then the kernel tells
	}
	if need := uint64(otherDescriptors + 2*t.welcome.Live); limit.Cur < need {
		return fmt.Errorf("its %d open connections take %d descriptors, and this process may have %d (RLIMIT_NOFILE)", t.welcome.Live, need, limit.Cur)
	}
	return nil
}

// makeRoom has the table of descriptors grow before they come: in a process of many
// threads each doubling waits for RCU, some ten milliseconds.
func (t *taking) makeRoom() {
	// Pipes and new connections take some as well.
	most := otherDescriptors + 2*t.welcome.Live + t.welcome.Live/2
	if fd, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, most); err == nil {
		unix.Close(fd)
	}
}

// receive asks for everything and says that it is here. What it has is in t, also when
// the other end is closed in the middle, which is io.EOF. kept is where it is written
// down.
func (t *taking) receive(kept *survival) error {
	t.given = &l4.Given{}
	// It may take as long to come to rest, and then to give all.
	t.conn.Within(restLimit + 2*haveWithin(t.welcome.Live))
	if err := t.conn.Send(handover.KindFreeze, nil, nil); err != nil && !hungUp(err) {
		return err
	}
	f, err := t.conn.Expect(handover.KindState)
	if err != nil {
		return err
	}
	if len(f.FDs) == 0 {
		return errors.New("the lock is missing")
	}
	lock := os.NewFile(uintptr(f.FDs[0]), "pins")
	err = gob.NewDecoder(bytes.NewReader(f.Data)).Decode(&t.state)
	var given *l4.Given
	if err == nil {
		given, err = l4.DecodeGiven(t.state.Connections, f.FDs[1:])
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("what is handed over is not understood: %w", err)
	}
	t.lock, t.given = lock, given
	// What is not written down now is lost if this worker is killed when it is ours.
	kept.keep(given)
	t.conn.Within(commitLimit)
	kept.noteTaking(t.conn, l4.TakingHas)
	if err := t.conn.Send(handover.KindHave, nil, nil); err != nil && !hungUp(err) {
		return err
	}
	kept.noteTaking(t.conn, l4.TakingSaid)
	// Also when the other end is closed: it may have given up, and said so.
	_, err = t.conn.Expect(handover.KindCommit)
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, handover.ErrRefused) {
		return err
	}
	return unlessOurs(t.conn, err)
}

// unlessOurs returns why nothing was taken, unless the other process has said that all is
// this one's: who gives up waiting for that (it is told to stop, or late) must not leave
// the instance to nobody.
func unlessOurs(conn *handover.Conn, why error) error {
	switch kind, err := conn.Last(); {
	case err != nil:
		return errors.Join(why, err)
	case kind == handover.KindCommit || kind == handover.KindFarewell: // that comes after it
		return nil
	default:
		return why
	}
}

// hungUp tells whether a frame could not be sent because the other end is closed.
func hungUp(err error) bool {
	return errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
}

// takeCharge writes what was not to be written before, and begins to beat. When it
// fails, the instance is left as by a crash.
func (i *instance) takeCharge(ctx context.Context, beat *circle) error {
	if i.taking == nil {
		return nil
	}
	err := i.writeFirst(ctx, beat)
	i.charge.Store(err == nil)
	return err
}

func (i *instance) writeFirst(ctx context.Context, beat *circle) error {
	t := i.taking
	select {
	case <-i.adopted:
	case <-ctx.Done():
		// Told to stop: it takes charge all the same, to drain in the usual way.
	}
	t.loud()
	if t.state.At > 0 {
		t.pause = time.Duration(monotonicNow() - t.state.At)
	}
	lock := t.lock
	t.lock = nil
	if err := i.datapath.Take(lock); err != nil {
		return err
	}
	if err := i.makeBeat(); err != nil {
		return err
	}
	if err := i.beat.Once(ctx); err != nil {
		return err
	}
	beat.run("heartbeat", i.beat.Run)
	if _, err := i.datapath.Sync(); err != nil {
		return err
	}
	i.countOn(&t.state.Totals)
	i.recallTotals()
	i.collector.Adopt(t.state.Halves)
	// It is as much memory as the connections take themselves.
	t.given, t.state.Connections, t.state.Halves = nil, nil, nil
	i.log.Info("taken over", "instance", i.name, "from", t.welcome.Pid, "version", t.welcome.Build,
		"connections", t.conns, "pause", t.pause.Round(time.Microsecond))
	i.ready.Store(true)
	return nil
}

// makeBeat makes the heartbeat. Its listeners are the ones that canaries come to from
// now on.
func (i *instance) makeBeat() error {
	c4, c6 := i.datapath.CanaryAddrs()
	var err error
	i.beat, err = capture.New(i.datapath, i.handler, []netip.Addr{c4, c6}, i.log)
	return err
}

// hearFarewell takes what the other process sends when this one is at work already.
func (i *instance) hearFarewell(ctx context.Context) error {
	t := i.taking
	defer t.close()
	stop := context.AfterFunc(ctx, t.conn.Interrupt)
	defer stop()
	t.conn.Within(farewellLimit)
	f, err := t.conn.Expect(handover.KindFarewell)
	var last farewell
	if err == nil {
		err = gob.NewDecoder(bytes.NewReader(f.Data)).Decode(&last)
	}
	if err != nil {
		i.log.Warn("the flows of the earlier process are not in the history", "error", err)
		return nil
	}
	i.collector.Remember(last.History)
	return nil
}

// lastServices are what the other process said last, also if it died then.
func (t *taking) lastServices() []handover.Service {
	switch {
	case t == nil:
		return nil
	case t.state.At == 0:
		return t.welcome.Services
	default:
		return t.state.Services
	}
}

// moved tells whether the other process had, at the address of a service, one that has
// another address now.
func (t *taking) moved(said *said, v *service) bool {
	return t != nil && slices.ContainsFunc(t.welcome.Services, func(s handover.Service) bool {
		_, goesOn := said.byName[s.Name]
		return s.Addr == v.Addr && s.Name != v.Name && goesOn
	})
}

// tells replaces what told goes by.
func (t *taking) tells(all []handover.Service) {
	if t != nil {
		t.welcome.Services, t.byName = all, nil
	}
}

// told returns what the other process said of a service whose source has not told this
// one anything yet.
func (t *taking) told(v *config.Service) ([]discover.Endpoint, bool) {
	if t == nil {
		return nil, false
	}
	if t.byName == nil {
		t.byName = make(map[string]int, len(t.welcome.Services))
		for n, s := range t.welcome.Services {
			t.byName[s.Name] = n
		}
	}
	n, ok := t.byName[v.Name]
	if !ok || t.welcome.Services[n].Addr != v.Addr {
		return nil, false
	}
	return endpointsOf(&t.welcome.Services[n]), true
}

func endpointsOf(s *handover.Service) []discover.Endpoint {
	all := make([]discover.Endpoint, 0, len(s.Endpoints))
	for _, e := range s.Endpoints {
		all = append(all, discover.Endpoint{Addr: e.Addr, Weight: e.Weight, Zone: e.Zone})
	}
	return all
}

// inherit goes on with what the control of the other process had begun.
func (c *control) inherit(h *handed) {
	before := make([]service, 0, len(h.Services))
	for _, s := range h.Services {
		was := service{}
		was.Name, was.Addr = s.Name, s.Addr
		if now := c.listing().same(&was); now != nil {
			was.OnRemove, was.RemoveAfter = now.OnRemove, now.RemoveAfter
		}
		was.endpoints = endpointsOf(&s)
		before = append(before, was)
	}
	for _, r := range h.Removals {
		c.removals.later(gone{r.Service, r.Addr, r.Endpoint}, r.After)
	}
	c.former = h.Former
	c.removed(before, c.list())
}
