package main

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"
)

// publicMost is how many connections there are at once to what serves metrics, and to
// what serves probes. They come from anywhere, and their descriptors and memory are those
// of the connections that are relayed.
const publicMost = 16

// serveHTTP serves until ctx is done, and ends requests then. No handler runs any more
// when it returns.
func serveHTTP(ctx context.Context, ln net.Listener, h http.Handler) error {
	var busy sync.WaitGroup
	defer busy.Wait() // with what they read, which is closed next
	s := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				busy.Add(1)
			case http.StateClosed:
				busy.Done()
			default:
			}
		},
	}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	if err := s.Serve(&bounded{Listener: ln, most: publicMost}); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", ln.Addr(), errors.Join(err, s.Close()))
	}
	return nil
}

// bounded is a listener that has so many connections at most: who comes then takes the place
// of who has been there for longest. So nobody who only stays keeps a probe out.
type bounded struct {
	net.Listener
	most int

	mu    sync.Mutex // guards there
	there list.List  // of *guest, who came first in front
}

// guest is a connection of a bounded listener.
type guest struct {
	net.Conn
	among *bounded
	place *list.Element
}

// Accept implements [net.Listener].
func (c *bounded) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	g := &guest{Conn: conn, among: c}
	if first := c.enter(g); first != nil {
		first.Close()
	}
	return g, nil
}

// enter returns who has to go for it; nil: nobody.
func (c *bounded) enter(g *guest) (first *guest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.there.Len() >= c.most {
		first = c.there.Front().Value.(*guest)
		c.there.Remove(first.place)
	}
	g.place = c.there.PushBack(g)
	return first
}

// Close implements [net.Conn].
func (g *guest) Close() error {
	g.among.mu.Lock()
	g.among.there.Remove(g.place) // nothing, if it was taken out
	g.among.mu.Unlock()
	return g.Conn.Close()
}
