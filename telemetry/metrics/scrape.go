package metrics

import (
	"maps"

	"github.com/prometheus/client_golang/prometheus"
)

// scrape reads every source once per scrape. It is one collector and not one per
// source, since several of them know of lost records.
type scrape struct {
	// nil: there is no such source.
	kernel    *kernel
	endpoints *endpoints
	relay     *relay
	losses    func() map[string]uint64

	lost series
}

func newScrape(s Sources) *scrape {
	c := &scrape{losses: s.Losses, lost: counter("pillion_records_lost_total",
		"Records of connections that are missing or incomplete, by where that came about.", "where")}
	if s.Kernel != nil {
		c.kernel = newKernel(s.Kernel)
	}
	if s.Endpoints != nil {
		c.endpoints = newEndpoints(s.Endpoints)
	}
	if s.Relay != nil {
		c.relay = newRelay(s.Relay)
	}
	return c
}

// Describe implements [prometheus.Collector].
func (c *scrape) Describe(ch chan<- *prometheus.Desc) {
	describe(ch, c.lost)
	if c.kernel != nil {
		describe(ch, c.kernel.all()...)
	}
	if c.endpoints != nil {
		describe(ch, c.endpoints.all()...)
	}
	if c.relay != nil {
		describe(ch, c.relay.all()...)
	}
}

// Collect implements [prometheus.Collector].
func (c *scrape) Collect(ch chan<- prometheus.Metric) {
	lost := map[string]uint64{}
	if c.kernel != nil {
		c.kernel.collect(ch, lost)
	}
	if c.endpoints != nil {
		c.endpoints.collect(ch)
	}
	if c.relay != nil {
		c.relay.collect(ch, lost)
	}
	if c.losses != nil {
		maps.Copy(lost, c.losses())
	}
	for where, n := range lost {
		c.lost.emit(ch, float64(n), valid(where))
	}
}
