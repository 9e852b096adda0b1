package kube

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// watcher keeps one service up to date: its Service and its EndpointSlices.
type watcher struct {
	client *Client
	key    key
	refs   int // ordered by client.mu
	cancel context.CancelFunc
	done   chan struct{} // closed when run has ended
	began  time.Time

	mu sync.Mutex // orders the rest
	// service is the last one that was seen, also after it was deleted.
	service *service
	slices  map[string]*slice
	// What each feed says of itself.
	serviceFeed, sliceFeed feedState
	failures               uint64 // how often a feed failed
	deleted                bool
	// subscribers are woken by a change; those that map to true care for the
	// Service alone.
	subscribers map[chan<- struct{}]bool
}

// feedState is what is known about what a feed knows.
type feedState struct {
	listed bool  // there was a complete list
	err    error // why it is not up to date, or nil
}

func newWatcher(c *Client, k key, cancel context.CancelFunc) *watcher {
	return &watcher{
		client: c, key: k, cancel: cancel,
		done:        make(chan struct{}),
		began:       time.Now(),
		subscribers: make(map[chan<- struct{}]bool),
	}
}

// run follows the EndpointSlices until ctx is done, and has the Service followed.
func (w *watcher) run(ctx context.Context) {
	defer close(w.done)
	defer w.client.enter(w)()
	slices := &feed[*slice]{
		client:   w.client,
		path:     "/apis/discovery.k8s.io/v1/namespaces/" + w.key.namespace + "/endpointslices",
		selector: "kubernetes.io/service-name=" + w.key.name,
		decode: func(read func(any) error) (object[*slice], error) {
			return decodeSlice(read, w.client.node)
		},
		replace: w.replaceSlices,
		change:  func(name string, s *slice) { w.setSlice(name, s) },
		remove:  func(name string) { w.setSlice(name, nil) },
		fresh:   func() { w.told(&w.sliceFeed, nil) },
		failed:  func(err error) { w.told(&w.sliceFeed, err) },
	}
	slices.run(ctx)
}

// replaceService is setService for what a list says.
func (w *watcher) replaceService(s *service) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.serviceFeed = feedState{listed: true}
	w.putService(s)
}

// setService takes nil for a service that is not there.
func (w *watcher) setService(s *service) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.putService(s)
}

func (w *watcher) putService(s *service) {
	if s != nil {
		w.service = s
	}
	w.deleted = s == nil
	w.wake(true)
}

func (w *watcher) replaceSlices(all map[string]*slice) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sliceFeed = feedState{listed: true}
	w.slices = all
	w.wake(false)
}

func (w *watcher) setSlice(name string, s *slice) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s == nil {
		delete(w.slices, name)
	} else {
		w.slices[name] = s
	}
	w.wake(false)
}

// told notes that a feed is up to date, or why it is not.
func (w *watcher) told(f *feedState, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil && f.err == nil {
		return
	}
	f.err = err
	if err != nil {
		w.failures++
	}
	w.wake(false)
}

// wake wakes the subscribers; those that are awake already look again.
func (w *watcher) wake(service bool) {
	for c, serviceOnly := range w.subscribers {
		if serviceOnly && !service {
			continue
		}
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// subscribe has wakeups, which has room for one, filled whenever something
// changes, or the Service alone.
func (w *watcher) subscribe(wakeups chan<- struct{}, serviceOnly bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.subscribers[wakeups] = serviceOnly
}

func (w *watcher) unsubscribe(wakeups chan<- struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.subscribers, wakeups)
}

// current returns the Service as the server has it: nil if it is not there, and
// false if that is not known yet, nor for sure.
func (w *watcher) current() (*service, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case !w.serviceFeed.listed, w.service == nil && time.Since(w.began) < w.client.settle:
		return nil, false
	case w.deleted:
		return nil, true
	default:
		return w.service, true
	}
}

// view is what is known of a service at one moment.
type view struct {
	service  *service // nil if there never was one
	slices   []*slice
	err      error  // why it is not up to date, or nil
	failures uint64 // how many errors there were
}

// view returns what is known, and false if there was neither an answer nor a
// failure.
func (w *watcher) view() (view, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	v := view{service: w.service, failures: w.failures, err: errors.Join(w.serviceFeed.err, w.sliceFeed.err)}
	if !w.serviceFeed.listed || !w.sliceFeed.listed {
		return v, v.err != nil
	}
	if v.service == nil && len(w.slices) == 0 && v.err == nil {
		v.err = fmt.Errorf("service %s: not found", w.key)
	}
	for _, s := range w.slices {
		v.slices = append(v.slices, s)
	}
	return v, true
}
