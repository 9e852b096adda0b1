package loader

import (
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

// Stats are the kernel side's counters, summed over the processors.
type Stats struct {
	// Reasons counts decisions; the index is a flow.Reason.
	Reasons []uint64
	// Connects are the active opens in scope, Decided those that a connect hook
	// let through, Denied those that it refused, Unsent those that the kernel
	// then refused itself, Escaped the opens that no hook decided on.
	Connects, Decided, Denied, Unsent, Escaped uint64
	// EventsLost counts reports that found the ring buffer full.
	EventsLost uint64
	// Stored counts decisions that are kept in socket storage, since somebody else
	// has the socket's cell.
	Stored uint64
	// Slots counts slots by state, SlotsMax is how many there are.
	Free, Named, Reserved, Retiring, SlotsMax int
	// Live is how many redirected connections are open.
	Live int
	// Mended counts counts of an endpoint's open connections that were wrong.
	Mended uint64
	// BeatAge is how old the handler's sign of life is; negative if there is
	// none.
	BeatAge time.Duration
	// BeatHolds tells whether it is not too old, by what it says itself.
	BeatHolds bool
	Busy      bool
}

// Unaccounted is what is left of the conservation law, and 0 unless a
// connection went unseen: every open was decided on and sent, or escaped. While
// a connect is under way it may be off by that one.
func (s *Stats) Unaccounted() int64 {
	return int64(s.Connects) - (int64(s.Decided) - int64(s.Unsent)) - int64(s.Escaped)
}

// Stats reads the counters.
func (d *Datapath) Stats() (Stats, error) {
	s := Stats{Reasons: make([]uint64, flow.KernelReasons), SlotsMax: bpf.SlotLast, Mended: d.counts.mended.Load()}
	for i := range s.Reasons {
		n, err := sum(d.maps.Reasons, uint32(i))
		if err != nil {
			return s, err
		}
		s.Reasons[i] = n
	}
	for key, to := range map[uint32]*uint64{
		bpf.TallyConnects:   &s.Connects,
		bpf.TallyDecided:    &s.Decided,
		bpf.TallyDenied:     &s.Denied,
		bpf.TallyUnsent:     &s.Unsent,
		bpf.TallyEscaped:    &s.Escaped,
		bpf.TallyEventsLost: &s.EventsLost,
		bpf.TallyStored:     &s.Stored,
	} {
		n, err := sum(d.maps.Tallies, key)
		if err != nil {
			return s, err
		}
		*to = n
	}
	s.Live = int(d.state.live().Load())
	if err := d.countSlots(&s); err != nil {
		return s, err
	}
	var b bpf.Beat
	if err := d.maps.Beat.Lookup(uint32(0), &b); err != nil {
		return s, fmt.Errorf("read heartbeat: %w", err)
	}
	s.Busy, s.BeatAge = b.Busy != 0, -1
	if b.Stamp != 0 {
		s.BeatAge = time.Duration(d.monotonic() - int64(b.Stamp))
		s.BeatHolds = s.BeatAge <= time.Duration(b.MaxAge)
	}
	return s, nil
}

// Count is the one of Reasons in [Stats].
func (d *Datapath) Count(why flow.Reason) (uint64, error) { return sum(d.maps.Reasons, uint32(why)) }

func sum(m *ebpf.Map, key uint32) (uint64, error) {
	var perCPU []uint64
	if err := m.Lookup(key, &perCPU); err != nil {
		return 0, fmt.Errorf("read map %s: %w", m, err)
	}
	var n uint64
	for _, v := range perCPU {
		n += v
	}
	return n, nil
}

func (d *Datapath) countSlots(s *Stats) error {
	err := d.eachSlot(func(_ uint32, slot *bpf.Slot) error {
		switch slot.State {
		case bpf.SlotNamed:
			s.Named++
		case bpf.SlotReserved:
			s.Reserved++
		case bpf.SlotRetiring:
			s.Retiring++
		}
		return nil
	})
	s.Free = s.SlotsMax - s.Named - s.Reserved - s.Retiring
	return err
}
