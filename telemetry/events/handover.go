package events

import (
	"github.com/pillion-project/pillion/redirect/flow"
)

// Half is a record that waits for its other half, which another collector may get.
type Half struct {
	Record flow.Record
	// Kernel tells which side it came from: the kernel side, or the handler.
	Kernel bool
}

// Frozen is a collector that takes and gives nothing. One of Thaw and Leave must be
// called.
type Frozen struct{ c *Collector }

// Freeze waits for the collection that is under way and lets none begin.
func (c *Collector) Freeze() *Frozen {
	c.mu.Lock()
	return &Frozen{c: c}
}

// Halves takes what the handler has told since, and returns what waits. The handler
// must stand still.
func (f *Frozen) Halves() []Half {
	c := f.c
	if !c.closed && c.handler != nil {
		c.takeEnded()
	}
	var all []Half
	for e := c.joiner.order.Front(); e != nil; e = e.Next() {
		w := e.Value.(*waiting)
		all = append(all, Half{Record: w.record, Kernel: w.side == fromKernel})
	}
	return all
}

// Thaw lets the collector go on.
func (f *Frozen) Thaw() { f.c.mu.Unlock() }

// Leave ends the collector without giving out what waits, which another one has. The
// ring is closed.
func (f *Frozen) Leave() error {
	defer f.c.mu.Unlock()
	if f.c.closed {
		return nil
	}
	f.c.closed = true
	f.c.joiner.forget()
	if f.c.ring == nil {
		return nil
	}
	return f.c.ring.close()
}

// Adopt takes what waited for its other half with another collector, before Run.
func (c *Collector) Adopt(halves []Half) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range halves {
		from := fromHandler
		if halves[i].Kernel {
			from = fromKernel
		}
		c.joiner.add(from, &halves[i].Record, c.patient)
	}
}

// Remember puts records in front of the history that were given out by another
// collector.
func (c *Collector) Remember(records []flow.Record) { c.history.remember(records) }
