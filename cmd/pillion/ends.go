package main

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/pillion-project/pillion/loader"
)

// gone names an endpoint that was removed from a service.
type gone struct {
	service string
	addr    netip.AddrPort // of the service
	// endpoint is what was removed.
	endpoint netip.AddrPort
}

// ends ends connections to endpoints that are gone, one endpoint after the other, so
// that no change waits for the workers that carry them. An order may be taken back
// until it is done: see drop.
type ends struct {
	// end ends the connections of a service to an endpoint. When ctx is done it ends
	// none that began later, and returns soon.
	end  func(ctx context.Context, g gone)
	news chan struct{}
	// changed: what is ordered, or will be, is not what was last noted.
	changed atomic.Bool

	mu     sync.Mutex // guards the rest
	queue  []gone
	now    *underway // nil: nothing is
	paused bool
	idle   chan struct{} // closed when all is done; nil: nobody waits for that
}

// underway is an end that has begun.
type underway struct {
	gone
	cancel context.CancelFunc
	over   chan struct{}
}

func newEnds(end func(ctx context.Context, g gone)) *ends {
	return &ends{end: end, news: make(chan struct{}, 1)}
}

// run does what is ordered until ctx is done. What is ordered still then is not done.
func (e *ends) run(ctx context.Context) {
	for {
		for ctx.Err() == nil && e.next(ctx) {
		}
		select {
		case <-e.news:
		case <-ctx.Done():
			return
		}
	}
}

// next does what was ordered first, if there is anything.
func (e *ends) next(ctx context.Context) bool {
	e.mu.Lock()
	if e.paused || len(e.queue) == 0 {
		e.mu.Unlock()
		return false
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	u := &underway{gone: e.queue[0], cancel: cancel, over: make(chan struct{})}
	e.queue, e.now = e.queue[1:], u
	e.mu.Unlock()
	e.end(ctx, u.gone)
	e.mu.Lock()
	e.now = nil
	e.tell()
	e.mu.Unlock()
	e.changed.Store(true)
	close(u.over)
	return true
}

// all is what is ordered, and what is under way, the first first.
func (e *ends) all() []gone {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all []gone
	if e.now != nil {
		all = append(all, e.now.gone)
	}
	return append(all, e.queue...)
}

// tell has those go on who wait until all is done, if it is. mu is held.
func (e *ends) tell() {
	if e.idle != nil && len(e.queue) == 0 && e.now == nil {
		close(e.idle)
		e.idle = nil
	}
}

// done waits until all that is ordered is done, or ctx is.
func (e *ends) done(ctx context.Context) {
	e.mu.Lock()
	if e.idle == nil {
		e.idle = make(chan struct{})
	}
	idle := e.idle
	e.tell()
	e.mu.Unlock()
	select {
	case <-idle:
	case <-ctx.Done():
	}
}

// put orders one. It waits for nothing.
func (e *ends) put(g gone) {
	e.mu.Lock()
	e.queue = append(e.queue, g)
	e.mu.Unlock()
	e.wake()
}

func (e *ends) wake() {
	select {
	case e.news <- struct{}{}:
	default:
	}
}

// drop takes orders back, and returns them. Of one that is under way it waits for what
// cannot be stopped: no connection that begins from then on is ended.
func (e *ends) drop(which func(gone) bool) (dropped []gone) {
	e.mu.Lock()
	e.queue = slices.DeleteFunc(e.queue, func(g gone) bool {
		is := which(g)
		if is {
			dropped = append(dropped, g)
		}
		return is
	})
	u := e.now
	e.tell()
	e.mu.Unlock()
	if u != nil && which(u.gone) {
		u.stop()
		dropped = append(dropped, u.gone)
	}
	return dropped
}

func (u *underway) stop() {
	u.cancel()
	<-u.over
}

// pause begins no other one until resume, and takes back what is under way, which is
// the first again: to end a connection a second time ends none.
func (e *ends) pause() {
	e.mu.Lock()
	e.paused = true
	u := e.now
	e.mu.Unlock()
	if u != nil {
		u.stop()
		e.mu.Lock()
		e.queue = slices.Insert(e.queue, 0, u.gone)
		e.mu.Unlock()
	}
}

func (e *ends) resume() {
	e.mu.Lock()
	e.paused = false
	e.mu.Unlock()
	e.wake()
}

// endConnections ends the connections to an endpoint that is gone. Once ctx is done it
// begins nothing more; to look for those on direct is short.
func (i *instance) endConnections(ctx context.Context, g gone) {
	n, direct := i.handler.End(ctx, g.service, g.endpoint), 0
	var err error
	if ctx.Err() == nil {
		direct, err = i.datapath.End(g.addr, g.endpoint)
	}
	switch {
	case err == nil, errors.Is(err, loader.ErrNoService), errors.Is(err, loader.ErrNoSuchEndpoint): // so nobody is connected
	default:
		i.log.Error("cannot end the connections to an endpoint that is gone", "service", g.service, "endpoint", g.endpoint, "error", err)
	}
	i.sets.ended.Add(uint64(n + direct))
	if n+direct > 0 {
		i.log.Info("ended connections to an endpoint that is gone", "service", g.service, "endpoint", g.endpoint, "connections", n+direct)
	}
}
