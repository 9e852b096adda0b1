package metrics

import "github.com/prometheus/client_golang/prometheus"

// sets reads the counters of the endpoint sets in the kernel.
type sets struct {
	source                           Sets
	count, endpoints                 series
	publishes, failures, publishTime series
	ended                            series
}

func newSets(source Sets) *sets {
	return &sets{
		source:      source,
		count:       gauge("pillion_sets", "Services whose endpoints the kernel side has."),
		endpoints:   gauge("pillion_set_endpoints", "Endpoints that the kernel side has, of all services."),
		publishes:   counter("pillion_set_publishes_total", "Batches of endpoint sets that were written to the kernel side."),
		failures:    counter("pillion_set_publish_failures_total", "Batches that could not be written: the sets before them stay."),
		publishTime: gauge("pillion_set_publish_seconds", "How long the last batch took."),
		ended:       counter("pillion_endpoint_removed_connections_total", "Connections that were ended since their endpoint had been removed."),
	}
}

func (s *sets) all() []series {
	return []series{s.count, s.endpoints, s.publishes, s.failures, s.publishTime, s.ended}
}

// collect reads the source.
func (s *sets) collect(ch chan<- prometheus.Metric) {
	v := s.source.Sets()
	s.count.emit(ch, float64(v.Sets))
	s.endpoints.emit(ch, float64(v.SetEndpoints))
	s.publishes.emit(ch, float64(v.Publishes))
	s.failures.emit(ch, float64(v.Failures))
	s.publishTime.emit(ch, v.PublishTime.Seconds())
	s.ended.emit(ch, float64(v.Ended))
}

// checks reads what the health checks find.
type checks struct {
	source          Checks
	states, failing series
}

func newChecks(source Checks) *checks {
	return &checks{
		source:  source,
		states:  gauge("pillion_health_check_endpoints", "Endpoints that are checked, by what the checks say.", "cluster", "state"),
		failing: gauge("pillion_health_check_failing_endpoints", "Endpoints whose last check failed, whatever their state.", "cluster"),
	}
}

func (c *checks) all() []series { return []series{c.states, c.failing} }

// collect reads the source.
func (c *checks) collect(ch chan<- prometheus.Metric) {
	seen := map[string]bool{} // see endpoints.write
	for _, s := range c.source.Checks() {
		cluster := valid(s.Cluster)
		if seen[cluster] {
			continue
		}
		seen[cluster] = true
		c.states.emit(ch, float64(s.Up), cluster, "up")
		c.states.emit(ch, float64(s.Down), cluster, "down")
		c.states.emit(ch, float64(s.Unknown), cluster, "unknown")
		c.failing.emit(ch, float64(s.Failing), cluster)
	}
}
