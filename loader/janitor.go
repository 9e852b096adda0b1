package loader

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
)

const (
	// tidyEvery is how often slots and open connections are looked through.
	tidyEvery = 15 * time.Second
	// liveMinAge protects an entry whose socket is only just being made.
	liveMinAge = 10 * time.Second
)

// Tidy retires slots that nobody uses and forgets connections that are no more,
// until ctx is done.
func (d *Datapath) Tidy(ctx context.Context) error {
	tick := time.NewTicker(min(tidyEvery, max(d.options.SlotGrace/4, time.Millisecond)))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := d.tidy(); err != nil {
			d.options.Log.Error("cannot tidy up", "error", err)
		}
	}
}

func (d *Datapath) tidy() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.left.Load() || d.moving.Load() != nil {
		return nil // what it looks at may be in two places
	}
	if err := d.reconcile(); err != nil {
		return err
	}
	used, err := d.liveAddrs()
	if err != nil {
		return err
	}
	if err := d.retireSlots(used); err != nil {
		return err
	}
	errs := []error{d.forgetGroups(), d.sets.forget()}
	if d.counts.due(time.Now()) {
		errs = append(errs, d.recount(), d.leaveCells())
	}
	return errors.Join(errs...)
}

// longAgo tells whether one moment of the hooks' clock is more than age before another.
// That clock begins with the machine, which may be younger.
func longAgo(then, now uint64, age time.Duration) bool { return int64(now-then) > int64(age) }

// reconcile deletes entries of live whose sockets are gone. sockops does it at
// once; but its flags on a socket are one set for all programs, and another
// agent's may have cleared ours. Missing twice in a row is gone: a dump of the
// sockets is no snapshot.
func (d *Datapath) reconcile() error {
	now := uint64(d.monotonic())
	suspects := map[bpf.LiveKey]bpf.Live{}
	var k bpf.LiveKey
	var l bpf.Live
	for it := d.maps.Live.Iterate(); it.Next(&k, &l); {
		if longAgo(l.Opened, now, liveMinAge) {
			suspects[k] = l
		}
	}
	if len(suspects) > 0 {
		err := d.network.sockets(func(s *socket) {
			delete(suspects, liveKey(s.local, s.remote))
		})
		if err != nil {
			return err
		}
	}
	missing := map[bpf.LiveKey]bool{}
	for k, l := range suspects {
		if !d.missing[k] {
			missing[k] = true
			continue
		}
		// To list the sockets takes long: another connection may have the address.
		if now, ok := lookupLive(d.liveFD, k); !ok || now.Cookie != l.Cookie || now.Opened != l.Opened {
			continue
		}
		if err := d.maps.Live.Delete(k); err != nil {
			continue // sockops was faster, and has counted
		}
		if l.Canary == 0 {
			d.state.live().Add(^uint32(0))
			d.closeOne(l.Group)
		}
	}
	d.missing = missing
	return nil
}

// closeOne takes an open connection off a container's account.
func (d *Datapath) closeOne(group uint64) {
	var u bpf.Usage
	if d.maps.UsageByGroup.Lookup(group, &u) != nil || int64(u.Conns) <= 0 {
		return
	}
	u.Conns--
	// See release for why this is good enough.
	_ = d.maps.UsageByGroup.Update(group, u, ebpf.UpdateExist)
}

// liveAddrs are the original addresses of the open connections.
func (d *Datapath) liveAddrs() (map[bpf.IPAddr]bool, error) {
	used := map[bpf.IPAddr]bool{}
	var k bpf.LiveKey
	var l bpf.Live
	it := d.maps.Live.Iterate()
	for it.Next(&k, &l) {
		used[l.Orig] = true
	}
	// Interrupted by a change under way: what was seen is not all, and to
	// retire on the strength of it would be wrong.
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("list open connections: %w", err)
	}
	return used, nil
}

// retireSlots takes slots out of use that were idle for long, and frees those
// that have been out of use for long enough.
func (d *Datapath) retireSlots(used map[bpf.IPAddr]bool) error {
	now := d.monotonic()
	return d.eachSlot(func(n uint32, s *bpf.Slot) error {
		switch s.State {
		case bpf.SlotNamed:
			if now-int64(s.Used) < int64(d.options.SlotIdle) || used[s.Orig] {
				return nil
			}
			return d.retire(n, s)
		case bpf.SlotRetiring:
			since, known := d.retiring[n]
			if !known {
				// An earlier process retired it: its grace starts anew.
				d.retiring[n] = time.Now()
				return nil
			}
			if time.Since(since) < d.options.SlotGrace || used[s.Orig] {
				return nil
			}
			return d.free(n, s)
		default:
			return nil
		}
	})
}

// eachSlot calls f for every slot that was ever used.
func (d *Datapath) eachSlot(f func(n uint32, s *bpf.Slot) error) error {
	next := min(d.state.nextSlot().Load(), bpf.SlotLast+1)
	for n := uint32(bpf.SlotFirst); n < next; n++ {
		s, err := d.slot(n)
		if err != nil {
			return fmt.Errorf("read slot %d: %w", n, err)
		}
		if s.State == bpf.SlotFree {
			continue
		}
		if err := f(n, &s); err != nil {
			return err
		}
	}
	return nil
}

// retire makes a slot resolve but name nothing: the next connection to its
// address gets another.
func (d *Datapath) retire(n uint32, s *bpf.Slot) error {
	if err := d.maps.SlotByOrig.Delete(s.Orig); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("retire slot %d: %w", n, err)
	}
	s.State = bpf.SlotRetiring
	if err := d.putSlot(n, *s); err != nil {
		return fmt.Errorf("retire slot %d: %w", n, err)
	}
	d.retiring[n] = time.Now()
	return nil
}

func (d *Datapath) free(n uint32, s *bpf.Slot) error {
	if err := d.putSlot(n, bpf.Slot{}); err != nil {
		return fmt.Errorf("free slot %d: %w", n, err)
	}
	delete(d.retiring, n)
	d.release(s.Group)
	if n < bpf.SlotFirst+reservedSlots {
		return nil // for the next service
	}
	if err := d.maps.FreeSlots.Put(nil, n); err != nil {
		return fmt.Errorf("free slot %d: %w", n, err)
	}
	return nil
}

// forgetGroups deletes the accounts of containers that have nothing open.
func (d *Datapath) forgetGroups() error {
	var id uint64
	var u bpf.Usage
	var idle []uint64
	for it := d.maps.UsageByGroup.Iterate(); it.Next(&id, &u); {
		// Hooks that know two layouts count below zero.
		if int64(u.Slots) <= 0 && int64(u.Conns) <= 0 && u.EventsLost == 0 {
			idle = append(idle, id)
		}
	}
	for _, id := range idle {
		if err := d.maps.UsageByGroup.Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget container %d: %w", id, err)
		}
	}
	return nil
}
