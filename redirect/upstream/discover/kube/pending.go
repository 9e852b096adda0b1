package kube

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"time"
)

const (
	// pendingFor is for how long a connection may wait for what becomes of its
	// question: a look-up and two lists, each some ten milliseconds. Who waits for
	// longer is better off with the path that it would have had anyway.
	pendingFor = 500 * time.Millisecond
	// pendingAgain is how soon connections wait again for the same address: for a
	// service whose endpoints cannot be had, each would otherwise.
	pendingAgain = 10 * time.Second
)

// pending has the addresses that were asked for and not answered, by hash. Two that
// share a place only lose what it is for.
type pending [1024]struct {
	hash atomic.Uint64
	// since is when it was first asked for, in ns since [Demand].began.
	since atomic.Int64
}

// open notes that an address was asked for.
func (p *pending) open(hash uint64, now time.Duration) {
	place := &p[hash>>54]
	if place.hash.Load() == hash && now-time.Duration(place.since.Load()) < pendingAgain {
		return
	}
	place.since.Store(int64(now))
	place.hash.Store(hash)
}

// has tells whether an address waits for its answer.
func (p *pending) has(hash uint64, now time.Duration) bool {
	place := &p[hash>>54]
	return place.hash.Load() == hash && now-time.Duration(place.since.Load()) < pendingFor
}

// close notes that the answer is no.
func (p *pending) close(hash uint64, now time.Duration) {
	if place := &p[hash>>54]; place.hash.Load() == hash {
		place.since.Store(int64(now - pendingFor))
	}
}

// forget makes the next question one that is waited for.
func (p *pending) forget(hash uint64) { p[hash>>54].hash.CompareAndSwap(hash, 0) }

// Pending tells whether an address that [Demand.Asked] was told of may be in the
// list at once: it is being looked up, or is found and may have its endpoints any
// moment. It is false half a second later at the latest, where the API server did
// not answer last, and at once for addresses outside the ranges of services, as far
// as they are known. It never blocks.
func (d *Demand) Pending(dst netip.AddrPort) bool {
	dst, hash, ok := addressOf(dst)
	return ok && d.may(dst.Addr()) && d.pending.has(hash, time.Since(d.began)) && !d.client.gate.failing()
}

// may tells whether an address can be a service's.
func (d *Demand) may(a netip.Addr) bool {
	ranges := d.within.Load()
	return ranges == nil || slices.ContainsFunc(*ranges, func(p netip.Prefix) bool { return p.Contains(a) })
}

// answered notes that a port of a subject is none that is served.
func (d *Demand) answered(sub subject, ports ...uint16) {
	for _, p := range ports {
		if _, hash, ok := addressOf(netip.AddrPortFrom(sub.addr, p)); ok {
			d.pending.close(hash, time.Since(d.began))
		}
	}
}

// failing tells whether the server did not answer the last time.
func (g *gate) failing() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !g.up && g.err != nil
}
