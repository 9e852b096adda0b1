package kube

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// The server is asked by so many at once, and so often in a second after a
	// first burst: an application that talks to the whole Internet must not make a
	// load of it.
	lookupsMax    = 4
	lookupsRate   = 20
	lookupsBurst  = 200
	rangesEvery   = 10 * time.Minute
	scanEvery     = 30 * time.Second
	scanEveryMost = 10 * time.Minute
)

// subject is what is looked up: an address, or a name.
type subject struct {
	addr netip.Addr
	name key
}

// found is a service in use.
type found struct {
	watcher *watcher
	service *service
	uses    map[netip.AddrPort]*use // no address for a headless service
}

// use is one port of a service that is in the list.
type use struct {
	last     time.Time // when it was last known to be used
	connects uint64
}

// answer is what came of a look-up, of a scan or of the question for ranges.
type answer struct {
	subject subject
	service *service // nil if there is none
	err     error

	scanned map[netip.Addr]*service // if it was a scan: what it found
	asked   []netip.Addr            // and what it looked for
	scan    bool

	ranges   []netip.Prefix // if it was about these
	primary  Family         // and which family is the first
	isRanges bool
}

// seeker is what a run of Demand knows. It belongs to run's goroutine.
type seeker struct {
	*Demand
	found  map[key]*found
	byAddr map[netip.Addr]*found

	queue   []subject
	pending map[subject][]uint16 // asked, not answered: the ports
	// refused is until when something is not looked up again.
	refused map[subject]time.Time

	lookups    sync.WaitGroup
	inFlight   int
	answers    chan answer // has room for all that are in flight
	budget     float64     // look-ups that may start now
	budgetFrom time.Time

	ranges     []netip.Prefix
	primary    Family    // of the addresses that services have first, if it is known
	rangesNext time.Time // when to ask for them again
	rangesBusy bool

	// toScan are the addresses that no service has as its first.
	toScan    map[netip.Addr]bool
	scanNext  time.Time
	scanPause time.Duration
	scanBusy  bool

	wakeups chan struct{}
	// settled fires when the watches know what was found last.
	settled <-chan time.Time
	changed bool
}

func (s *seeker) run(ctx context.Context, out chan<- []Service) {
	defer s.end()
	tick := time.NewTicker(max(min(s.options.Idle/4, time.Minute), time.Millisecond))
	defer tick.Stop()
	for {
		again := s.start(ctx)
		var send chan<- []Service
		var list []Service
		if s.changed {
			send, list = out, s.list()
		}
		select {
		case <-ctx.Done():
			return
		case send <- list:
			s.changed = false
		case q := <-s.asked:
			s.ask(q)
		case a := <-s.answers:
			s.answer(a)
		case <-s.wakeups:
			s.review()
		case <-s.settled:
			s.review()
		case <-tick.C:
			s.expire()
		case <-again:
		}
		s.counts.services.Store(int64(len(s.found)))
	}
}

// recall puts into use what was before. What the server has of a service replaces this.
func (s *seeker) recall() {
	now := s.options.Now()
	for _, v := range s.recalled {
		k, _ := keyOf(v.Name)
		a, p := v.Addr.Addr(), port{number: v.Addr.Port()}
		if s.primary == FamilyAny && a.Is6() && !strings.HasSuffix(v.Name, "/ipv6") {
			s.primary = FamilyIPv6
		}
		f := s.found[k]
		if f == nil {
			f = &found{service: &service{key: k, affinity: v.Affinity}, uses: make(map[netip.AddrPort]*use)}
			s.found[k] = f
		}
		f.uses[v.Addr] = &use{last: now}
		if !slices.Contains(f.service.addrs, a) {
			f.service.addrs = append(f.service.addrs, a)
		}
		if !slices.Contains(f.service.ports, p) {
			f.service.ports = append(f.service.ports, p)
		}
	}
	for _, f := range s.found {
		s.follow(f)
	}
	s.changed = len(s.found) > 0
}

// follow has a service watched that is in use from now on.
func (s *seeker) follow(f *found) {
	f.watcher = s.client.acquire(f.service.key)
	f.watcher.subscribe(s.wakeups, true)
	s.index(f)
	s.settled = time.After(s.client.settle)
}

// end waits for what run started.
func (s *seeker) end() {
	s.lookups.Wait()
	for _, f := range s.found {
		s.drop(f)
	}
	s.counts.services.Store(0)
}

// ask takes a question: it is answered from what is known, or looked up.
func (s *seeker) ask(q question) {
	sub := subject{q.addr.Addr(), q.name}
	if f := s.known(sub); f != nil {
		s.use(f, sub, []uint16{q.addr.Port()})
		return
	}
	if s.options.Now().Before(s.refused[sub]) || !s.inRange(sub) {
		s.answered(sub, q.addr.Port())
		return
	}
	ports, asked := s.pending[sub]
	switch {
	case asked && (sub.name != key{} || slices.Contains(ports, q.addr.Port()) || len(ports) >= 64):
		return
	case !asked && len(s.pending) >= s.options.MaxNotFound:
		s.counts.dropped.Add(1)
		s.answered(sub, q.addr.Port())
		return
	case !asked:
		s.queue = append(s.queue, sub)
	default:
	}
	s.pending[sub] = append(ports, q.addr.Port())
}

func (s *seeker) known(sub subject) *found {
	if sub.name != (key{}) {
		return s.found[sub.name]
	}
	return s.byAddr[sub.addr]
}

func (s *seeker) inRange(sub subject) bool {
	if sub.name != (key{}) || len(s.ranges) == 0 {
		return true
	}
	return slices.ContainsFunc(s.ranges, func(p netip.Prefix) bool { return p.Contains(sub.addr) })
}

// start starts the look-ups that may start now. If some have to wait, it returns
// what tells when to try again.
func (s *seeker) start(ctx context.Context) <-chan time.Time {
	now := time.Now()
	if len(s.options.Within) == 0 && !s.rangesBusy && !now.Before(s.rangesNext) {
		s.rangesBusy, s.rangesNext = true, now.Add(rangesEvery)
		s.lookups.Go(func() { s.answers <- s.client.serviceRanges(ctx) })
	}
	if s.rangesBusy && s.ranges == nil {
		return nil // they may spare us the rest
	}
	if s.budgetFrom.IsZero() {
		s.budgetFrom = now
	}
	s.budget = min(s.budget+now.Sub(s.budgetFrom).Seconds()*lookupsRate, lookupsBurst)
	s.budgetFrom = now
	for len(s.queue) > 0 && s.inFlight < lookupsMax {
		if s.budget < 1 {
			return time.After(time.Second / lookupsRate)
		}
		sub := s.queue[0]
		s.queue = s.queue[1:]
		if f := s.known(sub); f != nil { // found in the meantime, by another way
			s.use(f, sub, s.pending[sub])
			delete(s.pending, sub)
			continue
		}
		if !s.inRange(sub) {
			s.answered(sub, s.pending[sub]...)
			delete(s.pending, sub)
			continue
		}
		s.budget--
		s.inFlight++
		s.counts.lookups.Add(1)
		s.lookups.Go(func() { s.answers <- s.client.lookup(ctx, sub) })
	}
	if len(s.toScan) == 0 || s.scanBusy {
		return nil
	}
	if wait := s.scanNext.Sub(now); wait > 0 {
		return time.After(wait)
	}
	var wanted []netip.Addr
	for a := range s.toScan {
		wanted = append(wanted, a)
	}
	s.scanBusy = true
	s.counts.lookups.Add(1)
	s.lookups.Go(func() { s.answers <- s.client.scan(ctx, wanted) })
	return nil
}

// answer takes the outcome of a look-up.
func (s *seeker) answer(a answer) {
	switch {
	case a.isRanges:
		s.rangesBusy = false
		if a.err == nil {
			s.ranges = a.ranges
			s.setRanges(a.ranges)
			if a.primary != FamilyAny {
				s.primary = a.primary
			}
		} else {
			s.rangesNext = time.Now().Add(scanEvery)
		}
	case a.scan:
		s.scanBusy = false
		s.scanPause = min(max(2*s.scanPause, scanEvery), scanEveryMost)
		if len(a.scanned) > 0 {
			s.scanPause = scanEvery
		}
		s.scanNext = time.Now().Add(s.scanPause)
		for _, addr := range a.asked {
			delete(s.toScan, addr)
			s.settle(subject{addr: addr}, a.scanned[addr], a.err)
		}
	default:
		s.inFlight--
		// The server finds services by their first address only. The others are
		// those of the other family, unless somebody wants it otherwise. They may wait
		// for minutes, and must not take all of the room.
		if other := a.subject.addr; a.err == nil && a.service == nil && other.IsValid() && familyOf(other) != s.primary &&
			len(s.toScan) < s.options.MaxNotFound/2 {
			s.toScan[other] = true
			return
		}
		s.settle(a.subject, a.service, a.err)
	}
}

// settle ends a question.
func (s *seeker) settle(sub subject, svc *service, err error) {
	ports := s.pending[sub]
	delete(s.pending, sub)
	switch {
	case err != nil:
		s.counts.failed.Add(1)
		s.answered(sub, ports...)
		s.refuse(sub, s.options.Failed)
		return
	case svc == nil || svc.foreign || s.client.check(svc) != nil:
		s.answered(sub, ports...)
		s.counts.notFound.Add(1)
		s.refuse(sub, s.options.NotFound)
		return
	}
	f := s.found[svc.key]
	if f == nil {
		if len(s.found) >= s.options.MaxServices {
			s.counts.dropped.Add(1)
			s.answered(sub, ports...)
			s.refuse(sub, s.options.Failed)
			return
		}
		f = &found{service: svc, uses: make(map[netip.AddrPort]*use)}
	}
	s.use(f, sub, ports)
	if len(f.uses) == 0 { // none of its ports
		s.counts.notFound.Add(1)
		s.refuse(sub, s.options.NotFound)
		return
	}
	s.counts.found.Add(1)
	if f.watcher == nil {
		s.found[svc.key] = f
		s.follow(f)
		s.review() // the watcher may be somebody else's, and know more
	}
}

// refuse remembers that there is no use in asking, within bounds.
func (s *seeker) refuse(sub subject, d time.Duration) {
	now := s.options.Now()
	if len(s.refused) >= s.options.MaxNotFound {
		for r, until := range s.refused {
			if !now.Before(until) {
				delete(s.refused, r)
			}
		}
	}
	for r := range s.refused {
		if len(s.refused) < s.options.MaxNotFound {
			break
		}
		delete(s.refused, r) // any: a map has no oldest
	}
	s.refused[sub] = now.Add(d)
}

// use puts ports of a service into use: those that were asked for at one of its
// addresses, or all if it was asked for by name.
func (s *seeker) use(f *found, sub subject, ports []uint16) {
	addrs := []netip.Addr{sub.addr}
	if sub.name != (key{}) {
		addrs, ports = f.service.addrs, nil
		for _, p := range f.service.ports {
			ports = append(ports, p.number)
		}
		if len(addrs) == 0 {
			addrs = []netip.Addr{{}}
		}
	}
	now := s.options.Now()
	for _, a := range addrs {
		for _, p := range ports {
			at := netip.AddrPortFrom(a, p)
			if u := f.uses[at]; u != nil {
				u.last = now
			} else if f.service.serves(at) {
				f.uses[at] = &use{last: now}
				s.changed = true
			} else {
				s.answered(subject{addr: a}, p)
			}
		}
	}
}

// serves tells whether the service has that port at that address.
func (s *service) serves(at netip.AddrPort) bool {
	if at.Addr().IsValid() != (len(s.addrs) > 0) || at.Addr().IsValid() && !slices.Contains(s.addrs, at.Addr()) {
		return false
	}
	return slices.ContainsFunc(s.ports, func(p port) bool { return p.number == at.Port() })
}

func (s *seeker) index(f *found) {
	for _, a := range f.service.addrs {
		s.byAddr[a] = f
	}
}

// review looks at what became of the services in use. An address that is no
// longer a service's may be another's already.
func (s *seeker) review() {
	for _, f := range s.found {
		now, known := f.watcher.current()
		if !known || now != nil && now.equal(f.service) {
			continue
		}
		if now == nil || now.foreign || s.client.check(now) != nil {
			s.drop(f)
			continue
		}
		s.unindex(f)
		f.service = now
		s.index(f)
		s.changed = true
		for at := range f.uses {
			if !now.serves(at) {
				s.unuse(f, at)
			}
		}
		if len(f.uses) == 0 {
			s.drop(f)
		}
	}
}

func (s *seeker) unindex(f *found) {
	for _, a := range f.service.addrs {
		if s.byAddr[a] == f {
			delete(s.byAddr, a)
		}
	}
}

func (s *seeker) drop(f *found) {
	s.changed = true
	for at := range f.uses {
		s.unuse(f, at)
	}
	s.unindex(f)
	delete(s.found, f.service.key)
	f.watcher.unsubscribe(s.wakeups)
	s.client.release(f.watcher)
}

// unuse takes a port out of use. Who asks for it next waits for it again.
func (s *seeker) unuse(f *found, at netip.AddrPort) {
	delete(f.uses, at)
	if _, hash, ok := addressOf(at); ok {
		s.Demand.pending.forget(hash)
	}
}

// expire drops what is not used.
func (s *seeker) expire() {
	now := s.options.Now()
	for _, f := range s.found {
		for at, u := range f.uses {
			if s.options.Used != nil && at.Addr().IsValid() {
				connects, live := s.options.Used(at)
				if live > 0 || connects != u.connects {
					u.last, u.connects = now, connects
				}
			}
			if now.Sub(u.last) >= s.options.Idle {
				s.unuse(f, at)
				s.changed = true
			}
		}
		if len(f.uses) == 0 {
			s.drop(f)
		}
	}
}

// list returns the services in use.
func (s *seeker) list() []Service {
	var list []Service
	for _, f := range s.found {
		for at := range f.uses {
			name := fmt.Sprintf("%s:%d", f.service.key, at.Port())
			if at.Addr().IsValid() {
				name += s.suffix(familyOf(at.Addr()))
			}
			list = append(list, s.client.service(name, f.service.key, at, f.service.affinity))
		}
	}
	slices.SortFunc(list, func(a, b Service) int { return cmp.Or(cmp.Compare(a.Name, b.Name), a.Addr.Compare(b.Addr)) })
	return list
}

// suffix tells the two addresses of a dual-stack service apart. It goes by the
// address alone, so that a name stays whichever of them is used, and when.
func (s *seeker) suffix(f Family) string {
	switch {
	case f == cmp.Or(s.primary, FamilyIPv4):
		return ""
	case f == FamilyIPv6:
		return "/ipv6"
	default:
		return "/ipv4"
	}
}

// lookup asks for the service of an address or a name.
func (c *Client) lookup(ctx context.Context, sub subject) answer {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	path, selector := "/api/v1/services", "spec.clusterIP="+sub.addr.String()
	if sub.name != (key{}) {
		path, selector = "/api/v1/namespaces/"+sub.name.namespace+"/services", "metadata.name="+sub.name.name
	}
	a := answer{subject: sub}
	_, a.err = c.list(ctx, path, url.Values{"fieldSelector": {selector}, "resourceVersion": {"0"}}, func(read func(any) error) error {
		o, err := decodeService(read)
		if err == nil && (sub.name == o.value.key || slices.Contains(o.value.addrs, sub.addr)) {
			a.service = o.value
		}
		return err
	})
	return a
}

// scan reads all services, of which it keeps those that have one of the
// addresses.
func (c *Client) scan(ctx context.Context, wanted []netip.Addr) answer {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	a := answer{scan: true, asked: wanted, scanned: make(map[netip.Addr]*service)}
	_, a.err = c.list(ctx, "/api/v1/services", url.Values{"resourceVersion": {"0"}}, func(read func(any) error) error {
		o, err := decodeService(read)
		if err != nil {
			return err
		}
		for _, addr := range o.value.addrs {
			if slices.Contains(wanted, addr) {
				a.scanned[addr] = o.value
			}
		}
		return nil
	})
	return a
}

// serviceRanges asks where the addresses of services are. A server that does not
// know, or does not tell us, leaves any address possible.
func (c *Client) serviceRanges(ctx context.Context) answer {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	a := answer{isRanges: true}
	_, a.err = c.list(ctx, "/apis/networking.k8s.io/v1/servicecidrs", url.Values{"resourceVersion": {"0"}}, func(read func(any) error) error {
		var w struct {
			Metadata metadata `json:"metadata"`
			Spec     struct {
				CIDRs []string `json:"cidrs"`
			} `json:"spec"`
		}
		if err := read(&w); err != nil {
			return err
		}
		for _, text := range w.Spec.CIDRs {
			p, err := netip.ParsePrefix(text)
			if err != nil {
				return err
			}
			a.ranges = append(a.ranges, p)
		}
		// The one that the API server makes of its own settings, in their order.
		if w.Metadata.Name == "kubernetes" && len(w.Spec.CIDRs) > 0 {
			a.primary = familyOf(a.ranges[len(a.ranges)-len(w.Spec.CIDRs)].Addr())
		}
		return nil
	})
	if isStatus(a.err, http.StatusForbidden) || isStatus(a.err, http.StatusNotFound) {
		a.ranges, a.err = nil, nil
	}
	return a
}
