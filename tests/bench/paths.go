package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/vishvananda/netlink"
)

// The arms of part direct, by name.
const (
	armNone = "nothing"
	// armControl is nothing, too, in Pillion's network namespace: what it is
	// different by is what the run does not tell.
	armControl    = "nothing, again"
	armPass       = "pass"
	armPathDirect = "direct"
	// The same with manyServices.
	armPassMany   = "pass, 10,000 services"
	armDirectMany = "direct, 10,000 services"
	// armFloor is nothing but what the kernel itself takes in a connect hook.
	armFloor = "no Pillion"
	// armLooksPass and armLooksDirect are what no connect hook can do without.
	armLooksPass   = "no Pillion, looks of pass"
	armLooksDirect = "no Pillion, looks of direct"
	// What a connection costs with a state of the size of Pillion's, kept with the
	// socket or beside it, and nothing else.
	armStorage = "only socket storage"
	// The same, with as little as has a record of the connection in the end.
	armRecord = "only storage and a record"
	armEntry  = "only a hash entry"
	armCell   = "only an array cell"
)

const (
	fewServices  = 1
	manyServices = 10_000
)

// endpoints are the server's addresses in part direct, which clients dial in turn
// or by the service.
var endpoints = []netip.AddrPort{
	netip.MustParseAddrPort("198.51.100.11:9000"),
	netip.MustParseAddrPort("198.51.100.12:9000"),
	netip.MustParseAddrPort("198.51.100.13:9000"),
}

// pathWorld is what part direct measures in.
type pathWorld struct {
	*world
	arms []*arm
	// pills are Pillions, with what is to go by each path.
	pills []pathPillion
	// missing says what is not beside them, and why.
	missing []string
	// namespaces is how many there have been, in all worlds of the run: the kernel may
	// still be taking those of the last one away.
	namespaces *int
}

// pathPillion is a Pillion with its arms.
type pathPillion struct {
	instance
	pass, direct *arm
}

// hookStarts is how many times everything is started for workHook: where code and memory
// happen to lie lasts until the next start.
const hookStarts = 6

// measurePaths measures what pass and direct cost, beside nothing at all and
// address translation.
func measurePaths(ctx context.Context, o *options) (*pathReport, error) {
	r := newPathReport(o)
	if err := addEndpoints(); err != nil {
		return nil, fmt.Errorf("give the server addresses: %w", err)
	}
	busy := machineClock()
	if err := pause(ctx, idleTime); err != nil {
		return nil, err
	}
	r.Busy = busy.since()
	var once, again []work
	for _, w := range r.works {
		if w.Name == workHook {
			again = append(again, w)
		} else {
			once = append(once, w)
		}
	}
	if err := r.measure(ctx, o, once, 0, r.Rounds, false); err != nil {
		return nil, err
	}
	for i := range hookStarts {
		if err := r.measure(ctx, o, again, i*r.Rounds/hookStarts, (i+1)*r.Rounds/hookStarts, o.scatter); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// measure starts everything, with scatter somewhere, and does works in the rounds from one
// before another; then some more of them, see settle.
func (r *pathReport) measure(ctx context.Context, o *options, works []work, from, to int, scatter bool) (err error) {
	if len(works) == 0 || from == to {
		return nil
	}
	base, err := newWorld()
	if err != nil {
		return err
	}
	w := &pathWorld{world: base, namespaces: &r.namespaces}
	defer func() { err = errors.Join(err, w.close()) }()
	if scatter {
		if err := w.scatter(); err != nil {
			return err
		}
	}
	if err := w.furnish(ctx); err != nil {
		return err
	}
	r.of(w)
	if o.spin {
		if err := w.startSpinners(); err != nil {
			return err
		}
	}
	say := progress(os.Stderr)
	for round := from; round < to; round++ {
		for _, work := range works {
			say("round %d of %d: %s", round+1, r.Rounds, work.Name)
			if err := r.round(ctx, w, work, w.arms); err != nil {
				return err
			}
		}
	}
	if !o.quick {
		if err := r.settle(ctx, w, works, say); err != nil {
			return err
		}
	}
	say("")
	return w.carried(ctx)
}

// round does a work once by each arm that does it.
func (r *pathReport) round(ctx context.Context, w *pathWorld, work work, arms []*arm) error {
	for _, i := range rand.Perm(len(arms)) {
		a := arms[i]
		if !a.does(work) {
			continue
		}
		s, err := w.run(ctx, a, work)
		if err != nil {
			return fmt.Errorf("%s, %s: %w", work.Name, a.name, err)
		}
		r.add(work.Name, a.name, s)
	}
	return nil
}

// roundsMost is how many times as many rounds there may be of a work as of all.
const roundsMost = 10

// settle does more rounds of the works of which it is not clear whether they meet their
// targets, by the arms that have some, and nothing: until it is, or for long enough.
func (r *pathReport) settle(ctx context.Context, w *pathWorld, works []work, say func(string, ...any)) error {
	works = slices.Clone(works)
	var arms []*arm
	for _, a := range w.arms {
		if a.name == armNone || a.name == armControl || slices.Contains(aimed, a.name) {
			arms = append(arms, a)
		}
	}
	for round := r.Rounds; round < roundsMost*r.Rounds; round++ {
		works = slices.DeleteFunc(works, func(x work) bool { return !r.isUnclear(x) })
		if len(works) == 0 {
			return nil
		}
		for _, work := range works {
			say("round %d, since there is a target that it may meet or not: %s", round+1, work.Name)
			if err := r.round(ctx, w, work, arms); err != nil {
				return err
			}
		}
	}
	return nil
}

// furnish starts the server, and gives each way to it a network namespace of its
// own: what one has in the kernel burdens no other.
func (w *pathWorld) furnish(ctx context.Context) error {
	if err := w.serveApart(); err != nil {
		return err
	}
	plain, err := w.another()
	if err != nil {
		return err
	}
	works := []string{workRoundTrip, workConnection, workCRR, workDownload, workLatency}
	w.arms = []*arm{{name: armNone, addrs: endpoints, cgroup: w.beside, netns: plain, only: works}}
	few, err := w.pillion(ctx, fewServices, w.scope)
	if err != nil {
		return err
	}
	few.pass.name, few.direct.name = armPass, armPathDirect
	control := &arm{name: armControl, addrs: endpoints, cgroup: w.beside, netns: few.pass.netns, only: works}
	w.arms = append(w.arms, control, few.pass, few.direct)
	scope, err := w.cgroup("many")
	if err != nil {
		return err
	}
	many, err := w.pillion(ctx, manyServices, scope)
	if err != nil {
		return err
	}
	many.pass.name, many.pass.only = armPassMany, []string{workHook}
	many.direct.name, many.direct.only = armDirectMany, []string{workConnection, workCRR, workHook}
	w.arms = append(w.arms, many.pass, many.direct)
	if err := w.floor(plain); err != nil {
		return fmt.Errorf("measure the kernel's own part: %w", err)
	}
	return w.peers(works)
}

// serveApart starts the server, and has it and the clients keep to a processor each,
// where there are two: which of them share one is the scheduler's mood of the moment,
// and makes more of a difference than anything that is measured.
func (w *pathWorld) serveApart() error {
	cpus, err := processors()
	if err != nil {
		return err
	}
	if len(cpus) < 2 {
		return w.serve(endpoints...)
	}
	w.clientOn = func(start func() error) error { return onlyOn(cpus[0], start) }
	return onlyOn(cpus[1], func() error { return w.serve(endpoints...) })
}

// floor adds the arms that show the kernel's own part, in a network namespace without
// Pillion.
func (w *pathWorld) floor(ns *os.File) error {
	for _, a := range []struct {
		name, cgroup, work string
		programs           []string
	}{
		{armFloor, "floor", workHook, []string{floorNothing, floorStorage, floorEntry, floorDrop, floorCell, floorLeave}},
		// Each by itself: the second would find warm what the first has looked at.
		{armLooksPass, "looks", workHook, []string{floorPass}},
		{armLooksDirect, "picks", workHook, []string{floorDirect}},
		{armStorage, "storage", workConnection, []string{floorStorage}},
		{armRecord, "record", workConnection, []string{floorStorage, floorRecord, floorRelease, floorPeer, floorName}},
		{armEntry, "entry", workConnection, []string{floorEntry, floorDrop}},
		{armCell, "cell", workConnection, []string{floorCell, floorLeave}},
	} {
		scope, err := w.cgroup(a.cgroup)
		if err != nil {
			return err
		}
		programs, err := w.attachFloor(scope, a.programs...)
		if err != nil {
			return err
		}
		w.arms = append(w.arms, &arm{name: a.name, addrs: endpoints, cgroup: scope, netns: ns, programs: programs, only: []string{a.work}})
	}
	return nil
}

// addEndpoints gives the bench's own network namespace the server's addresses.
func addEndpoints() error {
	own := &netlink.Handle{}
	for _, e := range endpoints {
		if err := up(own, "lo", netip.PrefixFrom(e.Addr(), 32)); err != nil {
			return err
		}
	}
	return nil
}

// another makes a network namespace with a number that none had.
func (w *pathWorld) another() (*os.File, error) {
	*w.namespaces++
	return w.namespace(*w.namespaces)
}

// pillion runs one in a network namespace of its own.
func (w *pathWorld) pillion(ctx context.Context, services int, scope *os.File) (p pathPillion, err error) {
	ns, err := w.another()
	if err != nil {
		return p, err
	}
	p.instance, err = w.startPillion(ctx, ns, scope, fmt.Sprint("-", services), pathConfig(services))
	if err != nil {
		return p, fmt.Errorf("start pillion with %d services: %w", services, err)
	}
	w.others = append(w.others, p.process)
	programs, err := openPrograms(p.name)
	if err != nil {
		return p, err
	}
	w.later(func() error {
		programs.close()
		return nil
	})
	p.pass = &arm{addrs: endpoints, cgroup: scope, netns: ns, process: p.process, programs: programs}
	p.direct = &arm{addrs: []netip.AddrPort{serviceAddr}, cgroup: scope, netns: ns, process: p.process, programs: programs}
	w.pills = append(w.pills, p)
	return p, nil
}

// pathConfig has so many services, of which serviceAddr is one, with all endpoints
// each. The endpoints themselves are passed.
func pathConfig(services int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "default: pass\npath: direct\nrelay: {workers: %d}\non_failure: closed\nservices:\n", workers)
	var to []string
	for _, e := range endpoints {
		to = append(to, fmt.Sprintf("%q", e))
	}
	list, addr := strings.Join(to, ", "), serviceAddr.Addr()
	for range services {
		fmt.Fprintf(&b, "  - {address: %q, endpoints: [%s]}\n", netip.AddrPortFrom(addr, serviceAddr.Port()), list)
		addr = addr.Next()
	}
	return b.String()
}

// peers adds what translates addresses.
func (w *pathWorld) peers(works []string) error {
	for _, p := range nats {
		ns, err := w.another()
		if err != nil {
			return err
		}
		if err := p.install(ns, serviceAddr, endpoints); err != nil {
			w.missing = append(w.missing, fmt.Sprintf("%s: %v", p.name, err))
			continue
		}
		w.arms = append(w.arms, &arm{name: p.name, addrs: []netip.AddrPort{serviceAddr}, cgroup: w.beside, netns: ns, only: works})
	}
	return nil
}

// carried fails unless all connections went by the paths that they were to.
func (w *pathWorld) carried(ctx context.Context) error {
	for _, p := range w.pills {
		if err := p.instance.carried(ctx, flow.PathPass, p.pass.opened); err != nil {
			return err
		}
		if err := p.instance.carried(ctx, flow.PathDirect, p.direct.opened); err != nil {
			return err
		}
	}
	return nil
}

// versionOf returns what a program says of itself, or nothing.
func versionOf(name string, args ...string) string {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line
}
