package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/pillion-project/pillion/redirect/flow"
)

// kernel reads the kernel side's counters.
type kernel struct {
	source                                                        Kernel
	readable, reasons                                             series
	connects, decisions, denials, unsent, escapes                 series
	unaccounted, slots, slotsLimit, liveConnections, heartbeatAge series
	mended, stored                                                series
}

func newKernel(source Kernel) *kernel {
	return &kernel{
		source:   source,
		readable: gauge("pillion_kernel_readable", "1 if the kernel side's counters could be read; 0 and they are missing here."),
		reasons:  counter("pillion_reasons_total", "Decisions of the kernel side, by reason.", "reason"),
		connects: counter("pillion_connects_total", "TCP connects in scope, counted apart from the hooks that decide on them."),
		decisions: counter("pillion_decisions_total",
			"Connects that a hook let through, on any path."),
		stored: counter("pillion_decisions_stored_total",
			"Decisions that are kept in socket storage, since another socket has the cell: such connections cost more."),
		denials: counter("pillion_denials_total", "Connects that a hook refused."),
		unsent: counter("pillion_unsent_total",
			"Connects that a hook let through, and that the kernel refused before the first packet."),
		escapes: counter("pillion_escapes_total", "TCP connects in scope that no hook decided on."),
		unaccounted: gauge("pillion_unaccounted_connections",
			"What the conservation law leaves over: connects that neither a decision nor an escape explains. Anything but 0 that stays is a bug."),
		slots:           gauge("pillion_slots", "Slots by state.", "state"),
		slotsLimit:      gauge("pillion_slots_limit", "Slots that may be used."),
		liveConnections: gauge("pillion_live_connections", "Connections that the kernel side has let in to the handler and that are open."),
		mended: counter("pillion_reconcile_corrections_total",
			"Endpoints whose live count was off when it was compared with the sockets that there are."),
		heartbeatAge: gauge("pillion_heartbeat_age_seconds", "Age of the sign of life that the hooks look at: it comes every 100 ms, and every 500 while nothing is on relay."),
	}
}

func (k *kernel) all() []series {
	return []series{k.readable, k.reasons, k.connects, k.decisions, k.stored, k.denials, k.unsent, k.escapes,
		k.unaccounted, k.slots, k.slotsLimit, k.liveConnections, k.mended, k.heartbeatAge}
}

// collect reads the source. Lost records go to lost.
func (k *kernel) collect(ch chan<- prometheus.Metric, lost map[string]uint64) {
	s, err := k.source.Kernel()
	k.readable.emit(ch, oneIf(err == nil))
	if err != nil {
		return
	}
	lost["ring"] = s.EventsLost
	k.collectReasons(ch, s.Reasons)
	k.connects.emit(ch, float64(s.Connects))
	k.decisions.emit(ch, float64(s.Decided))
	k.stored.emit(ch, float64(s.Stored))
	k.denials.emit(ch, float64(s.Denied))
	k.unsent.emit(ch, float64(s.Unsent))
	k.escapes.emit(ch, float64(s.Escaped))
	k.unaccounted.emit(ch, float64(s.Unaccounted))
	for state, n := range s.Slots {
		k.slots.emit(ch, float64(n), valid(state))
	}
	k.slotsLimit.emit(ch, float64(s.SlotsMax))
	k.liveConnections.emit(ch, float64(s.Live))
	k.mended.emit(ch, float64(s.Mended))
	k.heartbeatAge.emit(ch, s.BeatAge.Seconds())
}

// collectReasons emits those that are 0 too: a rate needs the first one.
func (k *kernel) collectReasons(ch chan<- prometheus.Metric, counts []uint64) {
	for i, n := range counts {
		if r := flow.Reason(i); r != flow.ReasonNone && r < flow.KernelReasons {
			k.reasons.emit(ch, float64(n), r.String())
		}
	}
}
