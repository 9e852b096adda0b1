package metrics

import "github.com/prometheus/client_golang/prometheus"

// discovery reads the sources of endpoints.
type discovery struct {
	source                    Discovery
	age, stale, endpoints     series
	changesTotal, errorsTotal series
}

func newDiscovery(source Discovery) *discovery {
	labels := []string{"service", "source"}
	return &discovery{
		source: source,
		age: gauge("pillion_discovery_age_seconds",
			"For how long the source has not told the endpoints: 0 while it does.", labels...),
		stale:        gauge("pillion_discovery_stale", "1 while the source does not tell, and the last good endpoints stay.", labels...),
		endpoints:    gauge("pillion_discovery_endpoints", "Endpoints that the source has told.", labels...),
		changesTotal: counter("pillion_discovery_changes_total", "Answers of the source that differed from the one before.", labels...),
		errorsTotal:  counter("pillion_discovery_errors_total", "Times that the source could not tell.", labels...),
	}
}

func (d *discovery) all() []series {
	return []series{d.age, d.stale, d.endpoints, d.changesTotal, d.errorsTotal}
}

// collect reads the source.
func (d *discovery) collect(ch chan<- prometheus.Metric) {
	seen := map[[2]string]bool{} // see endpoints.write
	for _, s := range d.source.Discovery() {
		labels := [2]string{valid(s.Service), valid(s.Source)}
		if seen[labels] {
			continue
		}
		seen[labels] = true
		d.age.emit(ch, s.Age.Seconds(), labels[:]...)
		d.stale.emit(ch, oneIf(s.Stale), labels[:]...)
		d.endpoints.emit(ch, float64(s.Endpoints), labels[:]...)
		d.changesTotal.emit(ch, float64(s.Changes), labels[:]...)
		d.errorsTotal.emit(ch, float64(s.Errors), labels[:]...)
	}
}
