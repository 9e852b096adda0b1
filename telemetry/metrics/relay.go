package metrics

import "github.com/prometheus/client_golang/prometheus"

// relay reads the handler's counters.
type relay struct {
	source                       Relay
	accepted, ended, connections series
	dials, dialFailures, retries series
	unknown, acceptPauses, pipes series
	refused, notInjected         series
}

func newRelay(source Relay) *relay {
	return &relay{
		source:       source,
		accepted:     counter("pillion_relay_accepted_total", "Connections that the handler accepted."),
		ended:        counter("pillion_relay_ended_total", "Connections that the handler ended."),
		connections:  gauge("pillion_relay_connections", "Connections that the handler carries."),
		dials:        counter("pillion_relay_dials_total", "Dials to endpoints."),
		dialFailures: counter("pillion_relay_dial_failures_total", "Dials to endpoints that failed."),
		retries:      counter("pillion_relay_retries_total", "Dials that followed a failed one of the same connection."),
		unknown: counter("pillion_relay_unknown_total",
			"Accepted connections that the kernel side does not know, which are refused."),
		acceptPauses: counter("pillion_relay_accept_pauses_total",
			"How often accepting stopped for want of descriptors."),
		refused: counter("pillion_relay_refused_total",
			"Connections whose application's connect was made to fail, as the dial had, or was given up by it."),
		notInjected: counter("pillion_relay_not_injected_total",
			"Frames with the result of a dial that the loopback interface did not take."),
		pipes: gauge("pillion_relay_pipes", "Pipes that are open for bulk transfers."),
	}
}

func (r *relay) all() []series {
	return []series{r.accepted, r.ended, r.connections, r.dials, r.dialFailures, r.retries,
		r.unknown, r.acceptPauses, r.refused, r.notInjected, r.pipes}
}

// collect reads the source. Lost records go to lost.
func (r *relay) collect(ch chan<- prometheus.Metric, lost map[string]uint64) {
	s := r.source.Relay()
	lost["handler"] = s.LostRecords
	r.accepted.emit(ch, float64(s.Accepted))
	r.ended.emit(ch, float64(s.Ended))
	r.connections.emit(ch, float64(s.Live))
	r.dials.emit(ch, float64(s.Dials))
	r.dialFailures.emit(ch, float64(s.DialFailures))
	r.retries.emit(ch, float64(s.Retries))
	r.unknown.emit(ch, float64(s.Unknown))
	r.acceptPauses.emit(ch, float64(s.AcceptPauses))
	r.refused.emit(ch, float64(s.Refused))
	r.notInjected.emit(ch, float64(s.NotInjected))
	r.pipes.emit(ch, float64(s.Pipes))
}
