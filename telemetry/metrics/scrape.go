package metrics

import (
	"maps"

	"github.com/prometheus/client_golang/prometheus"
)

// part reads one source.
type part interface {
	all() []series
	// collect reads the source.
	collect(ch chan<- prometheus.Metric)
}

// lossy is a part whose source also knows of lost records.
type lossy interface {
	all() []series
	// collect reads the source. Lost records go to lost.
	collect(ch chan<- prometheus.Metric, lost map[string]uint64)
}

// scrape reads every source once per scrape. It is one collector and not one per
// source, since several of them know of lost records. Endpoints are apart: they are many.
type scrape struct {
	lossy  []lossy
	parts  []part
	losses func() map[string]uint64 // nil: nobody knows more

	lost series
}

func newScrape(s Sources) *scrape {
	c := &scrape{losses: s.Losses, lost: counter("pillion_records_lost_total",
		"Records of connections that are missing or incomplete, by where that came about.", "where")}
	if s.Kernel != nil {
		c.lossy = append(c.lossy, newKernel(s.Kernel))
	}
	if s.Relay != nil {
		c.lossy = append(c.lossy, newRelay(s.Relay))
	}
	if s.Configuration != nil {
		c.parts = append(c.parts, newConfiguration(s.Configuration))
	}
	if s.Discovery != nil {
		c.parts = append(c.parts, newDiscovery(s.Discovery))
	}
	if s.Sets != nil {
		c.parts = append(c.parts, newSets(s.Sets))
	}
	if s.Checks != nil {
		c.parts = append(c.parts, newChecks(s.Checks))
	}
	return c
}

// Describe implements [prometheus.Collector].
func (c *scrape) Describe(ch chan<- *prometheus.Desc) {
	describe(ch, c.lost)
	for _, p := range c.lossy {
		describe(ch, p.all()...)
	}
	for _, p := range c.parts {
		describe(ch, p.all()...)
	}
}

// Collect implements [prometheus.Collector].
func (c *scrape) Collect(ch chan<- prometheus.Metric) {
	lost := map[string]uint64{}
	for _, p := range c.lossy {
		p.collect(ch, lost)
	}
	for _, p := range c.parts {
		p.collect(ch)
	}
	if c.losses != nil {
		maps.Copy(lost, c.losses())
	}
	for where, n := range lost {
		c.lost.emit(ch, float64(n), valid(where))
	}
}
