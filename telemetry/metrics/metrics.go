package metrics

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/pillion-project/pillion/redirect/flow"
)

// Metrics counts connections as they end, and reads everything else at a scrape.
// Its methods are safe for concurrent use.
type Metrics struct {
	// registry is its own: the default one belongs to whoever imports it.
	registry    *prometheus.Registry
	connections *prometheus.CounterVec
	bytes       *prometheus.CounterVec
	connect     prometheus.Histogram
	duration    *prometheus.HistogramVec
}

// connectBuckets and durationBuckets are upper bounds in seconds.
var (
	connectBuckets  = []float64{.0001, .0005, .001, .005, .01, .05, .1, .5, 1, 5, 15}
	durationBuckets = []float64{.001, .01, .1, 1, 10, 60, 600, 3600, 36000}
)

// New returns metrics that read from s.
func New(s Sources) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		connections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pillion_connections_total",
			Help: "Connections that ended or were denied, by who carried them, why, and how they ended.",
		}, []string{"path", "reason", "end"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pillion_bytes_total",
			Help: "Bytes of ended connections; sent is from the application.",
		}, []string{"path", "direction"}),
		connect: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "pillion_connect_duration_seconds",
			Help:    "How long the last dial of a relayed connection took to be answered.",
			Buckets: connectBuckets,
		}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "pillion_connection_duration_seconds",
			Help:    "How long ended connections lived.",
			Buckets: durationBuckets,
		}, []string{"path"}),
	}
	m.registry.MustRegister(m.connections, m.bytes, m.connect, m.duration,
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		newBuildInfo(s.Version),
		newScrape(s))
	return m
}

// Record counts a connection that ended. It does not keep r.
func (m *Metrics) Record(r *flow.Record) {
	path := r.Path.String()
	m.connections.WithLabelValues(path, r.Reason.String(), r.End.String()).Inc()
	if r.Path == flow.PathDeny {
		// It never was: a duration of 0 would only hide the others.
		return
	}
	m.bytes.WithLabelValues(path, "sent").Add(float64(r.Sent))
	m.bytes.WithLabelValues(path, "received").Add(float64(r.Received))
	m.duration.WithLabelValues(path).Observe(r.Duration.Seconds())
	if r.Connect > 0 {
		m.connect.Observe(r.Connect.Seconds())
	}
}

// Handler serves the metrics. A metric that cannot be read does not take the
// others with it.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError})
}

func newBuildInfo(version string) prometheus.Collector {
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "pillion_build_info",
		Help: "Always 1; the label tells the version.",
	}, []string{"version"})
	info.WithLabelValues(valid(version)).Set(1)
	return info
}
