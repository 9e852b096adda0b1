package loader

import (
	"context"
	"errors"
	"fmt"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

// The workers' rings where hooks of another layout write to some of their own.

// formerHeld are the maps held of other layouts that hooks still use.
func (d *Datapath) formerHeld() []formerMap {
	all := d.former.left["held"]
	if m := d.moving.Load(); m.has("held") {
		all = append([]formerMap{{m: m.bulk["held"], layout: m.from.Maps["held"]}}, all...)
	}
	return all
}

// makeFormer gives a worker, beside its own ring, one in each former map.
func (d *Datapath) makeFormer(worker int, q *Queue) error {
	for _, v := range d.formerHeld() {
		if uint32(worker) >= v.layout.MaxEntries {
			continue // no hook names it
		}
		spec, err := d.heldSpec()
		if err != nil {
			return err
		}
		ring, err := ebpf.NewMap(spec)
		if err != nil {
			return err
		}
		if err := d.readAlso(q, ring, &v.layout); err != nil {
			return err
		}
		if err := v.m.Put(uint32(worker), uint32(ring.FD())); err != nil {
			return err
		}
	}
	return nil
}

// readAlso has a queue read a ring of another layout, which it takes over.
func (d *Datapath) readAlso(q *Queue, ring *ebpf.Map, layout *mapLayout) error {
	is := d.layouts.Maps["held"]
	f, err := newFormerRing(ring, layout, &is, contentRings["held"])
	if err != nil {
		return err
	}
	q.former = append(q.former, f)
	if q.both < 0 {
		// One descriptor for all: a worker watches one.
		if q.both, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
			return fmt.Errorf("watch rings: %w", err)
		}
		if err := watch(q.both, q.ring.FD()); err != nil {
			return err
		}
	}
	return watch(q.both, ring.FD())
}

func watch(all, fd int) error {
	e := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}
	if err := unix.EpollCtl(all, unix.EPOLL_CTL_ADD, fd, &e); err != nil {
		return fmt.Errorf("watch ring: %w", err)
	}
	return nil
}

// joinQueue makes the queue of a worker whose ring another process has read so far.
func (d *Datapath) joinQueue(worker int, ring *ebpf.Map) (*Queue, error) {
	m := d.moving.Load()
	if !m.has("held") {
		return d.queueOf(ring)
	}
	// Nobody uses our map yet.
	q, err := d.newQueue()
	if err != nil {
		return nil, errors.Join(err, ring.Close())
	}
	was := m.from.Maps["held"]
	err = d.readAlso(q, ring, &was)
	if err == nil {
		err = d.maps.Held.Put(uint32(worker), uint32(q.ring.FD()))
	}
	if err != nil {
		return nil, errors.Join(err, q.close())
	}
	return q, nil
}

// nextFormer is Next for the rings of other layouts. They come first: a worker hears of
// an answer before it hears that it is for nobody.
func (q *Queue) nextFormer(h *flow.Held) bool {
	for _, f := range q.former {
		for {
			raw, ok := f.next(unsafe.Sizeof(bpf.Held{}))
			if !ok {
				break
			}
			good := readHeld(raw, h)
			f.read.advance()
			if good {
				return true
			}
		}
	}
	return false
}

// settleQueues waits until the workers have read the last of what hooks of the layout
// before have told. None of them is at work any more.
func (d *Datapath) settleQueues(ctx context.Context) error {
	for _, q := range d.queues {
		for _, f := range q.former {
			for f.read.count() > 0 {
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(time.Millisecond):
				}
			}
		}
	}
	return nil
}
