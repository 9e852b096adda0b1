package metrics

import "github.com/prometheus/client_golang/prometheus"

// endpoints reads the endpoints' counters.
type endpoints struct {
	source                                  Endpoints
	connections, weight, ejected, connect   series
	connectsTotal, failuresTotal, ejections series
}

func newEndpoints(source Endpoints) *endpoints {
	labels := []string{"cluster", "endpoint"}
	return &endpoints{
		source:        source,
		connections:   gauge("pillion_endpoint_connections", "Connections that are open or being dialed.", labels...),
		weight:        gauge("pillion_endpoint_weight", "The endpoint's share, by the configuration.", labels...),
		ejected:       gauge("pillion_endpoint_ejected", "1 while its failures keep the endpoint from being picked.", labels...),
		connect:       gauge("pillion_endpoint_connect_seconds", "How long the last answered dial took.", labels...),
		connectsTotal: counter("pillion_endpoint_connects_total", "Dials that were answered.", labels...),
		failuresTotal: counter("pillion_endpoint_failures_total", "Dials that failed.", labels...),
		ejections:     counter("pillion_endpoint_ejections_total", "How often the endpoint was ejected.", labels...),
	}
}

func (e *endpoints) all() []series {
	return []series{e.connections, e.weight, e.ejected, e.connect, e.connectsTotal, e.failuresTotal, e.ejections}
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
	e.connect.emit(ch, s.ConnectTime.Seconds(), labels...)
	e.connectsTotal.emit(ch, float64(s.Connects), labels...)
	e.failuresTotal.emit(ch, float64(s.Failures), labels...)
	e.ejections.emit(ch, float64(s.Ejections), labels...)
}
