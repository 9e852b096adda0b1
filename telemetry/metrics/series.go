package metrics

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// series is a metric whose values are read at the scrape.
type series struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

func counter(name, help string, labels ...string) series {
	return series{prometheus.NewDesc(name, help, labels, nil), prometheus.CounterValue}
}

func gauge(name, help string, labels ...string) series {
	return series{prometheus.NewDesc(name, help, labels, nil), prometheus.GaugeValue}
}

// emit sends one value. The labels must be valid UTF-8.
func (s series) emit(ch chan<- prometheus.Metric, value float64, labels ...string) {
	ch <- prometheus.MustNewConstMetric(s.desc, s.kind, value, labels...)
}

// describe sends the descriptions of all.
func describe(ch chan<- *prometheus.Desc, all ...series) {
	for _, s := range all {
		ch <- s.desc
	}
}

// valid makes s fit for a label: names come from the user's configuration.
func valid(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
