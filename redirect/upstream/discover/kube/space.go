package kube

import (
	"context"
	"sync"
)

// space follows the Services of one namespace, in one watch for all that are in
// use there: they change seldom, a few words of each are kept, and a watch for
// each would take more than its endpoints do.
type space struct {
	client *Client
	name   string
	refs   int // ordered by client.mu
	cancel context.CancelFunc
	done   chan struct{} // closed when run has ended

	mu       sync.Mutex // orders the rest; taken before a watcher's
	services map[string]*service
	feed     feedState
	watchers map[string]*watcher
}

// enter adds w to those that are told of its service, and starts the watch if it
// is the first in its namespace. It returns what ends that, and waits for it.
func (c *Client) enter(w *watcher) (leave func()) {
	c.mu.Lock()
	s := c.spaces[w.key.namespace]
	if s == nil {
		ctx, cancel := context.WithCancel(context.Background())
		s = &space{client: c, name: w.key.namespace, cancel: cancel, done: make(chan struct{}), watchers: make(map[string]*watcher)}
		c.spaces[s.name] = s
		go s.run(ctx)
	}
	s.refs++
	c.mu.Unlock()
	s.add(w)
	return func() { c.leave(s, w) }
}

func (c *Client) leave(s *space, w *watcher) {
	s.mu.Lock()
	// Its successor may be there already.
	if s.watchers[w.key.name] == w {
		delete(s.watchers, w.key.name)
	}
	s.mu.Unlock()
	c.mu.Lock()
	s.refs--
	last := s.refs == 0
	if last {
		delete(c.spaces, s.name)
	}
	c.mu.Unlock()
	if last {
		s.cancel()
		<-s.done
	}
}

func (s *space) add(w *watcher) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watchers[w.key.name] = w
	if s.feed.listed {
		w.replaceService(s.services[w.key.name])
	}
	w.told(&w.serviceFeed, s.feed.err)
}

// run follows the namespace until ctx is done.
func (s *space) run(ctx context.Context) {
	defer close(s.done)
	f := &feed[*service]{
		client:  s.client,
		path:    "/api/v1/namespaces/" + s.name + "/services",
		decode:  decodeService,
		replace: s.replace,
		change:  s.set,
		remove:  func(name string) { s.set(name, nil) },
		fresh:   func() { s.told(nil) },
		failed:  s.told,
	}
	f.run(ctx)
}

func (s *space) replace(all map[string]*service) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.services, s.feed = all, feedState{listed: true}
	for name, w := range s.watchers {
		w.replaceService(all[name])
	}
}

// set takes nil for a service that was deleted.
func (s *space) set(name string, now *service) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now == nil {
		delete(s.services, name)
	} else {
		s.services[name] = now
	}
	if w := s.watchers[name]; w != nil {
		w.setService(now)
	}
}

// told passes on whether what is known is up to date.
func (s *space) told(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.feed.err = err
	for _, w := range s.watchers {
		w.told(&w.serviceFeed, err)
	}
}
