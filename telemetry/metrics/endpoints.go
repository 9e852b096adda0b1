package metrics

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"
)

// endpoints reads the endpoints' counters.
type endpoints struct {
	source                                      Endpoints
	connections, weight, ejected, down, connect series
	connectsTotal, failuresTotal, ejections     series
	info                                        series
}

func newEndpoints(source Endpoints) *endpoints {
	labels := []string{"cluster", "endpoint"}
	return &endpoints{
		source:        source,
		connections:   gauge("pillion_endpoint_connections", "Connections that are open or being dialed.", labels...),
		weight:        gauge("pillion_endpoint_weight", "The endpoint's share, by the configuration or its source.", labels...),
		ejected:       gauge("pillion_endpoint_ejected", "1 while its failures keep the endpoint from being picked.", labels...),
		down:          gauge("pillion_endpoint_down", "1 while a health check keeps the endpoint from being picked.", labels...),
		connect:       gauge("pillion_endpoint_connect_seconds", "How long the last answered dial took.", labels...),
		connectsTotal: counter("pillion_endpoint_connects_total", "Dials that were answered.", labels...),
		failuresTotal: counter("pillion_endpoint_failures_total", "Dials that failed.", labels...),
		ejections:     counter("pillion_endpoint_ejections_total", "How often the endpoint was ejected.", labels...),
		// Not labels of the others: those would begin anew when a service
		// changes its path.
		info: gauge("pillion_endpoint_info", "Always 1; the labels tell the endpoint's zone and the path of connections to it.",
			append(labels, "zone", "path")...),
	}
}

func (e *endpoints) all() []series {
	return []series{e.connections, e.weight, e.ejected, e.down, e.connect, e.connectsTotal, e.failuresTotal, e.ejections, e.info}
}

// collect reads the source.
func (e *endpoints) collect(ch chan<- prometheus.Metric) {
	// Two of the same labels would spoil the whole scrape, and services that
	// share a cluster may list it twice.
	seen := map[[2]string]bool{}
	for _, s := range e.source.Endpoints() {
		labels := [2]string{valid(s.Cluster), valid(s.Addr)}
		if !seen[labels] {
			seen[labels] = true
			e.emit(ch, &s, labels[:])
		}
	}
}

func (e *endpoints) emit(ch chan<- prometheus.Metric, s *EndpointStats, labels []string) {
	e.connections.emit(ch, float64(s.Live), labels...)
	e.weight.emit(ch, float64(s.Weight), labels...)
	e.ejected.emit(ch, oneIf(s.Ejected), labels...)
	e.down.emit(ch, oneIf(s.Down), labels...)
	e.connect.emit(ch, s.ConnectTime.Seconds(), labels...)
	e.connectsTotal.emit(ch, float64(s.Connects), labels...)
	e.failuresTotal.emit(ch, float64(s.Failures), labels...)
	e.ejections.emit(ch, float64(s.Ejections), labels...)
	e.info.emit(ch, 1, append(slices.Clone(labels), valid(s.Zone), s.Path.String())...)
}
