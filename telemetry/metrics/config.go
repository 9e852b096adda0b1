package metrics

import "github.com/prometheus/client_golang/prometheus"

// configuration reads which configuration holds.
type configuration struct {
	source                          Configuration
	generation, refused             series
	reloads, failures, tried, whole series
}

func newConfiguration(source Configuration) *configuration {
	return &configuration{
		source:     source,
		generation: gauge("pillion_config_generation", "Which configuration holds: how many were taken so far."),
		refused: gauge("pillion_config_refused",
			"1 for each service or source of the last configuration that was not taken; an earlier state of it holds.", "service"),
		reloads:  counter("pillion_config_reloads_total", "Configurations that were read, the first included."),
		failures: counter("pillion_config_reload_failures_total", "Configurations that were read and of which nothing was taken."),
		tried:    gauge("pillion_config_last_reload_timestamp_seconds", "When a configuration was last read."),
		whole:    gauge("pillion_config_last_reload_successful", "1 if all of the configuration that was last read was taken."),
	}
}

func (c *configuration) all() []series {
	return []series{c.generation, c.refused, c.reloads, c.failures, c.tried, c.whole}
}

// collect reads the source.
func (c *configuration) collect(ch chan<- prometheus.Metric) {
	s := c.source.Configuration()
	c.generation.emit(ch, float64(s.Generation))
	c.reloads.emit(ch, float64(s.Reloads))
	c.failures.emit(ch, float64(s.Failures))
	if !s.Tried.IsZero() {
		c.tried.emit(ch, float64(s.Tried.UnixMilli())/1000)
	}
	c.whole.emit(ch, oneIf(s.OK))
	seen := map[string]bool{} // see endpoints.write
	for _, name := range s.Refused {
		if name = valid(name); !seen[name] {
			seen[name] = true
			c.refused.emit(ch, 1, name)
		}
	}
}
