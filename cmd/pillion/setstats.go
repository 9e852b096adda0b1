package main

import (
	"sync/atomic"
	"time"

	"github.com/pillion-project/pillion/telemetry/metrics"
)

// setStats counts what is done with the endpoint sets of the kernel side.
type setStats struct {
	publishes, failures, ended atomic.Uint64
	took                       atomic.Int64 // of the last publish, in nanoseconds
}

// publish runs f, which publishes sets.
func (s *setStats) publish(f func() error) error {
	began := time.Now()
	err := f()
	s.took.Store(int64(time.Since(began)))
	if err != nil {
		s.failures.Add(1)
		return err
	}
	s.publishes.Add(1)
	return nil
}

// Sets implements [metrics.Sets].
func (c *control) Sets() metrics.SetStats {
	s := &c.i.sets
	m := metrics.SetStats{
		Publishes: s.publishes.Load(), Failures: s.failures.Load(), Ended: s.ended.Load(), PublishTime: time.Duration(s.took.Load()),
	}
	for _, v := range c.list() {
		switch {
		case v.set != nil:
			m.Sets++
			m.SetEndpoints += len(v.set.Endpoints)
		case v.kept:
			m.Sets++
			m.SetEndpoints += len(v.endpoints)
		}
	}
	return m
}
