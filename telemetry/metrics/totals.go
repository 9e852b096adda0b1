package metrics

import (
	"fmt"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// totalsVersion is the number of the form of [Totals]. It changes when an older
// process would add them up wrongly; what it does not know by name it keeps as it is.
const totalsVersion = 1

// Totals are the counters of one process, as plain values, for another one that goes on
// with its instance. Those of the kernel side are not among them, since they go on by
// themselves, nor are those of endpoints, which the handler counts on.
type Totals struct {
	Version int
	All     []Total
}

// Total is one counter or one histogram.
type Total struct {
	Name, Help string
	Labels     []Label
	Value      float64 // of a counter
	Histogram  *Histogram
}

// Label is one of a counter's.
type Label struct{ Name, Value string }

// Histogram is what was observed; Buckets count what is below Bound, in seconds.
type Histogram struct {
	Count   uint64
	Sum     float64
	Buckets []Bucket
}

// Bucket is one of a histogram.
type Bucket struct {
	Bound float64
	Count uint64
}

// serviceLabel is that of counters which end with what they are of.
const serviceLabel = "service"

// carried gathers the counters that [Totals] has. It may be called when nothing of the
// kernel side can be asked.
func (m *Metrics) carried() ([]*dto.MetricFamily, error) {
	r := prometheus.NewRegistry()
	s := m.sources
	s.Kernel, s.Endpoints, s.Checks = nil, nil, nil
	r.MustRegister(m.flows, newScrape(s))
	families, err := r.Gather()
	if err != nil {
		return nil, fmt.Errorf("read the counters: %w", err)
	}
	return m.addBase(families), nil
}

// Totals returns what another process has to go on from.
func (m *Metrics) Totals() (Totals, error) {
	families, err := m.carried()
	if err != nil {
		return Totals{}, err
	}
	t := Totals{Version: totalsVersion}
	for _, f := range families {
		if f.GetType() != dto.MetricType_COUNTER && f.GetType() != dto.MetricType_HISTOGRAM {
			continue
		}
		for _, one := range f.GetMetric() {
			t.All = append(t.All, totalOf(f, one))
		}
	}
	return t, nil
}

func totalOf(f *dto.MetricFamily, one *dto.Metric) Total {
	t := Total{Name: f.GetName(), Help: f.GetHelp(), Value: one.GetCounter().GetValue()}
	for _, l := range one.GetLabel() {
		t.Labels = append(t.Labels, Label{l.GetName(), l.GetValue()})
	}
	if h := one.GetHistogram(); h != nil {
		t.Histogram = &Histogram{Count: h.GetSampleCount(), Sum: h.GetSampleSum()}
		for _, b := range h.GetBucket() {
			t.Histogram.Buckets = append(t.Histogram.Buckets, Bucket{b.GetUpperBound(), b.GetCumulativeCount()})
		}
	}
	return t
}

// Resume has everything count on from what another process counted. It comes before
// the first scrape. It fails when it does not understand them; then all begin at 0.
func (m *Metrics) Resume(t Totals) error {
	if t.Version != totalsVersion {
		return fmt.Errorf("totals of version %d: this build reads %d", t.Version, totalsVersion)
	}
	m.base = t.All
	return nil
}

// addBase adds what was counted before to what was read. Where there is nothing to add
// it to, it is there alone: a counter does not go away. But one of a service that is no
// more does.
func (m *Metrics) addBase(families []*dto.MetricFamily) []*dto.MetricFamily {
	for i := range m.base {
		t := &m.base[i]
		at := slices.IndexFunc(families, func(f *dto.MetricFamily) bool { return f.GetName() == t.Name })
		if at < 0 {
			if t.has(serviceLabel) {
				continue
			}
			at = len(families)
			families = append(families, t.family())
		}
		f := families[at]
		n := slices.IndexFunc(f.GetMetric(), t.sameLabels)
		switch {
		case n >= 0:
			t.addTo(f.GetMetric()[n])
		case !t.has(serviceLabel):
			f.Metric = append(f.Metric, t.metric())
		default:
		}
	}
	slices.SortFunc(families, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	return families
}

func (t *Total) has(label string) bool {
	return slices.ContainsFunc(t.Labels, func(l Label) bool { return l.Name == label })
}

// sameLabels: both are sorted by name.
func (t *Total) sameLabels(m *dto.Metric) bool {
	return slices.EqualFunc(t.Labels, m.GetLabel(), func(l Label, p *dto.LabelPair) bool {
		return l.Name == p.GetName() && l.Value == p.GetValue()
	})
}

func (t *Total) family() *dto.MetricFamily {
	kind := dto.MetricType_COUNTER
	if t.Histogram != nil {
		kind = dto.MetricType_HISTOGRAM
	}
	return &dto.MetricFamily{Name: &t.Name, Help: &t.Help, Type: &kind}
}

// metric is t as the library has it, in memory of its own.
func (t *Total) metric() *dto.Metric {
	m := &dto.Metric{}
	for _, l := range t.Labels {
		m.Label = append(m.Label, &dto.LabelPair{Name: &l.Name, Value: &l.Value})
	}
	if t.Histogram == nil {
		m.Counter = &dto.Counter{Value: new(float64)}
	} else {
		m.Histogram = &dto.Histogram{SampleCount: new(uint64), SampleSum: new(float64)}
		for _, b := range t.Histogram.Buckets {
			m.Histogram.Bucket = append(m.Histogram.Bucket, &dto.Bucket{UpperBound: &b.Bound, CumulativeCount: new(uint64)})
		}
	}
	t.addTo(m)
	return m
}

// addTo adds t to a metric of the same name and labels. A histogram whose bounds are
// others in this build stays as it is: it begins anew.
func (t *Total) addTo(m *dto.Metric) {
	if c := m.GetCounter(); c != nil && c.Value != nil {
		*c.Value += t.Value
	}
	h := m.GetHistogram()
	if h == nil || t.Histogram == nil || !slices.EqualFunc(h.GetBucket(), t.Histogram.Buckets,
		func(b *dto.Bucket, o Bucket) bool { return b.GetUpperBound() == o.Bound }) {
		return
	}
	*h.SampleCount += t.Histogram.Count
	*h.SampleSum += t.Histogram.Sum
	for i, b := range h.GetBucket() {
		*b.CumulativeCount += t.Histogram.Buckets[i].Count
	}
}
