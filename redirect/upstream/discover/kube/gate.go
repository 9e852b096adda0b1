package kube

import (
	"context"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"
)

// startsMax bounds how many requests wait for their answer to begin. Each of
// them may open a connection: when the server takes no more requests on one, or
// went away, all watches would at once.
const startsMax = 4

// trialMax bounds the pause between two trials: they cost a server that is away
// one connection, and every endpoint is stale until one of them finds it.
const trialMax = 10 * time.Second

// gate lets requests pass while the server answers. When it does not, one of
// them tries, less and less often, and the others wait for how that ends, and
// share it.
type gate struct {
	starts chan struct{}

	mu    sync.Mutex // orders the rest
	up    bool
	came  chan struct{} // closed when the server answers again
	trial chan struct{} // closed when the trial ends; nil if there is none
	err   error         // how the last trial ended; nil also if it was given up
	next  time.Time     // before that there is no trial after err
	// pause is from one trial to the next, doubled from first to longest.
	pause, first, longest time.Duration
}

func newGate(first, longest time.Duration) *gate {
	return &gate{starts: make(chan struct{}, startsMax), came: make(chan struct{}), first: first, longest: longest}
}

// do is what [http.Client.Do] is.
func (g *gate) do(client *http.Client, req *http.Request) (*http.Response, error) {
	ctx := req.Context()
	trial, err := g.enter(ctx)
	if err != nil {
		return nil, err
	}
	select {
	case g.starts <- struct{}{}:
	case <-ctx.Done():
		g.leave(trial, ctx.Err(), true)
		return nil, ctx.Err()
	}
	resp, err := client.Do(req)
	<-g.starts
	g.leave(trial, err, ctx.Err() != nil)
	return resp, err
}

// enter waits until a request may be sent. It returns whether that one is the
// trial, or how the last trial ended.
func (g *gate) enter(ctx context.Context) (trial bool, err error) {
	g.mu.Lock()
	if !g.up && g.trial == nil && g.err != nil && time.Now().Before(g.next) {
		defer g.mu.Unlock()
		return false, g.err
	}
	g.mu.Unlock()
	for {
		g.mu.Lock()
		switch {
		case g.up:
			g.mu.Unlock()
			return false, nil
		case g.trial == nil:
			g.trial = make(chan struct{})
			g.mu.Unlock()
			return true, nil
		}
		ended := g.trial
		g.mu.Unlock()
		select {
		case <-ended:
		case <-ctx.Done():
			return false, ctx.Err()
		}
		g.mu.Lock()
		up, err := g.up, g.err
		g.mu.Unlock()
		if !up && err != nil {
			return false, err
		}
	}
}

// leave tells how a request ended. What was given up tells nothing.
func (g *gate) leave(trial bool, err error, givenUp bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case err == nil:
		if !g.up {
			close(g.came)
		}
		g.up, g.pause = true, 0
	case givenUp:
		err = nil
	default:
		g.fall()
		if now := time.Now(); now.After(g.next) { // once, if several failed together
			g.pause = min(max(2*g.pause, g.first), g.longest, trialMax)
			g.next = now.Add(g.pause/2 + rand.N(g.pause))
		}
	}
	if trial || err != nil {
		g.err = err
	}
	if trial {
		close(g.trial)
		g.trial = nil
	}
}

// broke says that an answer broke off: the server may be gone.
func (g *gate) broke() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.fall()
	g.err = nil
}

// fall notes that the server does not answer.
func (g *gate) fall() {
	if g.up {
		g.up, g.came = false, make(chan struct{})
	}
}

// wait waits for d, but while the server does not answer until there may be a
// trial, or was one that it answered.
func (g *gate) wait(ctx context.Context, d time.Duration) {
	g.mu.Lock()
	up, came := g.up, g.came
	if !up {
		d = rand.N(g.first)
		if g.err != nil {
			d += time.Until(g.next)
		}
	}
	g.mu.Unlock()
	if !sleep(ctx, d, came, up) {
		// All that wait are told at once, and need not come at once.
		sleep(ctx, rand.N(g.first), nil, true)
	}
}

// sleep returns false if it ended early because of came, to which it pays no
// attention if the server is up.
func sleep(ctx context.Context, d time.Duration, came <-chan struct{}, up bool) bool {
	if up {
		came = nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	case <-came:
		return false
	}
	return true
}
