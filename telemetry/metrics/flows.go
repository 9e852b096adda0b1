package metrics

import (
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/pillion-project/pillion/redirect/flow"
)

// flows counts connections as they end. The library's own vectors were rejected
// here: they look every label up by its text, several times for each connection,
// which costs more than all else that user space does for one on direct.
type flows struct {
	connections, bytes, retransmits series
	connect, duration, rtt          histogram

	// mu orders by: records come from one goroutine, scrapes from others.
	mu sync.Mutex
	by []pathFlows // by flow.Path
}

// pathFlows are the counters of one path.
type pathFlows struct {
	// ends counts by flow.Reason of the path, and then of the end; nil where
	// nothing was counted.
	ends                        [][]uint64
	sent, received, retransmits uint64
	connect, duration, rtt      buckets
}

// histogram is what all paths' buckets of one metric share.
type histogram struct {
	desc   *prometheus.Desc
	bounds []time.Duration // upper ones
}

// buckets is one histogram. counts has one more than there are bounds, for what
// is above all of them; nil while nothing was counted.
type buckets struct {
	counts []uint64
	sum    time.Duration
}

func newFlows() *flows {
	return &flows{
		connections: counter("pillion_connections_total",
			"Connections that ended or were denied, by who carried them, why, and how they ended.", "path", "reason", "end"),
		bytes:       counter("pillion_bytes_total", "Bytes of ended connections; sent is from the application.", "path", "direction"),
		retransmits: counter("pillion_retransmits_total", "Segments that ended connections sent again to the endpoint.", "path"),
		connect: newHistogram("pillion_connect_duration_seconds",
			"How long the last dial of a connection took to be answered: the handler's on relay, else the application's own.",
			[]time.Duration{
				100 * time.Microsecond, 500 * time.Microsecond, time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond,
				50 * time.Millisecond, 100 * time.Millisecond, 500 * time.Millisecond, time.Second, 5 * time.Second, 15 * time.Second,
			}),
		duration: newHistogram("pillion_connection_duration_seconds", "How long ended connections lived.",
			[]time.Duration{
				time.Millisecond, 10 * time.Millisecond, 100 * time.Millisecond, time.Second, 10 * time.Second,
				time.Minute, 10 * time.Minute, time.Hour, 10 * time.Hour,
			}),
		rtt: newHistogram("pillion_rtt_seconds", "The smoothed round-trip time to the endpoint when a connection ended.",
			[]time.Duration{
				50 * time.Microsecond, 100 * time.Microsecond, 500 * time.Microsecond, time.Millisecond, 5 * time.Millisecond,
				10 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond, 500 * time.Millisecond, time.Second,
			}),
		by: make([]pathFlows, len(flow.Paths())),
	}
}

func newHistogram(name, help string, bounds []time.Duration) histogram {
	return histogram{desc: prometheus.NewDesc(name, help, []string{"path"}, nil), bounds: bounds}
}

// observe counts d.
func (h *histogram) observe(b *buckets, d time.Duration) {
	if b.counts == nil {
		b.counts = make([]uint64, len(h.bounds)+1)
	}
	i := 0
	for i < len(h.bounds) && d > h.bounds[i] {
		i++
	}
	b.counts[i]++
	b.sum += d
}

// emit sends b, if anything was counted.
func (h *histogram) emit(ch chan<- prometheus.Metric, b *buckets, path string) {
	if b.counts == nil {
		return
	}
	all, below := make(map[float64]uint64, len(h.bounds)), uint64(0)
	for i, bound := range h.bounds {
		below += b.counts[i]
		all[bound.Seconds()] = below
	}
	total := below + b.counts[len(h.bounds)]
	ch <- prometheus.MustNewConstHistogram(h.desc, total, b.sum.Seconds(), all, path)
}

// record counts r.
func (f *flows) record(r *flow.Record) {
	if int(r.Path) >= len(f.by) {
		return // no such path
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p := &f.by[r.Path]
	if n := p.end(r); n != nil {
		*n++
	}
	if r.Path == flow.PathDeny {
		// It never was: a duration of 0 would only hide the others.
		return
	}
	p.sent += r.Sent
	p.received += r.Received
	p.retransmits += uint64(r.Retransmits)
	f.duration.observe(&p.duration, r.Duration)
	if r.Connect > 0 {
		f.connect.observe(&p.connect, r.Connect)
	}
	if r.RTT > 0 {
		f.rtt.observe(&p.rtt, r.RTT)
	}
}

// end is where r is counted, nil for reasons that there are none of.
func (p *pathFlows) end(r *flow.Record) *uint64 {
	if p.ends == nil {
		p.ends = make([][]uint64, len(flow.Reasons()))
	}
	if int(r.Reason) >= len(p.ends) || int(r.End) >= len(p.ends) {
		return nil
	}
	row := &p.ends[r.Reason]
	if *row == nil {
		*row = make([]uint64, len(p.ends))
	}
	return &(*row)[r.End]
}

// Describe implements [prometheus.Collector].
func (f *flows) Describe(ch chan<- *prometheus.Desc) {
	describe(ch, f.connections, f.bytes, f.retransmits)
	for _, h := range []histogram{f.connect, f.duration, f.rtt} {
		ch <- h.desc
	}
}

// Collect implements [prometheus.Collector].
func (f *flows) Collect(ch chan<- prometheus.Metric) {
	for path, p := range f.copy() {
		f.collect(ch, flow.Path(path), &p)
	}
}

// copy is for a scrape, whose reader may be slow, and must not hold up record.
func (f *flows) copy() []pathFlows {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := slices.Clone(f.by)
	for i := range all {
		p := &all[i]
		p.ends = slices.Clone(p.ends)
		for reason := range p.ends {
			p.ends[reason] = slices.Clone(p.ends[reason])
		}
		for _, b := range []*buckets{&p.connect, &p.duration, &p.rtt} {
			b.counts = slices.Clone(b.counts)
		}
	}
	return all
}

func (f *flows) collect(ch chan<- prometheus.Metric, path flow.Path, p *pathFlows) {
	name := path.String()
	for reason, row := range p.ends {
		for end, n := range row {
			if n > 0 {
				f.connections.emit(ch, float64(n), name, flow.Reason(reason).String(), flow.Reason(end).String())
			}
		}
	}
	if p.ends == nil || path == flow.PathDeny {
		return
	}
	f.bytes.emit(ch, float64(p.sent), name, "sent")
	f.bytes.emit(ch, float64(p.received), name, "received")
	f.retransmits.emit(ch, float64(p.retransmits), name)
	f.connect.emit(ch, &p.connect, name)
	f.duration.emit(ch, &p.duration, name)
	f.rtt.emit(ch, &p.rtt, name)
}
