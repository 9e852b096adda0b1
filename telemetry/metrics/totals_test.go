package metrics

import (
	"bytes"
	"encoding/gob"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
)

// What one process has counted, the next one and the one after it count on: nothing that
// is a counter of theirs jumps back, and what goes on by itself is not added twice.
func TestTotals(t *testing.T) {
	s := full()
	read := func(m *Metrics) map[string]float64 { return counters(t, m) }
	first := New(s.all())
	first.Record(&flow.Record{Path: flow.PathRelay, Reason: flow.ReasonService, End: flow.ReasonClosed, Sent: 5, Duration: time.Second})
	first.Record(&flow.Record{Path: flow.PathPass, Reason: flow.ReasonExcluded, End: flow.ReasonClosed, Received: 7, Duration: time.Minute})
	want := read(first)
	if len(want) < 40 {
		t.Fatalf("only %d counters: the test proves nothing", len(want))
	}
	once := map[string]bool{}
	for name := range want {
		once[name] = strings.HasPrefix(name, "pillion_endpoint_") && !strings.Contains(name, "removed") || ofKernel(name)
	}
	before := first
	for generation := 2; generation <= 3; generation++ {
		// It has counted as much again by itself, but for pass.
		next := New(s.all())
		if err := next.Resume(sent(t, before)); err != nil {
			t.Fatal(err)
		}
		next.Record(&flow.Record{Path: flow.PathRelay, Reason: flow.ReasonService, End: flow.ReasonClosed, Sent: 5, Duration: time.Second})
		got := read(next)
		for name, v := range want {
			switch {
			case once[name], strings.Contains(name, `path="pass"`):
			default:
				v *= float64(generation)
			}
			if got[name] != v {
				t.Errorf("generation %d: %s is %v, want %v", generation, name, got[name], v)
			}
		}
		before = next
	}
	// A service that is no more has no counters.
	s.discovery = nil
	last := New(s.all())
	if err := last.Resume(sent(t, before)); err != nil {
		t.Fatal(err)
	}
	for name := range read(last) {
		if strings.HasPrefix(name, "pillion_discovery_") {
			t.Errorf("%s is there still", name)
		}
	}
}

// Totals of another form are not understood, and nothing is added up.
func TestTotalsOfAnotherVersion(t *testing.T) {
	s := full()
	m := New(s.all())
	want := counters(t, m)
	totals := sent(t, m)
	totals.Version++
	if err := m.Resume(totals); err == nil {
		t.Error("they are taken")
	}
	if diff := cmp.Diff(want, counters(t, m)); diff != "" {
		t.Errorf("counters (-want +got):\n%s", diff)
	}
	// A build whose buckets are others.
	totals = sent(t, m)
	totals.All = append(totals.All, Total{Name: "pillion_rtt_seconds", Labels: []Label{{"path", "relay"}}, Histogram: &Histogram{Count: 9, Buckets: []Bucket{{1, 9}}}})
	m.Record(&flow.Record{Path: flow.PathRelay, Reason: flow.ReasonService, End: flow.ReasonClosed, RTT: time.Second})
	if err := m.Resume(totals); err != nil {
		t.Fatal(err)
	}
	if got := counters(t, m)[`pillion_rtt_seconds{path="relay"}`]; got != 1 {
		t.Errorf("a histogram of other bounds: %v observations, want 1", got)
	}
}

// sent is a process's totals as they arrive.
func sent(t *testing.T, m *Metrics) (got Totals) {
	t.Helper()
	totals, err := m.Totals()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := gob.NewEncoder(&b).Encode(totals); err != nil {
		t.Fatal(err)
	}
	if err := gob.NewDecoder(&b).Decode(&got); err != nil {
		t.Fatal(err)
	}
	return got
}

// ofKernel tells whether a series is the kernel side's.
func ofKernel(name string) bool {
	for _, prefix := range []string{"connects_total", "decisions_", "denials_", "escapes_", "reasons_", "unsent_", "reconcile_"} {
		if strings.HasPrefix(name, "pillion_"+prefix) {
			return true
		}
	}
	return name == `pillion_records_lost_total{where="ring"}`
}

// counters scrapes m and returns its counters and what histograms count, by name and
// labels.
func counters(t *testing.T, m *Metrics) map[string]float64 {
	t.Helper()
	all := map[string]float64{}
	for _, f := range families(t, m) {
		if !strings.HasPrefix(f.GetName(), "pillion_") {
			continue
		}
		for _, one := range f.GetMetric() {
			var labels []string
			for _, l := range one.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			name := f.GetName() + "{" + strings.Join(labels, ",") + "}"
			if c := one.GetCounter(); c != nil {
				all[name] = c.GetValue()
			}
			if h := one.GetHistogram(); h != nil {
				all[name] = float64(h.GetSampleCount())
				all[name+" sum"] = h.GetSampleSum()
				for _, b := range h.GetBucket() {
					all[fmt.Sprint(name, " ", b.GetUpperBound())] = float64(b.GetCumulativeCount())
				}
			}
		}
	}
	return all
}
