package dns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
)

const (
	// patience is how long the second family may take when the first has
	// answered: some servers never answer for AAAA.
	patience = 2 * time.Second
	// maxAtOnce is how many targets of SRV records are asked for at once,
	// maxTargets how many there may be.
	maxAtOnce  = 8
	maxTargets = 1024
	// addrsMax is how many addresses these may have together: more than a set has, since
	// some may be of several. An answer has four thousand at most.
	addrsMax = 4 * discover.MaxEndpoints
	// absences is how often in a row the name that had answered must not be
	// there until the search list is gone through again. A name that is away for
	// a moment is not to be taken for another one further down the list.
	absences = 3
)

var errPatience = fmt.Errorf("no answer %v after that for the other family", patience)

// lookup is the names of one source, and what they last led to. It is for one
// goroutine, but for what mu guards.
type lookup struct {
	options Options
	// ask asks one question: [client.ask], but in tests.
	ask func(ctx context.Context, r *resolver, q question) (*answer, error)

	// chosen is the candidate of the search list that has answered, absent how
	// often in a row it was not there since, search the list that it is of.
	chosen string
	absent int
	search []string

	mu sync.Mutex // guards what follows, while targets are asked for
	// known is what each question of a name with addresses was last answered with,
	// also that there are none. It stands in where a server fails for a part of the
	// whole.
	known map[question]*memory
	round uint64
}

// memory is what a question was last answered with.
type memory struct {
	addrs []netip.Addr
	round uint64 // that last needed it
}

// found is the outcome of one round.
type found struct {
	endpoints []discover.Endpoint
	// ttl is how long it holds.
	ttl time.Duration
	// failed is why a part of it is not from this round, or nil, and lacks what of
	// it is not known from an earlier one either.
	failed error
	lacks  discover.Lack
}

func newLookup(o Options, ask func(context.Context, *resolver, question) (*answer, error)) *lookup {
	return &lookup{options: o, ask: ask, known: make(map[question]*memory)}
}

// run looks the name up. The error is a *missing if all servers agree that there
// is nothing.
func (l *lookup) run(ctx context.Context, r *resolver) (*found, error) {
	l.round++
	if !slices.Equal(l.search, r.search) {
		l.chosen, l.search = "", r.search
	}
	names := r.candidates(l.options.Name)
	if l.chosen != "" {
		names = []string{l.chosen}
	}
	var none *missing
	for _, name := range names {
		f, err := l.name(ctx, r, name)
		if m, ok := errors.AsType[*missing](err); ok {
			if none == nil || m.ttl >= 0 && (none.ttl < 0 || m.ttl < none.ttl) {
				none = m
			}
			continue
		}
		// Doubt about one name is no reason to take another one.
		if err != nil {
			return nil, err
		}
		l.chosen, l.absent = name, 0
		l.forget()
		return f, nil
	}
	if l.chosen != "" {
		if l.absent++; l.absent >= absences {
			l.chosen, l.absent = "", 0
		}
	}
	if len(names) > 1 {
		bare := make([]string, len(names))
		for i, name := range names {
			bare[i] = strings.TrimSuffix(name, ".")
		}
		return nil, fmt.Errorf("%w (asked for %s)", none, strings.Join(bare, ", "))
	}
	return nil, none
}

// forget drops what this round had no use for.
func (l *lookup) forget() {
	for q, m := range l.known {
		if m.round != l.round {
			delete(l.known, q)
		}
	}
}

// name looks up one candidate.
func (l *lookup) name(ctx context.Context, r *resolver, name string) (*found, error) {
	if l.options.SRV {
		return l.services(ctx, r, name)
	}
	h, err := l.host(ctx, r, name)
	if err != nil {
		return nil, err
	}
	f := &found{ttl: h.ttl, failed: h.failed, lacks: h.lacks}
	for _, a := range h.addrs {
		f.endpoints = append(f.endpoints, discover.Endpoint{
			Addr: netip.AddrPortFrom(a, l.options.Port), Weight: 1,
		})
	}
	return f, nil
}

// host is what a name's addresses are.
type host struct {
	addrs  []netip.Addr // sorted
	ttl    time.Duration
	failed error // why some of addrs are old, or missing
	lacks  discover.Lack
}

// kinds returns the records that are asked for.
func (l *lookup) kinds(r *resolver) []dnsmessage.Type {
	switch {
	case l.options.Families == FamiliesIPv6:
		return []dnsmessage.Type{dnsmessage.TypeAAAA}
	case l.options.Families == FamiliesIPv4, r.noAAAA:
		return []dnsmessage.Type{dnsmessage.TypeA}
	default:
		return []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA}
	}
}

// reply is what came of one question.
type reply struct {
	question question
	answer   *answer
	err      error
}

// host asks for all families of a name at once. Where one of them has addresses,
// the other's failure leaves that one's last addresses, and a "no" is one.
func (l *lookup) host(ctx context.Context, r *resolver, name string) (*host, error) {
	replies := l.askAll(ctx, r, name)
	l.mu.Lock()
	defer l.mu.Unlock()
	h := &host{ttl: 1 << 62}
	var none *missing
	var failed []error
	fresh := 0
	for i := range replies {
		p := &replies[i]
		if p.err == nil {
			p.err = usable(p.answer)
		}
		m, ok := errors.AsType[*missing](p.err)
		switch {
		case p.err == nil:
			fresh++
			h.ttl = min(h.ttl, p.answer.ttl)
		case !ok:
			failed = append(failed, p.err)
		case none == nil || m.ttl >= 0 && (none.ttl < 0 || m.ttl < none.ttl):
			none = m
		default:
		}
	}
	switch {
	case fresh == 0 && len(failed) > 0:
		return nil, join(failed)
	case fresh == 0:
		return nil, none
	default:
	}
	for _, p := range replies {
		switch _, isNone := errors.AsType[*missing](p.err); {
		case p.err == nil:
			l.known[p.question] = &memory{p.answer.addrs, l.round}
			h.addrs = append(h.addrs, p.answer.addrs...)
		case isNone:
			l.known[p.question] = &memory{nil, l.round}
		default:
			l.recall(h, p.question)
		}
	}
	if none != nil && none.ttl >= 0 {
		// What the other family may have then is asked for in time, too.
		h.ttl = min(h.ttl, max(none.ttl, l.options.MinTTL))
	}
	h.failed = join(failed)
	slices.SortFunc(h.addrs, netip.Addr.Compare)
	h.addrs = slices.Compact(h.addrs)
	return h, nil
}

// recall has what a question was last answered with stand in. The caller holds mu.
func (l *lookup) recall(h *host, q question) {
	m := l.known[q]
	switch {
	case m != nil:
		m.round = l.round
		h.addrs = append(h.addrs, m.addrs...)
	case q.kind == dnsmessage.TypeA:
		h.lacks |= discover.LackIPv4
	default:
		h.lacks |= discover.LackIPv6
	}
}

// askAll asks for every family. When one has addresses, the other must not take
// much longer.
func (l *lookup) askAll(ctx context.Context, r *resolver, name string) []reply {
	kinds := l.kinds(r)
	rest, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	came := make(chan reply, len(kinds))
	for _, k := range kinds {
		go l.askOne(rest, r, question{fold(name), k}, came)
	}
	var replies []reply
	var late <-chan time.Time
	for len(replies) < len(kinds) {
		select {
		case p := <-came:
			replies = append(replies, p)
			if p.err == nil && late == nil {
				t := time.NewTimer(patience)
				defer t.Stop()
				late = t.C
			}
		case <-late:
			cancel(errPatience)
		}
	}
	return replies
}

func (l *lookup) askOne(ctx context.Context, r *resolver, q question, came chan<- reply) {
	a, err := l.ask(ctx, r, q)
	came <- reply{q, a, err}
}

// usable leaves out addresses that no connection can go to, such as the 0.0.0.0 of
// a server that blocks a name.
func usable(a *answer) error {
	var why error
	good := make([]netip.Addr, 0, len(a.addrs))
	for _, addr := range a.addrs {
		addr = addr.Unmap()
		if err := discover.CheckAddr(addr); err != nil {
			why = err
			continue
		}
		good = append(good, addr)
	}
	a.addrs = good // of its own: nobody else has the answer
	if len(good) == 0 && why != nil {
		return fmt.Errorf("no address to use: %w", why)
	}
	return nil
}

// outcome is what came of the targets of one priority.
type outcome struct {
	hosts map[string]*host // those that have addresses, by name
	// none are those that have none, and of which no address is remembered: that is
	// an answer, which holds as others do.
	none   []*missing
	failed []error // why others are left out, or old
	lacks  discover.Lack
}

// services looks up SRV records and the addresses of their targets: of those of
// the lowest priority of which any has an address.
func (l *lookup) services(ctx context.Context, r *resolver, name string) (*found, error) {
	q := question{fold(name), dnsmessage.TypeSRV}
	a, err := l.ask(ctx, r, q)
	if err != nil {
		return nil, err
	}
	// RFC 2782: one target "." says that there is decidedly no such service.
	srvs := slices.DeleteFunc(slices.Clone(a.srvs), func(s dnsmessage.SRVResource) bool {
		return s.Target.String() == "." || s.Port == 0
	})
	f := &found{ttl: a.ttl}
	if len(srvs) == 0 {
		if len(a.srvs) == 1 && a.srvs[0].Target.String() == "." {
			return f, nil
		}
		return nil, fmt.Errorf("%s: no record with a target and a port", q)
	}
	slices.SortStableFunc(srvs, func(a, b dnsmessage.SRVResource) int { return cmp.Compare(a.Priority, b.Priority) })
	var none, failed []error
	for len(srvs) > 0 {
		n := slices.IndexFunc(srvs, func(s dnsmessage.SRVResource) bool { return s.Priority != srvs[0].Priority })
		if n < 0 {
			n = len(srvs)
		}
		records := srvs[:n]
		srvs = srvs[n:]
		o, err := l.targets(ctx, r, records)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", q, err)
		}
		failed = append(failed, o.failed...)
		f.lacks |= o.lacks
		for _, h := range o.hosts {
			f.ttl = min(f.ttl, h.ttl)
		}
		for _, m := range o.none {
			none = append(none, m)
			if m.ttl >= 0 {
				f.ttl = min(f.ttl, m.ttl) // it may be there then
			}
		}
		if f.endpoints = weigh(records, o.hosts); len(f.endpoints) > 0 {
			f.failed = join(failed)
			return f, nil
		}
	}
	// Not a *missing: the records are there, and no other name is meant.
	return nil, join(append(failed, none...))
}

// targets looks up the targets of records, several at once. An error is that they
// have too many addresses.
func (l *lookup) targets(ctx context.Context, r *resolver, records []dnsmessage.SRVResource) (*outcome, error) {
	o := &outcome{hosts: make(map[string]*host)}
	var names []string
	seen := make(map[string]bool)
	for _, s := range records {
		name := fold(s.Target.String())
		if !seen[name] {
			seen[name] = true
			names = append(names, name)
		}
	}
	if len(names) > maxTargets {
		o.failed = append(o.failed, fmt.Errorf("%d targets: only %d are used", len(names), maxTargets))
		names = names[:maxTargets]
	}
	hosts := make([]*host, len(names))
	errs := make([]error, len(names))
	free := make(chan struct{}, maxAtOnce)
	var all sync.WaitGroup
	var addrs atomic.Int64
	for i, name := range names {
		free <- struct{}{}
		if addrs.Load() > addrsMax {
			break
		}
		all.Go(func() {
			hosts[i], errs[i] = l.target(ctx, r, name)
			addrs.Add(int64(len(hosts[i].addrs)))
			<-free
		})
	}
	all.Wait()
	if addrs.Load() > addrsMax {
		// Else a server that always has others would be remembered for ever.
		maps.DeleteFunc(l.known, func(_ question, m *memory) bool { return m.round == l.round })
		return nil, fmt.Errorf("the targets have more than %d addresses", addrsMax)
	}
	for i, name := range names {
		h := hosts[i]
		if len(h.addrs) > 0 {
			o.hosts[name] = h
		}
		m, isNone := errors.AsType[*missing](errs[i])
		switch {
		case errs[i] == nil:
		case isNone && len(h.addrs) == 0:
			o.none = append(o.none, m)
		default:
			o.failed = append(o.failed, errs[i])
			o.lacks |= h.lacks
		}
	}
	return o, nil
}

// target looks up one target. Where that fails, or the name is gone although the
// record still leads there, its last addresses stand in, if there are any.
func (l *lookup) target(ctx context.Context, r *resolver, name string) (*host, error) {
	h, err := l.host(ctx, r, name)
	if err == nil {
		return h, h.failed
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	h = &host{ttl: l.options.MinTTL}
	for _, k := range l.kinds(r) {
		l.recall(h, question{name, k})
	}
	return h, err
}

// maxScale is how much weights are multiplied by at most to be divided: it is a
// multiple of the numbers up to 10.
const maxScale = 2520

// weigh makes endpoints of records. A record's weight is shared by the addresses
// of its target, so weights are made larger where they would not divide; weight 0,
// which is "hardly ever", becomes 1.
func weigh(group []dnsmessage.SRVResource, hosts map[string]*host) []discover.Endpoint {
	scale, most, even := uint32(1), uint32(1), true
	count := 0
	for _, s := range group {
		h := hosts[fold(s.Target.String())]
		if h == nil {
			continue
		}
		most = max(most, uint32(s.Weight))
		even = even && (count == 0 || count == len(h.addrs))
		count = len(h.addrs)
	}
	if !even {
		scale = max(min(discover.MaxWeight/most, maxScale), 1)
	}
	weights := make(map[netip.AddrPort]uint32)
	for _, s := range group {
		h := hosts[fold(s.Target.String())]
		if h == nil {
			continue
		}
		w := max(uint32(s.Weight), 1) * scale
		if !even {
			w = max(w/uint32(len(h.addrs)), 1)
		}
		for _, a := range h.addrs {
			addr := netip.AddrPortFrom(a, s.Port)
			weights[addr] = min(weights[addr]+w, discover.MaxWeight)
		}
	}
	endpoints := make([]discover.Endpoint, 0, len(weights))
	for addr, w := range weights {
		endpoints = append(endpoints, discover.Endpoint{Addr: addr, Weight: w})
	}
	discover.Sort(endpoints)
	return endpoints
}

// join makes one error, of one line, of several.
func join(errs []error) error {
	const most = 5
	if len(errs) == 0 {
		return nil
	}
	texts := make([]string, 0, most+1)
	for i, err := range errs {
		if i == most {
			texts = append(texts, fmt.Sprintf("and %d more", len(errs)-i))
			break
		}
		texts = append(texts, err.Error())
	}
	return errors.New(strings.Join(texts, "; "))
}
