package main

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/telemetry/metrics"
)

// api is what the admin socket answers from.
func (i *instance) api() admin.API {
	return admin.API{
		Status:  i.status,
		Flows:   i.flows,
		Metrics: i.metrics.Handler(),
		Resolve: i.datapath.Resolve,
		Explain: i.explainer().explain,
		Config:  i.configuration,
		Reload:  i.control.requestReload,
		Diff:    i.control.diff,
		Ready:   i.missing,
		Live:    i.stuck,
	}
}

// connect is the mode that applies where no service names one.
func (i *instance) connect() config.Connect {
	if !i.datapath.Holds() {
		return config.ConnectEarly
	}
	return i.control.inForce().Connect
}

// configuration returns what holds, as JSON.
func (i *instance) configuration(context.Context) (json.RawMessage, error) {
	return json.Marshal(i.control.inForce())
}

func (i *instance) flows(ctx context.Context, q admin.FlowQuery) ([]flow.Record, error) {
	if q.Live {
		return i.collector.Live(ctx)
	}
	i.collector.Flush(ctx)
	return i.collector.History(), nil
}

func (i *instance) status(context.Context) (admin.Status, error) {
	stats, err := i.datapath.Stats()
	if err != nil {
		return admin.Status{}, err
	}
	s := admin.Status{
		Instance:    i.name,
		Kind:        i.kind.String(),
		Version:     buildVersion(),
		Pid:         os.Getpid(),
		Scope:       i.scope.Path,
		Ready:       i.ready.Load(),
		State:       i.state(&stats),
		OnFailure:   string(i.control.inForce().OnFailure),
		Connect:     string(i.connect()),
		Started:     i.started,
		TakenOver:   i.taking.status(),
		Live:        i.handler.Stats().Live,
		Counters:    map[string]uint64{},
		Unaccounted: stats.Unaccounted(),
		Services:    i.control.serviceStatus(),

		Configuration: i.control.status(),
		Problems:      i.problems(&stats),
	}
	for r, n := range stats.Reasons {
		if n > 0 {
			s.Counters[flow.Reason(r).String()] = n
		}
	}
	v4, v6 := i.datapath.SlotPrefixes()
	s.Slots4, s.Slots6 = prefixText(v4), prefixText(v6)
	return s, nil
}

func prefixText(p netip.Prefix) string {
	if !p.IsValid() {
		return ""
	}
	return p.String()
}

func (i *instance) state(s *loader.Stats) string {
	switch {
	case i.draining.Load():
		return admin.StateDraining
	case !s.BeatHolds:
		return admin.StateStale
	default:
		return admin.StateServing
	}
}

// problems says in sentences what is wrong now.
func (i *instance) problems(s *loader.Stats) []string {
	var all []string
	add := func(when bool, text string) {
		if when {
			all = append(all, text)
		}
	}
	add(i.state(s) == admin.StateStale, "The handler does not get its own test connections: new connections go by on_failure. Run pillion doctor.")
	add(i.datapath.Detached(), "Programs are not attached, and cannot be attached again: connections are not captured. Is the cgroup gone?")
	add(i.datapath.Unpinned(), "The pins are gone and cannot be made again: what is in force ends with this process. Is the bpf file system mounted?")
	add(s.Busy, "The accept queues are nearly full: new connections go by on_failure.")
	add(s.EventsLost > 0, "Some flow records of the kernel side were lost: connections end faster than they are read.")
	add(i.flowLog != nil && i.flowLog.Failing(), "The flow log cannot be written, and its lines are lost. Is the disk full?")
	add(!i.datapath.Usable(true), "IPv6 is switched off in this network namespace: IPv6 connections go by on_failure.")
	add(!i.datapath.Holds() && i.control.inForce().Connect != config.ConnectEarly, "This kernel has no tcx (Linux 6.6): connects succeed before their dial has, whatever connect says.")
	add(i.existing.Load() > 0, "Connections that are older than Pillion are not captured. Restart the application, or use existing: reset.")
	return all
}

// sources are what the metrics are read from.
func (i *instance) sources() metrics.Sources {
	return metrics.Sources{
		Kernel:    i,
		Endpoints: i.control,
		Relay:     i,

		Configuration: i.control,
		Discovery:     i.control,
		Checks:        i.control,
		Sets:          i.control,
		Losses:        i.losses,
		Version:       buildVersion(),
	}
}

// Kernel implements [metrics.Kernel].
func (i *instance) Kernel() (metrics.KernelStats, error) {
	s, err := i.datapath.Stats()
	if err != nil {
		return metrics.KernelStats{}, err
	}
	return metrics.KernelStats{
		Reasons:     s.Reasons,
		Connects:    s.Connects,
		Decided:     s.Decided,
		Denied:      s.Denied,
		Unsent:      s.Unsent,
		Escaped:     s.Escaped + uint64(i.existing.Load()),
		EventsLost:  s.EventsLost,
		Stored:      s.Stored,
		Unaccounted: s.Unaccounted(),
		Slots:       map[string]int{"free": s.Free, "named": s.Named, "reserved": s.Reserved, "retiring": s.Retiring},
		SlotsMax:    s.SlotsMax,
		Live:        s.Live,
		Mended:      s.Mended,
		BeatAge:     s.BeatAge,
	}, nil
}

// Relay implements [metrics.Relay].
func (i *instance) Relay() metrics.RelayStats {
	s := i.handler.Stats()
	return metrics.RelayStats{
		Accepted:     s.Accepted,
		Live:         uint64(s.Live),
		Ended:        s.Ended,
		Dials:        s.Dials,
		DialFailures: s.DialFailures,
		Retries:      s.Retries,
		Unknown:      s.Unknown,
		Refused:      s.Refused,
		NotInjected:  s.NotInjected,
		AcceptPauses: s.Pauses,
		LostRecords:  s.Lost,
		Pipes:        s.Pipes,
	}
}

// losses counts records that are missing somewhere, by where.
func (i *instance) losses() map[string]uint64 {
	l := i.collector.Losses()
	all := map[string]uint64{"handler": l.Handler, "unmatched": l.Unmatched, "unreadable": l.Unreadable}
	if i.flowLog != nil {
		all["flowlog"] = i.flowLog.Dropped() + i.flowLog.Failed()
	}
	return all
}
