package main

import (
	"net/netip"

	"github.com/pillion-project/pillion/telemetry/metrics"
)

// handedTotals are counters that the next process goes on from. One that does not know
// of them begins at 0, as after a restart.
type handedTotals struct {
	Metrics   metrics.Totals
	Endpoints []endpointTotals
}

// endpointTotals are what the handler has counted of an endpoint.
type endpointTotals struct {
	Cluster                       string
	Addr                          netip.AddrPort
	Connects, Failures, Ejections uint64
}

// totals are those of this process, when nothing moves any more.
func (i *instance) totals() (t handedTotals) {
	var err error
	if t.Metrics, err = i.metrics.Totals(); err != nil {
		i.log.Warn("the counters of the metrics will begin at 0", "error", err)
	}
	for _, c := range i.snapshot.Load().Clusters() {
		for _, e := range c.Endpoints {
			if s := e.State(); s.Connects+s.Failures+s.Ejections > 0 {
				t.Endpoints = append(t.Endpoints, endpointTotals{c.Name, s.Addr, s.Connects, s.Failures, s.Ejections})
			}
		}
	}
	return t
}

// countOn goes on from the totals of the process before.
func (i *instance) countOn(t *handedTotals) {
	if err := i.metrics.Resume(t.Metrics); err != nil {
		i.log.Warn("the counters of the metrics begin at 0", "why", err)
	}
	before := make(map[string][]endpointTotals)
	for _, e := range t.Endpoints {
		before[e.Cluster] = append(before[e.Cluster], e)
	}
	for _, c := range i.snapshot.Load().Clusters() {
		at := make(map[netip.AddrPort]endpointTotals, len(before[c.Name]))
		for _, e := range before[c.Name] {
			at[e.Addr] = e
		}
		for _, e := range c.Endpoints {
			if was, ok := at[e.Addr]; ok {
				e.Resume(was.Connects, was.Failures, was.Ejections)
			}
		}
	}
}
