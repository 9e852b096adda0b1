package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// The life of an instance, once it is put together.

// serve runs the instance until stop is done, then drains it until force is
// done, and calls attached once applications are captured. What it returns on
// is an error of one of its parts, which ends all.
func (i *instance) serve(stop, force context.Context, attached func() error) error {
	live, die := context.WithCancelCause(stop)
	defer die(nil)
	// In the order in which they end: the handler, who says that it is there
	// (the handshakes that wait go on while it drains), those that it needs, and
	// those that tell of its end.
	relay, beat, helpers := newCircle(live, die), newCircle(live, die), newCircle(live, die)
	collect, write := newCircle(live, die), newCircle(live, die)
	carry := func() {
		relay.run("handler", func(ctx context.Context) error { return i.handler.Run(ctx, force) })
	}
	err := i.revive(carry)
	helpers.run("control", i.control.run)
	if err == nil && !i.reviving() {
		if err = i.takeOver(live); err == nil {
			carry()
			err = i.takeCharge(live, beat)
		} else {
			i.handler.Close()
		}
	}
	if err == nil {
		i.accompany(helpers, collect, write)
		err = i.control.settle(live)
	}
	if err == nil {
		i.acceptAgain()
	}
	// Told to end before anybody relied on it: then nobody is to.
	begin := err == nil && (live.Err() == nil || i.taking != nil || i.reviving())
	if begin {
		err = i.goLive(live)
	}
	if begin && err == nil {
		if i.taking == nil {
			beat.run("heartbeat", i.beat.Run)
		}
		if i.global.survival != nil {
			helpers.run("keeper", i.tellKeeper)
		}
		err = attached()
	}
	if err == nil {
		trim() // after the first beats: it takes a while on a busy machine
		<-live.Done()
		err = cause(live)
	}
	i.draining.Store(true)
	i.ready.Store(false)
	for _, s := range i.sockets() {
		i.global.survival.dropSocket(s.name)
	}
	if i.inCharge() {
		err = errors.Join(err, i.datapath.Drain())
	}
	for _, c := range []*circle{relay, beat, helpers, collect, write} {
		c.end()
	}
	return errors.Join(err, i.closeFiles())
}

// accompany runs what goes on beside the handler.
func (i *instance) accompany(helpers, collect, write *circle) {
	helpers.run("admin", i.serveAdmin)
	helpers.run("watch", i.datapath.Watch)
	helpers.run("tidy", i.datapath.Tidy)
	if i.global.survival == nil {
		// Beside a keeper the listeners outlive this process, and what comes to
		// them meanwhile is the next one's.
		helpers.run("vouch", i.datapath.Vouch)
	}
	helpers.run("ebb", func(ctx context.Context) error { return ebb(ctx, func() int { return i.handler.Stats().Live }) })
	if i.public != nil {
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", i.metrics.Handler())
		helpers.run("metrics", func(ctx context.Context) error { return serveHTTP(ctx, i.public, mux) })
	}
	if i.probes != nil {
		helpers.run("probes", func(ctx context.Context) error { return serveHTTP(ctx, i.probes, admin.Probes(i.api())) })
	}
	if i.takers != nil {
		helpers.run("hand over", i.giveAway)
	}
	if i.taking != nil {
		helpers.run("farewell", i.hearFarewell)
	}
	collect.run("collector", i.collector.Run)
	if i.flowLog != nil {
		write.run("flow log", i.flowLog.Run)
	}
}

// inCharge tells whether the instance is this process's to change and to end.
func (i *instance) inCharge() bool { return i.charge.Load() && !i.gone.Load() }

// goLive proves that the handler works, and only then attaches the programs
// that send it connections.
func (i *instance) goLive(ctx context.Context) error {
	for range 3 {
		if i.taking != nil {
			break // it beats already
		}
		if err := i.beat.Once(ctx); err != nil {
			return err
		}
		if i.beat.Alive() {
			break
		}
	}
	old, err := i.datapath.Attach()
	if err != nil {
		return err
	}
	if err := i.settle(old); err != nil {
		return err
	}
	if i.taking == nil {
		// All that may have taken longer than a beat is good for, and who is
		// ready is not late.
		if err := i.beat.Once(ctx); err != nil {
			return err
		}
	}
	i.ready.Store(true)
	return nil
}

// settle deals with the connections that are older than the capture.
func (i *instance) settle(old []loader.Existing) error {
	if len(old) == 0 {
		return nil
	}
	if i.plan.config.Existing == config.ExistingReset {
		var captured, alone []loader.Existing
		for _, e := range old {
			if i.leavesAlone(e) {
				alone = append(alone, e)
			} else {
				captured = append(captured, e)
			}
		}
		if err := i.datapath.Reset(captured); err != nil {
			return fmt.Errorf("reset older connections: %w", err)
		}
		if len(captured) > 0 {
			i.log.Info("reset older connections, so that they come back captured", "connections", len(captured))
		}
		old = alone
	}
	i.existing.Store(int64(len(old)))
	for _, e := range old {
		i.log.Warn("connection is older than the capture", "source", e.Source, "destination", e.Destination, "reason", "existing")
	}
	return nil
}

// leavesAlone tells whether a connection that is older would pass if it came back, and
// not only because of on_failure: to reset it is of no use to anybody.
func (i *instance) leavesAlone(e loader.Existing) bool {
	v, err := i.datapath.DryRun(e.Source.Addr(), e.Destination)
	if err != nil || v.Path != flow.PathPass {
		return false
	}
	switch v.Reason {
	case flow.ReasonExcluded, flow.ReasonOwnAddress, flow.ReasonMetadata, flow.ReasonForeignSlot, flow.ReasonNoRoute, flow.ReasonForeignSource:
		return true
	case flow.ReasonDefaultPass:
		return !i.plan.config.Kubernetes.OnDemand // else it may be a service's
	case flow.ReasonService:
		s := i.control.listing().at(e.Destination)
		return s != nil && s.path == flow.PathPass // else its source has not told yet
	default:
		return false
	}
}

// abandon undoes open. An instance that was taken over is left as it was.
func (i *instance) abandon() error {
	errs := []error{i.closeFiles()}
	defer i.taking.close()
	if i.handler != nil {
		i.handler.Close()
	}
	if i.beat != nil {
		i.beat.Close()
	}
	if i.flowLog != nil {
		errs = append(errs, i.flowLog.Close())
	}
	if i.datapath.Adopted() {
		errs = append(errs, i.datapath.Close())
	} else {
		errs = append(errs, i.datapath.Unload())
	}
	return errors.Join(errs...)
}

// end takes the instance away, unless it is another process's.
func (i *instance) end() error {
	if !i.inCharge() {
		return i.datapath.Close()
	}
	return i.datapath.Unload()
}
