package kube

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
)

// Client reads from one API server. It is safe for concurrent use.
type Client struct {
	node, namespace, domain string
	zone                    atomic.Pointer[string] // see SetZone

	http  *http.Client
	base  string // the server's URL, without a slash at the end
	auth  auth
	gate  *gate
	creds *credentials
	// primary is the family of the API server's own ClusterIP, and so the first
	// one of dual-stack services; FamilyAny if that is not known.
	primary Family

	// lists bounds how many lists are read at once, and with them the memory.
	lists chan struct{}
	// settle is how far the watch of a namespace may be behind a look-up.
	settle time.Duration
	// eventMax bounds the memory that one event takes, in bytes.
	eventMax int64

	mu       sync.Mutex // orders the rest, and refs; taken before no other
	watchers map[key]*watcher
	spaces   map[string]*space // by namespace
}

// key names a service.
type key struct{ namespace, name string }

func (k key) String() string { return k.namespace + "/" + k.name }

const (
	listsMax    = 2
	retryMin    = 500 * time.Millisecond // the first pause after a failure
	retryMax    = 30 * time.Second       // and the longest
	settleTime  = 5 * time.Second
	listTimeout = time.Minute
	eventMax    = 16 << 20 // what etcd stores is smaller
)

// New returns a client, and an error for what can never work. It opens no
// connection; the files need not be there yet.
func New(o Options) (*Client, error) {
	o, creds, err := resolve(o)
	if err != nil {
		return nil, err
	}
	c := &Client{
		node: o.Node, namespace: o.Namespace,
		domain:   "." + strings.Trim(o.ClusterDomain, "."),
		base:     strings.TrimRight(o.Server, "/"),
		http:     newHTTP(creds, o),
		auth:     auth{token: creds.token, file: o.TokenFile},
		creds:    creds,
		gate:     newGate(retryMin, retryMax),
		lists:    make(chan struct{}, listsMax),
		eventMax: eventMax,
		settle:   settleTime,
		watchers: make(map[key]*watcher),
		spaces:   make(map[string]*space),
	}
	c.zone.Store(&o.Zone)
	if own, err := netip.ParseAddr(o.ownHost); err == nil {
		c.primary = familyOf(own.Unmap())
	}
	return c, nil
}

// SetZone says which zone's hints hold from now on; sources tell what that changes.
func (c *Client) SetZone(zone string) {
	if *c.zone.Swap(&zone) == zone {
		return
	}
	c.mu.Lock()
	all := slices.Collect(maps.Values(c.watchers))
	c.mu.Unlock()
	for _, w := range all {
		w.mu.Lock()
		w.wake(false)
		w.mu.Unlock()
	}
}

// Close closes the connections. All that runs on the client must have ended.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Source returns a source of the endpoints of ref. Sources of one service share
// its watches.
func (c *Client) Source(ref Ref) discover.Source {
	if ref.Namespace == "" {
		ref.Namespace = c.namespace
	}
	return &source{client: c, ref: ref}
}

// check refuses what no API server would take, before it becomes part of a URL.
func (r Ref) check() error {
	var errs []error
	if !isLabel(r.Namespace) {
		errs = append(errs, fmt.Errorf("namespace %q: not a name", r.Namespace))
	}
	if !isLabel(r.Name) {
		errs = append(errs, fmt.Errorf("service %q: not a name", r.Name))
	}
	if n, err := strconv.Atoi(r.Port); err == nil && (n < 1 || n > 65535) {
		errs = append(errs, fmt.Errorf("port %s: not between 1 and 65535", r.Port))
	}
	return errors.Join(errs...)
}

// isLabel tells whether s is a DNS label, as all names here are.
func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	return strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// acquire returns the watcher of a service, which runs until release is called
// as often as acquire. The release that ends it waits until it has ended.
func (c *Client) acquire(k key) *watcher {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.watchers[k]
	if w == nil {
		// The context is the watcher's own: whoever came first may leave first.
		ctx, cancel := context.WithCancel(context.Background())
		w = newWatcher(c, k, cancel)
		c.watchers[k] = w
		go w.run(ctx)
	}
	w.refs++
	return w
}

func (c *Client) release(w *watcher) {
	c.mu.Lock()
	w.refs--
	last := w.refs == 0
	if last {
		delete(c.watchers, w.key)
	}
	c.mu.Unlock()
	if last {
		w.cancel()
		<-w.done
	}
}
