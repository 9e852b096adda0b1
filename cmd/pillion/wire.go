package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/capture"
	"github.com/pillion-project/pillion/redirect/handler"
	"github.com/pillion-project/pillion/redirect/route"
	"github.com/pillion-project/pillion/redirect/upstream"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/telemetry/events"
	"github.com/pillion-project/pillion/telemetry/flowlog"
	"github.com/pillion-project/pillion/telemetry/metrics"
	"golang.org/x/sys/unix"
)

// This file is the only one that knows every package: it joins the kernel side
// (loader), the handler (redirect) and what tells of them (telemetry).

// plan says which instance is to run.
type plan struct {
	name    string
	kind    loader.Kind
	cgroups string // where cgroup v2 is mounted; empty: nowhere
	scope   loader.Scope
	pod     *loader.Pod    // that scope is all of; nil: it is no pod, or not ours
	births  *loader.Births // of the pod's containers; nil: nobody wants to know, or can
	config  *config.Config
	// file is where the configuration came from; empty: there is none. merge makes
	// the next configuration of last and the text of a file, without the sources
	// that are not possible, and hangups are the signals to do so.
	file    string
	merge   func(file string, text []byte, last *config.Config, able func(*config.Discover) error) (*config.Config, []config.Refused, error)
	hangups <-chan os.Signal
	taking  *taking // nil: nobody is there to take over from
	global  *global
	log     *slog.Logger
}

// instance is a running one.
type instance struct {
	plan
	datapath  *loader.Datapath
	handler   *handler.Handler
	beat      *capture.Beat
	collector *events.Collector
	metrics   *metrics.Metrics
	flowLog   *flowlog.Log // nil: none
	snapshot  atomic.Pointer[upstream.Snapshot]
	control   *control
	byAddr    atomic.Pointer[map[netip.AddrPort]string] // the names of services
	table     *route.Table                              // the first: the handler has the later ones
	lastRules loader.Rules                              // what the kernel side goes by; control's own,
	lacking   bool                                      // as is that it has no room for some of it
	socketMu  sync.Mutex                                // guards the next two, which may be made again
	socket    net.Listener                              // the admin's
	takers    net.Listener                              // nil: nobody can take over
	public    net.Listener                              // of the metrics; nil: none
	probes    net.Listener                              // of readiness and liveness; nil: none
	started   time.Time
	ready     atomic.Bool
	answered  atomic.Bool // every source that there was at first has told, once
	draining  atomic.Bool
	existing  atomic.Int64
	sets      setStats
	kept      keptTotals
	charge    atomic.Bool // nobody else has the instance,
	gone      atomic.Bool // and another process has it by now
	giving    sync.Mutex  // who holds it gives the instance away, if it is not gone
	adopted   <-chan struct{}
}

// Descriptors that are not for connections: maps, programs, sockets, pipes, and
// some 210 of health checks.
const otherDescriptors = 512

// open builds an instance, step by step, and undoes all of it on a failure. Its
// programs are not attached yet, but for the one that brings connections to the
// handler.
func open(p plan) (*instance, error) {
	i := &instance{plan: p, started: time.Now()}
	i.charge.Store(p.taking == nil)
	i.control = newControl(i)
	if err := i.control.apply(p.config); err != nil {
		return nil, usage(err)
	}
	if err := i.load(); err != nil {
		return nil, err
	}
	err := i.control.recall()
	if err == nil {
		err = i.assemble()
	}
	if err != nil {
		return nil, errors.Join(err, i.abandon())
	}
	return i, nil
}

// load takes over the instance that is pinned, or makes it.
func (i *instance) load() error {
	o := loader.Options{Name: i.name, Kind: i.kind, Scope: i.scope, BPFFS: i.global.bpffs, FrameTag: i.global.survival.frameTag(), Log: i.log}
	if i.pod != nil {
		o.Own, o.Sandbox = i.pod.Own, i.pod.Sandbox
	}
	o.Keep = i.global.survival.keepHandles
	if i.taking != nil {
		i.global.survival.clean()
		var err error
		i.datapath, err = i.taking.join(o)
		i.global.survival.keepTag(i.datapath)
		return err
	}
	if i.datapath = i.global.survival.resume(o); i.datapath != nil {
		return nil
	}
	i.global.survival.clean() // the lock is among it
	if i.global.survival.inCharge() {
		// It may have been taken over a moment ago: then the other process is leaving.
		if err := loader.Await(i.global.bpffs, i.name, leaveLimit); err != nil {
			return err
		}
	}
	swept, err := loader.Sweep(i.global.bpffs, i.cgroups)
	for _, name := range swept {
		i.log.Info("removed what a dead instance left", "instance", name)
		i.forget(name)
	}
	if err != nil {
		i.log.Warn("cannot remove what dead instances left", "error", err)
	}
	i.datapath, err = loader.Open(o)
	// A pod keeps its uid when its sandbox, and with that its network namespace, is
	// made anew.
	renewed := errors.Is(err, loader.ErrOtherScope) && i.pod != nil
	if errors.Is(err, loader.ErrIncomplete) || renewed {
		i.log.Warn("what an earlier start left is no use: starting over", "instance", i.name, "why", err)
		if err := loader.Remove(i.global.bpffs, i.cgroups, i.name); err != nil {
			return err
		}
		err = fmt.Errorf("%w", loader.ErrNotFound)
	}
	if errors.Is(err, loader.ErrNotFound) {
		i.datapath, err = loader.Create(o)
	}
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, loader.ErrNoBPFFS) {
		return &exitError{code: exitUnsupported, err: err}
	}
	i.global.survival.keepTag(i.datapath)
	return err
}

// assemble puts the handler and the telemetry around the datapath.
func (i *instance) assemble() error {
	if i.taking == nil && !i.datapath.Resumed() {
		if _, err := i.datapath.Sync(); err != nil {
			return err
		}
	}
	workers := i.workers()
	// A worker that waits keeps its processor for a while; see redirect/l4.
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), workers+2))
	rules := i.rules(i.plan.config, i.control.list())
	v4, v6 := i.datapath.ListenAddrs()
	queues, err := i.queues(workers)
	if err != nil {
		return err
	}
	i.handler, err = handler.New(handler.Options{
		Live: i.datapath, Table: i.table, Slots: loader.Supernets(),
		Listen4: v4, Listen6: v6, Workers: workers, Inherited: i.inherited(),
		Registry: i.global.survival.memory(), AcceptLater: i.global.survival.revived(),
		Limits: limits(&i.plan.config.Relay), MaxConns: rules.MaxConns,
		MaxPerGroup: carried(rules.ConnQuota), Exempt: i.exempt(), Unnamed: i.control.sources.asked, Pending: i.control.sources.pending,
		Queues: queues, Answered: i.datapath.Answered, Unavailable: i.unavailable,
	})
	if err != nil {
		return err
	}
	switch {
	case i.datapath.Resumed():
		return nil // the rest when the connections go on: see resume
	case i.taking != nil:
		return i.tell() // the rest when the other process has left: see takeCharge
	}
	return i.assembleRest(rules)
}

// assembleRest is the part of assemble that the connections of an earlier process need
// not wait for.
func (i *instance) assembleRest(rules loader.Rules) error {
	if err := i.datapath.SetListeners(i.handler.Listeners()); err != nil {
		return err
	}
	// What an earlier process left holds until the sources have told; see settle.
	if !i.datapath.Adopted() {
		if _, err := i.inForce(rules, i.datapath.SetRules(rules)); err != nil {
			return err
		}
	}
	if err := i.makeBeat(); err != nil {
		return err
	}
	if err := i.tell(); err != nil {
		return err
	}
	i.owned()
	i.recallTotals()
	return i.datapath.AttachLookup()
}

// unavailable tells the connect hook that a service has no endpoint for a while. The
// handler knows a service before the hook does, and one that was removed a little longer.
func (i *instance) unavailable(service netip.AddrPort, wait time.Duration) {
	if err := i.datapath.Unavailable(service, wait); err != nil && !errors.Is(err, loader.ErrNoService) {
		i.log.Error("cannot tell the connect hook which services are unavailable", "error", err)
	}
}

// tell makes the telemetry.
func (i *instance) tell() error {
	i.metrics = metrics.New(i.sources())
	sinks := []events.Sink{i.metrics, i.control.sources}
	var err error
	if path := i.plan.config.FlowLog; path != "" {
		if i.flowLog, err = flowlog.Open(path, flowLogQueue); err != nil {
			return usage(err)
		}
		sinks = append(sinks, i.flowLog)
	}
	sinks = i.global.survival.follow(sinks, i.flowLog)
	if i.public, err = i.listen("metrics", i.plan.config.Metrics); err != nil {
		return err
	}
	if i.probes, err = i.listen("probes", i.plan.config.Probes); err != nil {
		return err
	}
	if i.socket = i.earlier("admin"); i.socket == nil {
		if i.socket, err = admin.Listen(i.socketPath()); err != nil {
			return err
		}
	}
	if i.kind == loader.KindRun {
		if err := i.listenForTakers(); err != nil {
			return err
		}
	}
	i.collector, err = events.New(events.Options{
		Ring: i.datapath.Events(), Gather: i.datapath.GatherEvents, Handler: i.handler, Kernel: i.datapath, Names: i.names, Sinks: sinks,
	})
	return err
}

// listen opens what serves over HTTP; nowhere if the address is not valid.
func (i *instance) listen(what string, a netip.AddrPort) (net.Listener, error) {
	if !a.IsValid() {
		return nil, nil
	}
	for _, at := range []func(string, netip.AddrPort) net.Listener{i.taking.socketAt, i.global.survival.socketAt} {
		if ln := at(what, a); ln != nil {
			return ln, nil
		}
	}
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp", a.String())
	if err != nil {
		return nil, usage(fmt.Errorf("serve %s: %w", what, err))
	}
	return ln, nil
}

// flowLogQueue is how many records may wait for a slow disk.
const flowLogQueue = 16384

// reopenLog goes on with the file that has the flow log's name by now: who rotates it
// has moved the other one.
func (i *instance) reopenLog() {
	if i.flowLog == nil {
		return
	}
	if err := i.flowLog.Reopen(); err != nil {
		i.log.Error("the flow log goes on where it was", "error", err)
	}
}

func (i *instance) socketPath() string {
	return filepath.Join(i.global.runtime, i.name+".sock")
}

// forget removes the files of an instance that is gone.
func (i *instance) forget(name string) {
	_ = os.Remove(filepath.Join(i.global.runtime, name+".sock"))
	_ = os.Remove(i.global.takeoverPath(name))
}

func (i *instance) workers() int {
	if n := max(i.taking.workers(), i.global.survival.workers()); n > 0 {
		return n // each has its listeners
	}
	n := i.plan.config.Relay.Workers
	if n == 0 {
		n = runtime.NumCPU()
	}
	return min(n, bpf.WorkersMax)
}

// maxConns is what the configuration allows and the descriptors suffice for.
func (i *instance) maxConns() int {
	var limit unix.Rlimit
	most := i.plan.config.Limits.Connections
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil {
		// A hard limit may be infinite.
		fds := int(min(limit.Cur, 1<<30)) - loader.SetDescriptors(limit.Cur)
		most = min(most, max((fds-otherDescriptors)/2, 1))
	}
	if r := i.global.survival.memory(); r != nil {
		most = min(most, r.Room())
	}
	return most
}

// exempt marks sockets of this process as the handler's own, if need be.
func (i *instance) exempt() func(fd int) error {
	if !i.inScope() {
		return nil
	}
	return func(fd int) error { return i.datapath.Exempt(fd) }
}

// inScope tells whether this process is itself in the scope.
func (i *instance) inScope() bool {
	if i.pod != nil {
		return true
	}
	own, err := ownCgroup(i.cgroups)
	if err != nil {
		return true // the tag does no harm
	}
	return own == i.scope.Path || strings.HasPrefix(own+"/", strings.TrimSuffix(i.scope.Path, "/")+"/")
}
