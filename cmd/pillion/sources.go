package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"sync"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/redirect/upstream/discover"
	"github.com/pillion-project/pillion/redirect/upstream/discover/dns"
	"github.com/pillion-project/pillion/redirect/upstream/discover/file"
	"github.com/pillion-project/pillion/redirect/upstream/discover/kube"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// sources runs what finds the endpoints of services. Only the goroutine of
// control changes which there are.
type sources struct {
	i       *instance
	changed func()        // somebody has news
	asking  chan struct{} // bounds how many ask name servers at once

	demand *kube.Demand // nil: services are not looked up that nobody lists
	ctx    context.Context
	parts  sync.WaitGroup

	mu      sync.Mutex   // guards what follows, which status and diff read too
	kube    *kube.Client // nil: nobody needs it, or it cannot be had
	byName  map[string]*source
	dynamic []kube.Service
}

// source finds the endpoints of one service.
type source struct {
	kind, name string // as in admin.SourceStatus
	of         any    // what it was made of: to tell whether it is still wanted
	keeper     *discover.Keeper
	made       time.Time
	stop       context.CancelFunc // nil: not started yet
	// before is what its service had, once it has told a set that lacks some, and told
	// which of that it has told; control's own.
	before []discover.Endpoint
	told   map[netip.AddrPort]bool
}

// askAtOnce is how many names are looked up at once: each takes a socket or two.
const askAtOnce = 32

func newSources(i *instance, changed func()) *sources {
	return &sources{i: i, changed: changed, asking: make(chan struct{}, askAtOnce), byName: map[string]*source{}}
}

// open makes what the configuration needs of the API server.
func (s *sources) open(c *config.Config) error {
	needed := c.Kubernetes.OnDemand
	for _, v := range c.Services {
		needed = needed || v.Discover != nil && v.Discover.Kubernetes != nil
	}
	if client := s.client(); client != nil {
		client.SetZone(c.Zone)
		return nil
	}
	if !needed {
		return nil
	}
	client, err := s.reach(c)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.kube = client
	s.mu.Unlock()
	if k := &c.Kubernetes; k.OnDemand {
		s.demand = client.Demand(kube.DemandOptions{Idle: k.Idle, Used: s.i.used})
	}
	return nil
}

// reach makes a client of the API server.
func (s *sources) reach(c *config.Config) (*kube.Client, error) {
	k := &c.Kubernetes
	return kube.New(kube.Options{
		Kubeconfig: k.Kubeconfig, Server: k.Server, TokenFile: k.TokenFile, CAFile: k.CAFile,
		Zone: c.Zone, Exempt: s.i.exempt(),
	})
}

// client returns that of the API server, nil where nobody needed it yet.
func (s *sources) client() *kube.Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kube
}

// able says why there can be no such source while this process runs, or nil. A reload
// asks, so that it refuses that source alone. It may be called by any goroutine.
func (s *sources) able(d *config.Discover) error {
	if d.Kubernetes == nil || s.client() != nil {
		return nil
	}
	client, err := s.reach(s.i.control.inForce())
	if err != nil {
		return fmt.Errorf("%w (the section kubernetes is read at the start)", err)
	}
	client.Close()
	return nil
}

// start runs all sources, until stop.
func (s *sources) start(ctx context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ctx = ctx
	for _, one := range s.byName {
		s.launch(one)
	}
	if s.demand == nil {
		return
	}
	s.parts.Go(func() { s.seek(ctx) })
	s.parts.Go(func() { s.look(ctx) })
}

// stop waits for all that start began; its context must be done.
func (s *sources) stop() {
	s.parts.Wait()
	if s.kube != nil {
		s.kube.Close()
	}
}

func (s *sources) launch(one *source) {
	ctx, stop := context.WithCancel(s.ctx)
	one.stop = stop
	s.parts.Go(func() { _ = one.keeper.Run(ctx) })
}

// want is a source that is to run.
type want struct {
	kind, name string
	of         any
	open       func() (discover.Source, error)
}

// set makes wanted the whole set. What is made of the same goes on as it is. On an
// error nothing has changed.
func (s *sources) set(wanted map[string]want) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := make(map[string]*source, len(wanted))
	var errs []error
	for name, w := range wanted {
		if one := s.byName[name]; one != nil && reflect.DeepEqual(one.of, w.of) {
			next[name] = one
			continue
		}
		src, err := w.open()
		if err != nil {
			errs = append(errs, err)
			continue
		}
		keeper := discover.NewKeeper(src, s.teller(name, w))
		next[name] = &source{kind: w.kind, name: w.name, of: w.of, keeper: keeper, made: time.Now()}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for name, one := range s.byName {
		if next[name] != one && one.stop != nil {
			one.stop()
		}
	}
	for _, one := range next {
		if one.stop == nil && s.ctx != nil {
			s.launch(one)
		}
	}
	s.byName = next
	return nil
}

// teller returns what the keeper of a service's source calls: it has the change put in
// force, and logs when an error begins and when it ends.
func (s *sources) teller(service string, w want) func(discover.State) {
	silent := false // the keeper makes one call at a time
	return func(st discover.State) {
		switch {
		case st.Err != nil && !silent:
			s.i.log.Warn("a source cannot tell endpoints: those that were known stay", "service", service, "source", w.kind, "name", w.name, "known", len(st.Endpoints), "error", st.Err)
		case st.Err == nil && silent:
			s.i.log.Info("a source tells endpoints again", "service", service, "source", w.kind, "name", w.name, "endpoints", len(st.Endpoints))
		default:
		}
		silent = st.Err != nil
		s.changed()
	}
}

// of returns the source of a service, and what it knows; nil: it has none.
func (s *sources) of(service string) (*source, discover.State) {
	s.mu.Lock()
	one := s.byName[service]
	s.mu.Unlock()
	if one == nil {
		return nil, discover.State{}
	}
	return one, one.keeper.State()
}

// waiting returns a channel for each source that has not told anything yet, which
// is closed when it has.
func (s *sources) waiting() []<-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []<-chan struct{}
	for _, one := range s.byName {
		all = append(all, one.keeper.Ready())
	}
	return all
}

// told tells whether every source has told endpoints, or that there are none.
func (s *sources) told() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, one := range s.byName {
		if one.keeper.State().Generation == 0 {
			return false
		}
	}
	return true
}

// wantOf says which source a service needs.
func (s *sources) wantOf(v *config.Service) (want, bool) {
	switch d := v.Discover; {
	case d == nil:
		return want{}, false
	case d.File != "":
		return want{kind: admin.SourceFile, name: d.File, of: d.File, open: func() (discover.Source, error) {
			return file.New(d.File)
		}}, true
	case d.DNS != nil:
		o := dnsOptions(d.DNS, v.Addr.Addr())
		o.Exempt, o.Limit = s.i.exempt(), s.asking
		of := struct {
			config.DNS
			dns.Families // may be those of the service
		}{*d.DNS, o.Families}
		return want{kind: admin.SourceDNS, name: d.DNS.Name, of: of, open: func() (discover.Source, error) {
			return dns.New(o)
		}}, true
	default:
		k := d.Kubernetes
		ref := kube.Ref{Namespace: k.Namespace, Name: k.Name, Port: k.Port}
		name := k.Namespace + "/" + k.Name
		if k.Port != "" {
			name += ":" + k.Port
		}
		return want{kind: admin.SourceKubernetes, name: name, of: ref, open: func() (discover.Source, error) {
			return s.kube.Source(ref), nil
		}}, true
	}
}

func dnsOptions(d *config.DNS, service netip.Addr) dns.Options {
	o := dns.Options{
		Name: d.Name, Port: d.Port, MinTTL: d.MinTTL, MaxTTL: d.MaxTTL,
		Servers: d.Servers, ResolvConf: d.ResolvConf,
	}
	switch d.Type {
	case config.DNSSRV:
		o.SRV = true
	case config.DNSA:
		o.Families = dns.FamiliesIPv4
	case config.DNSAAAA:
		o.Families = dns.FamiliesIPv6
	case config.DNSAddress:
	default: // as the service's own address
		o.Families = dns.FamiliesIPv4
		if service.Is6() {
			o.Families = dns.FamiliesIPv6
		}
	}
	return o
}
