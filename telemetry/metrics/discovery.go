package metrics

import "github.com/prometheus/client_golang/prometheus"

// discovery reads the sources of endpoints.
type discovery struct {
	source                    Discovery
	age, stale, endpoints     series
	updatesTotal, errorsTotal series
}

func newDiscovery(source Discovery) *discovery {
	labels := []string{"service", "source"}
	return &discovery{
		source: source,
		age: gauge("pillion_discovery_age_seconds",
			"How long ago the source last told the endpoints; since when it has been asked, if it never did.", labels...),
		stale:        gauge("pillion_discovery_stale", "1 while the source does not tell, and the last good endpoints stay.", labels...),
		endpoints:    gauge("pillion_discovery_endpoints", "Endpoints that the source has told.", labels...),
		updatesTotal: counter("pillion_discovery_updates_total", "Answers of the source.", labels...),
		errorsTotal:  counter("pillion_discovery_errors_total", "Times that the source could not tell.", labels...),
	}
}

func (d *discovery) all() []series {
	return []series{d.age, d.stale, d.endpoints, d.updatesTotal, d.errorsTotal}
}

// collect reads the source.
func (d *discovery) collect(ch chan<- prometheus.Metric) {
	seen := map[[2]string]bool{} // see endpoints.collect
	for _, s := range d.source.Discovery() {
		labels := [2]string{valid(s.Service), valid(s.Source)}
		if seen[labels] {
			continue
		}
		seen[labels] = true
		d.age.emit(ch, s.Age.Seconds(), labels[:]...)
		d.stale.emit(ch, oneIf(s.Stale), labels[:]...)
		d.endpoints.emit(ch, float64(s.Endpoints), labels[:]...)
		d.updatesTotal.emit(ch, float64(s.Updates), labels[:]...)
		d.errorsTotal.emit(ch, float64(s.Errors), labels[:]...)
	}
}
