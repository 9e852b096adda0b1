package events

import (
	"math"
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

// FuzzJoin feeds a joiner with events from arbitrary bytes, handler's records
// and passing time. Nothing may vanish, nothing may come out twice, and nothing
// may stay behind.
//
// The input is a list of steps. 0: the next bytes are an event; 1: a handler's
// record with the next byte as cookie and the one after as port; else: that many
// tenths of a second pass.
func FuzzJoin(f *testing.F) {
	e := raw(event(1, flow.PathRelay, bpf.EndingClosed))
	f.Add(append(append([]byte{0}, e...), 1, 1, 0))
	f.Add(append(append([]byte{1, 1, 0, 19, 30, 0}, e...), 255, 1, 2, 2))
	f.Fuzz(func(t *testing.T, steps []byte) {
		const limit = 8
		emitted := 0
		j := newJoiner(false, limit, func(r *flow.Record) {
			emitted++
			if r.Duration < 0 || r.End == flow.ReasonNone || r.Path == flow.PathNone {
				t.Errorf("bad record %+v", r)
			}
		})
		now, halves, joins := epoch, 0, 0
		for len(steps) > 0 {
			before := j.pending() + emitted
			n, took := fuzzStep(j, steps, &now)
			steps = steps[n:]
			halves += took
			// A half adds one to what waits or is out, unless it joined.
			joins += before + took - (j.pending() + emitted)
			if j.pending() > limit {
				t.Fatalf("%d pending, limit %d", j.pending(), limit)
			}
		}
		j.flush()
		if j.pending() != 0 || len(j.byKey) != 0 {
			t.Errorf("%d pending, %d keys after flush", j.pending(), len(j.byKey))
		}
		if emitted != halves-joins || 2*joins > halves || joins < 0 {
			t.Errorf("%d halves, %d joins, %d records", halves, joins, emitted)
		}
	})
}

// fuzzStep takes one step, and returns how many bytes it took and how many
// halves it gave the joiner.
func fuzzStep(j *joiner, steps []byte, now *time.Time) (n, halves int) {
	size := len(raw(bpf.ConnEvent{}))
	switch op, rest := steps[0], steps[1:]; {
	case op == 0:
		e, ok := bpf.ParseEvent(rest[:min(size, len(rest))])
		if !ok {
			return len(steps), 0
		}
		if !readable(&e) {
			return 1 + size, 0
		}
		r := kernelRecord(clock{offset: math.MinInt64 / 2}, e)
		if r.End == flow.ReasonNone {
			// Denied for no reason: for endOf to pass on, not to invent.
			return 1 + size, 0
		}
		j.add(fromKernel, r, *now)
		return 1 + size, 1
	case op == 1 && len(rest) >= 2:
		r := handled(uint64(rest[0]))
		r.Source = netip.AddrPortFrom(app.Addr(), app.Port()+uint16(rest[1]))
		j.add(fromHandler, &r, *now)
		return 3, 1
	default:
		*now = now.Add(time.Duration(op) * 100 * time.Millisecond)
		j.expire(*now, nil)
		return 1, 0
	}
}

// FuzzEvent feeds a collector with arbitrary bytes, as a kernel side of another
// build would. What it takes has only what the enums have, and what it does not
// take is counted.
func FuzzEvent(f *testing.F) {
	for _, ending := range []uint8{bpf.EndingClosed, bpf.EndingUnreachable, bpf.EndingAbandoned, bpf.EndingAbandoned + 1} {
		f.Add(raw(event(1, flow.PathDirect, ending)))
	}
	f.Add(raw(event(1, flow.PathPass, bpf.EndingTimeout)))
	f.Add(raw(event(1, flow.PathRelay, bpf.EndingUnreachable)))
	f.Add([]byte("short"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := &sink{}
		c := newCollector(Options{Sinks: []Sink{s}, Names: names}, &fakeRing{})
		c.event(b)
		records := s.taken()
		if n := uint64(len(records)); n+c.unreadable.Load() > 1 {
			t.Fatalf("%d records and %d unreadable of one event", n, c.unreadable.Load())
		}
		for _, r := range records {
			if int(r.Path) >= len(flow.Paths()) || int(r.End) >= len(flow.Reasons()) || r.Reason >= flow.KernelReasons {
				t.Errorf("what is no value: %+v", r)
			}
			if r.Duration < 0 || r.Connect < 0 || r.RTT < 0 || r.Endpoint.IsValid() && r.Path == flow.PathRelay {
				t.Errorf("nonsense: %+v", r)
			}
		}
	})
}
