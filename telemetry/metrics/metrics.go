package metrics

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/pillion-project/pillion/redirect/flow"
)

// Metrics counts connections as they end, and reads everything else at a scrape.
// Its methods are safe for concurrent use.
type Metrics struct {
	// registry is its own: the default one belongs to whoever imports it.
	registry  *prometheus.Registry
	flows     *flows
	endpoints Endpoints // nil: there are none
	sources   Sources
	base      []Total // of the process before; see Resume
	before    func()  // see BeforeTelling; nil: nobody wants to know
}

// New returns metrics that read from s.
func New(s Sources) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry(), flows: newFlows(), endpoints: s.Endpoints, sources: s}
	m.registry.MustRegister(m.flows,
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		newBuildInfo(s.Version),
		newScrape(s))
	return m
}

// BeforeTelling has f called by each scrape, when its counters are read and before any
// is told, so that f can have [Metrics.Totals] which are as high. Call it before the
// first one. Scrapes may be at once.
func (m *Metrics) BeforeTelling(f func()) { m.before = f }

// Record counts a connection that ended. It does not keep r.
func (m *Metrics) Record(r *flow.Record) { m.flows.record(r) }

func newBuildInfo(version string) prometheus.Collector {
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "pillion_build_info",
		Help: "Always 1; the label tells the version.",
	}, []string{"version"})
	info.WithLabelValues(valid(version)).Set(1)
	return info
}
