package events

import (
	"testing"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/metrics"
)

// BenchmarkEvent is what one connection on direct costs user space from the bytes
// in the ring on.
func BenchmarkEvent(b *testing.B) {
	c := newCollector(Options{Names: names, Sinks: []Sink{metrics.New(metrics.Sources{})}}, &fakeRing{})
	e := raw(event(1, flow.PathDirect, bpf.EndingClosed))
	b.ReportAllocs()
	for b.Loop() {
		c.event(e)
	}
}

// BenchmarkRing is the same with the reading of the ring, which the program that
// fills it is no part of.
func BenchmarkRing(b *testing.B) {
	m := newMap(b)
	r, err := openRing(m)
	if err != nil {
		b.Fatal(err)
	}
	defer r.close()
	c := newCollector(Options{Names: names, Sinks: []Sink{metrics.New(metrics.Sources{})}}, r)
	const burst = 1000
	emit := emitter(b, m, event(1, flow.PathDirect, bpf.EndingClosed), noWakeup)
	b.ReportAllocs()
	b.ResetTimer()
	for n := 0; n < b.N; n += burst {
		b.StopTimer()
		emit(burst)
		b.StartTimer()
		if _, err := r.read(c.event); err != nil {
			b.Fatal(err)
		}
	}
}
