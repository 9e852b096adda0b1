package kube

import (
	"context"
	"net/http"
	"sync"
)

// startsMax bounds how many requests wait for their answer to begin. Each of
// them may open a connection: when the server takes no more requests on one, or
// went away, all watches would at once.
const startsMax = 4

// gate lets requests pass while the server answers. When it does not, one of
// them tries, and the others wait for how that ends, and share it.
type gate struct {
	starts chan struct{}

	mu    sync.Mutex // orders the rest
	up    bool
	trial chan struct{} // closed when the trial ends; nil if there is none
	err   error         // how the last trial ended; nil also if it was given up
}

func newGate() *gate { return &gate{starts: make(chan struct{}, startsMax)} }

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
// trial, or how the trial that was waited for ended.
func (g *gate) enter(ctx context.Context) (trial bool, err error) {
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
		g.up = true
	case givenUp:
		err = nil
	default:
		g.up = false
	}
	if trial {
		g.err = err
		close(g.trial)
		g.trial = nil
	}
}

// broke says that an answer broke off: the server may be gone.
func (g *gate) broke() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.up = false
}
