package main

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/route"
	"github.com/pillion-project/pillion/redirect/upstream"
	"github.com/pillion-project/pillion/redirect/upstream/discover"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// service is one that is in force.
type service struct {
	config.Service // with all that it takes from the configuration
	path           flow.Path
	former         string // its name before the last change; empty: the same
	// found is true for one that nobody lists.
	found bool
	// known is false while its source has never told anything: its connections
	// go by on_failure, since nobody can say that it has no endpoints.
	known bool
	// kept is true while it has what an earlier process published, since its source
	// has not told yet. The zones of its endpoints are those that were noted then, and
	// its set is the kernel side's alone.
	kept      bool
	endpoints []discover.Endpoint
	cluster   *upstream.Cluster
	set       *flow.Set // of the family of its address; nil: it has none
}

// apply puts a configuration in force. On an error the last one stays.
func (c *control) apply(next *config.Config) error {
	if err := c.sources.open(next); err != nil {
		return err
	}
	wanted := map[string]want{}
	for i := range next.Services {
		s := &next.Services[i]
		if w, ok := c.sources.wantOf(s); ok {
			wanted[s.Name] = w
		}
	}
	if found := c.sources.found(); len(found) > 0 {
		said := saidBy(next)
		for _, f := range found {
			if !said.lists(f.Name, f.Addr) {
				wanted[f.Name] = wantOfFound(&f)
			}
		}
	}
	if err := c.sources.set(wanted); err != nil {
		return err
	}
	return c.publish(next)
}

// againAfter is how long it takes until it is tried again to put in force what
// could not be: what was removed may need its room for some seconds more.
const againAfter = 5 * time.Second

// update puts in force what sources and checks have found.
func (c *control) update() {
	c.newsMu.Lock()
	news := c.news
	c.news = nil
	c.newsMu.Unlock()
	for _, change := range news {
		c.setDown(change)
	}
	if len(news) > 0 {
		c.overflow()
	}
	err := c.apply(c.inForce())
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.again = time.Now().Add(againAfter)
	}
	if text := textOf(err); text != c.trouble {
		c.trouble = text
		if err != nil {
			c.i.log.Error("endpoints cannot be put in force, the last ones stay", "error", err)
		}
	}
}

func textOf(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// gather puts together what is known of every service.
func (c *control) gather(next *config.Config) []service {
	said := saidBy(next)
	all := make([]service, 0, len(next.Services))
	for i := range next.Services {
		all = append(all, c.serviceOf(said, &next.Services[i]))
	}
	return append(all, c.found(said)...)
}

func (c *control) serviceOf(said *said, v *config.Service) service {
	s := service{Service: said.config.Effective(v), known: true}
	s.path, _ = said.config.PathOf(v)
	was := c.before(said, &s)
	if was != nil && was.Name != s.Name {
		s.former = was.Name
	}
	if v.Discover != nil {
		// No source: it was found since these were set, and the next update has it.
		one, state := c.sources.of(v.Name)
		if one != nil && state.Generation > 0 {
			s.endpoints, s.known = c.filled(said, &s, was, one, &state), true
			return s
		}
		s.endpoints, s.known, s.kept = c.inherited(said, &s)
		// A source that is new has not told yet: what the service had holds.
		if !s.known && was != nil && was.known && (len(was.endpoints) > 0 || was.Discover != nil) {
			s.endpoints, s.known = was.endpoints, true
		}
		return s
	}
	for _, e := range v.Endpoints {
		s.endpoints = append(s.endpoints, discover.Endpoint{Addr: e.Addr, Weight: e.Weight, Zone: e.Zone})
	}
	return s
}

// filled returns the endpoints of a service whose source has told: with those that it
// had, while that has never told all. What it has told and tells no more is gone.
func (c *control) filled(said *said, s, was *service, one *source, state *discover.State) []discover.Endpoint {
	if state.Lacks == 0 {
		one.before, one.told = nil, nil
		return state.Endpoints
	}
	if last, known, _ := c.inherited(said, s); known {
		one.before = last
	} else if one.before == nil {
		// Once: later it has what this source told.
		one.before = []discover.Endpoint{}
		if was != nil {
			one.before = append(one.before, was.endpoints...)
		}
	}
	if one.told == nil {
		one.told = map[netip.AddrPort]bool{}
	}
	had := make(map[netip.AddrPort]bool, len(one.before))
	for _, e := range one.before {
		had[e.Addr] = true
	}
	for _, e := range state.Endpoints {
		if had[e.Addr] {
			one.told[e.Addr] = true
		}
	}
	return state.With(slices.DeleteFunc(slices.Clone(one.before), func(e discover.Endpoint) bool { return one.told[e.Addr] }))
}

// inherited returns what an earlier process said of a service, or what it published
// and the kernel side goes by still, which is kept.
func (c *control) inherited(said *said, s *service) (endpoints []discover.Endpoint, known, kept bool) {
	if last, ok := c.i.taking.told(&s.Service); ok {
		return last, true, false
	}
	if last, ok := c.kept(s.Addr); ok && !c.i.taking.moved(said, s) {
		return last, true, true
	}
	return nil, false, false
}

// before returns what a service was, also under another name; nil: it was not there.
func (c *control) before(said *said, s *service) *service {
	was := c.listing().same(s)
	if was == nil || was.Name == s.Name {
		return was
	}
	if _, goesOn := said.byName[was.Name]; goesOn || c.sources.finds(was.Name) {
		return nil // at another address
	}
	return was
}

// kept returns what an earlier process published for a service, if nobody has
// published anything since.
func (c *control) kept(service netip.AddrPort) ([]discover.Endpoint, bool) {
	if c.i.datapath == nil {
		return nil, false // it is the start
	}
	last, ok := c.i.datapath.Kept(service)
	all := make([]discover.Endpoint, 0, len(last))
	for _, e := range last {
		all = append(all, discover.Endpoint{Addr: e.Addr, Weight: uint32(e.Weight)})
	}
	c.zones.of(service, all)
	return all, ok
}

// publish makes clusters and sets of what is known, and hands them out: to the
// handler before the kernel side, so that what is redirected finds its service.
func (c *control) publish(next *config.Config) error {
	services := c.gather(next)
	refused := bound(services, c.list(), bpf.Endpoints)
	for i := range services {
		c.litter.add(len(services[i].endpoints), time.Now())
	}
	var lacking []admin.Refusal
	all := c.i.lacking || !c.inCharge
	old := c.i.snapshot.Load()
	snapshot, err := upstream.Build(old, specs(next, services), upstream.Options{Health: next.Health})
	if err != nil {
		return fmt.Errorf("build clusters: %w", err)
	}
	c.arrange(services, snapshot)
	table, err := tableOf(next, services)
	if err != nil {
		return fmt.Errorf("build services: %w", err)
	}
	if old == nil {
		// The start: there is no handler yet. It takes the table when it is made.
		c.i.table = table
	} else {
		there := sync.OnceValue(func() *present { return presentIn(services) }) // as a rule nobody asks
		spared := c.removals.spare(func(g gone) bool { return there().has(g) })
		if lacking, err = c.hand(next, services, table); err != nil {
			c.removals.restore(spared)
			return err
		}
	}
	c.i.snapshot.Store(snapshot)
	byAddr := make(map[netip.AddrPort]string, len(services))
	for i := range services {
		byAddr[services[i].Addr] = services[i].Name
	}
	c.i.byAddr.Store(&byAddr)
	last := c.listing()
	before := c.list()
	c.mu.Lock()
	c.services, c.tooMany, c.lacking = listingOf(services), refused, lacking
	if c.short = c.i.lacking; c.short {
		c.again = time.Now().Add(againAfter)
	}
	c.departed = departed(c.departed, upstream.Removed(old, snapshot), services)
	c.mu.Unlock()
	c.removed(before, services)
	if err := c.checker.Set(targets(services)); err != nil {
		return fmt.Errorf("check endpoints: %w", err)
	}
	c.renameNews(services)
	c.unchecked(services)
	if old != nil {
		c.tellDown(services, last, all)
		c.close(next, services)
	}
	return nil
}

// bound keeps the endpoints of all services within most, which is what the kernel
// side has room for. A service for whose new endpoints there is none keeps those
// that it had before; one that is new goes by on_failure.
func bound(services, before []service, most int) []admin.Refusal {
	room := most
	had, listed := make([]*service, len(services)), listingOf(before)
	for i := range services {
		s := &services[i]
		if s.path == flow.PathPass {
			continue
		}
		kept := 0
		if had[i] = listed.named(cmp.Or(s.former, s.Name)); had[i] != nil {
			kept = len(had[i].endpoints)
		}
		room -= min(len(s.endpoints), kept)
	}
	var refused []admin.Refusal
	for i := range services {
		s := &services[i]
		if s.path == flow.PathPass {
			continue
		}
		kept := 0
		if had[i] != nil {
			kept = len(had[i].endpoints)
		}
		more := len(s.endpoints) - kept
		if more <= 0 || more <= room {
			room -= max(more, 0)
			continue
		}
		refused = append(refused, admin.Refusal{Name: s.Name, Where: s.Where(""), Text: fmt.Sprintf(
			"%d are too many endpoints: of the %d of all services, %d are left for more than its %d, which stay",
			len(s.endpoints), most, max(room, 0), kept)})
		s.endpoints, s.known = nil, false
		if had[i] != nil {
			s.endpoints, s.known = had[i].endpoints, had[i].known
		}
	}
	return refused
}

// arrange gives each service its cluster, and its set: the one that it had, if the
// cluster and the address are the same. At another address it is a new set to the
// kernel side, which then takes from it what is down: that has to be of now.
func (c *control) arrange(services []service, snapshot *upstream.Snapshot) {
	type at struct {
		cluster *upstream.Cluster
		addr    netip.AddrPort
	}
	had := make(map[at]*flow.Set)
	for i := range services {
		services[i].cluster = snapshot.Cluster(services[i].Name)
	}
	if !c.inCharge && c.i.datapath != nil {
		c.takeDown(services) // sets that were made before do not know that
	} else {
		for _, s := range c.list() {
			had[at{s.cluster, s.Addr}] = s.set
		}
	}
	for i := range services {
		s := &services[i]
		if s.path == flow.PathPass || !s.known || s.kept {
			continue
		}
		if s.set = had[at{s.cluster, s.Addr}]; s.set == nil {
			set := s.cluster.Set(s.Addr.Addr().Is4())
			if s.path == flow.PathRelay && len(set.Endpoints) == 0 && len(s.cluster.Endpoints) > 0 {
				continue // only the handler can dial them: without it, on_failure decides
			}
			s.set = &set
		}
	}
}

// hand gives services to the handler and to the kernel side. It returns those for
// whose endpoints there is no room there.
func (c *control) hand(next *config.Config, services []service, table *route.Table) ([]admin.Refusal, error) {
	rules := c.i.rules(next, services)
	last := c.i.handler.Table()
	c.i.handler.SetTable(table)
	if c.unsettled {
		return nil, nil
	}
	lacking, err := c.i.inForce(rules, c.i.setRules(rules))
	if err != nil {
		c.i.handler.SetTable(last)
		if !c.inCharge {
			return nil, err // what an earlier process left stays, and is not known here
		}
		// Some of it may be in force: the comparison of setRules would not see it.
		// What sets that are older say of health is no news either.
		c.i.lacking = true
		return nil, errors.Join(err, c.i.datapath.SetRules(c.i.lastRules))
	}
	c.inCharge = true
	var refused []admin.Refusal
	for n := range services {
		s := &services[n]
		if err := lacking[netip.AddrPortFrom(s.Addr.Addr().Unmap(), s.Addr.Port())]; err != nil {
			refused = append(refused, admin.Refusal{Name: s.Name, Where: s.Where(""), Text: fmt.Sprintf(
				"the kernel side has no room yet: %v; it is tried again every %s", err, againAfter)})
		}
	}
	return refused, nil
}

// inForce notes what the kernel side goes by once it was given rules, and returns the
// services for whose sets it has no room. Anything else is an error.
func (i *instance) inForce(r loader.Rules, err error) (map[netip.AddrPort]error, error) {
	short, ok := errors.AsType[*loader.RoomError](err)
	if ok && !i.lacking {
		i.log.Error("the kernel side has no room for some services: they keep what they have, or go by on_failure", "error", err)
	}
	if ok || err == nil {
		i.lacking = ok // else what there was no room for before is still to be tried again
	}
	switch {
	case ok:
		i.lastRules = r
		return short.Services, nil
	case err != nil:
		return nil, err
	default:
		i.lastRules = r
		return nil, nil
	}
}

// setRules writes what differs from what the kernel side goes by.
func (i *instance) setRules(r loader.Rules) error {
	bare, last := r, i.lastRules
	bare.Services, last.Services = withoutSets(r.Services), withoutSets(i.lastRules.Services)
	if i.lacking || !reflect.DeepEqual(bare, last) {
		return i.sets.publish(func() error { return i.datapath.SetRules(r) })
	}
	changed := map[netip.AddrPort]*flow.Set{}
	for n := range r.Services {
		if r.Services[n].Set != i.lastRules.Services[n].Set {
			changed[r.Services[n].Addr] = r.Services[n].Set
		}
	}
	if len(changed) == 0 {
		return nil
	}
	return i.sets.publish(func() error { return i.datapath.SetEndpoints(changed) })
}

func withoutSets(services []loader.Service) []loader.Service {
	all := slices.Clone(services)
	for i := range all {
		all[i].Set = nil
	}
	return all
}

// list returns the services in force. They must not be changed.
func (c *control) list() []service {
	if l := c.listing(); l != nil {
		return l.services
	}
	return nil
}

// listing returns the services in force, to be looked up. They must not be changed.
func (c *control) listing() *listing {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.services
}

// names returns the service of an original destination, and its cluster.
func (i *instance) names(orig netip.AddrPort) (service, cluster string) {
	name := (*i.byAddr.Load())[orig]
	return name, name
}

// used tells how many connections to a service there have been, and how many
// there are, on whatever path.
func (i *instance) used(addr netip.AddrPort) (connects uint64, live int) {
	s := i.control.listing().at(addr)
	if s == nil || s.cluster == nil {
		return 0, 0
	}
	for _, e := range s.cluster.Endpoints {
		state := e.State()
		connects += state.Connects + state.Failures
		live += int(state.Live)
	}
	live += i.control.departedFrom(s.Name)
	ended, open, err := i.datapath.Used(addr)
	if err != nil {
		return connects, live // it has no set
	}
	return connects + ended, live + open
}
