package kube

import (
	"cmp"
	"context"
	"encoding/binary"
	"math/bits"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
)

// DemandOptions are the settings of a [Demand]. The zero value has defaults.
type DemandOptions struct {
	// Idle is after how long without a connection a service is dropped; 0 is ten
	// minutes.
	Idle time.Duration
	// NotFound is for how long an address that is no service's is not looked up
	// again; 0 is one minute. Failed is the same for a look-up that failed; 0 is
	// five seconds.
	NotFound, Failed time.Duration
	// MaxServices bounds how many services are in use at once, and MaxNotFound
	// how many addresses are remembered; 0 is 1,000 and 4,096.
	MaxServices, MaxNotFound int
	// Used tells how many connections to a service's address there have been, and
	// how many there are. It is called from Run, for each service, several times
	// per Idle. Nil: only being asked for counts as use.
	Used func(addr netip.AddrPort) (connects uint64, live int)
	// Within are the ranges of service addresses: no other address is looked up.
	// Empty is what the API server says they are (Kubernetes 1.33 and later, if
	// the service account may list servicecidrs), else any.
	Within []netip.Prefix
	// Now is the clock that Idle, NotFound and Failed go by; nil is time.Now.
	Now func() time.Time
}

// Service is a port of a service that is in use.
type Service struct {
	// Name is "namespace/name:port", the port by number, and for an address that is
	// not of the cluster's first family (IPv4 if that is not known) with "/ipv6" or
	// "/ipv4" behind it: each address of a dual-stack service is a service here.
	Name string
	// Host is "name.namespace.svc.cluster.local".
	Host string
	// Addr is ClusterIP and port. Its address is not valid for a headless service,
	// which has none: those are found by name only.
	Addr netip.AddrPort
	// Affinity is the service's sessionAffinity: ClientIP.
	Affinity bool
	// Source tells the endpoints, of Addr's family where there is one. Sources of
	// equal Name and Addr are interchangeable.
	Source discover.Source
}

// DemandStats counts what a [Demand] did.
type DemandStats struct {
	Asked                   uint64 // addresses and names that were taken from the hot path
	Dropped                 uint64 // those that found the queue full
	Lookups                 uint64 // requests to the API server
	Found, NotFound, Failed uint64 // how they ended
	Services                int    // in use now
}

// Demand finds out which services the application uses. Asked and AskedName may
// be called from anywhere; what they are told is looked up by Run.
type Demand struct {
	client  *Client
	options DemandOptions
	began   time.Time
	// recalled are services that were in use before.
	recalled []Service

	asked chan question
	// recent has the hashes of what was asked in this second.
	recent [1024]atomic.Uint64
	// pending has those of which nobody knows yet what becomes of them, within the
	// ranges of services; nil: those are not known.
	pending pending
	within  atomic.Pointer[[]netip.Prefix]
	counts  struct {
		asked, dropped, lookups, found, notFound, failed atomic.Uint64
		services                                         atomic.Int64
	}
}

// question is what the application asks for: an address and port, or a name.
type question struct {
	addr netip.AddrPort
	name key
}

const askedMax = 256

// Demand returns the services that the application asks for.
func (c *Client) Demand(o DemandOptions) *Demand {
	o.Idle = cmp.Or(o.Idle, 10*time.Minute)
	o.NotFound = cmp.Or(o.NotFound, time.Minute)
	o.Failed = cmp.Or(o.Failed, 5*time.Second)
	o.MaxServices = cmp.Or(o.MaxServices, 1000)
	o.MaxNotFound = cmp.Or(o.MaxNotFound, 4096)
	if o.Now == nil {
		o.Now = time.Now
	}
	d := &Demand{client: c, options: o, began: time.Now(), asked: make(chan question, askedMax)}
	d.setRanges(o.Within)
	return d
}

// Recall puts services into use that were when another process ended: their Name, Addr
// and Affinity. They are in the list at once, whether the API server answers or not,
// until it says otherwise or they were not used for a time. It returns them with their
// sources, and leaves out what never was in a list. It is called before Run.
func (d *Demand) Recall(services []Service) []Service {
	d.recalled = nil
	for _, v := range services {
		k, ok := keyOf(v.Name)
		if !ok || !v.Addr.IsValid() || len(d.recalled) >= d.options.MaxServices {
			continue
		}
		d.recalled = append(d.recalled, d.client.service(v.Name, k, v.Addr, v.Affinity))
	}
	return d.recalled
}

// keyOf is the service that the name of a [Service] is of.
func keyOf(name string) (key, bool) {
	namespace, rest, _ := strings.Cut(name, "/")
	k := key{namespace: namespace}
	k.name, _, _ = strings.Cut(rest, ":")
	return k, isLabel(k.namespace) && isLabel(k.name)
}

// service is one port of a service, as lists have it.
func (c *Client) service(name string, k key, at netip.AddrPort, affinity bool) Service {
	ref := Ref{Namespace: k.namespace, Name: k.name, Port: strconv.Itoa(int(at.Port()))}
	if at.Addr().IsValid() {
		ref.Family = familyOf(at.Addr())
	}
	return Service{
		Name: name, Host: k.name + "." + k.namespace + ".svc" + c.domain, Addr: at, Affinity: affinity, Source: c.Source(ref),
	}
}

// Asked says that the application connects to dst, which no service names. It
// takes no lock but a channel's, allocates nothing, and never blocks: what is too
// much is forgotten, and asked again by the next connection.
func (d *Demand) Asked(dst netip.AddrPort) {
	dst, hash, ok := addressOf(dst)
	if ok {
		d.ask(question{addr: dst}, hash)
	}
}

// addressOf returns the usual form of an address, its hash, and whether it can be a
// service's at all.
func addressOf(dst netip.AddrPort) (netip.AddrPort, uint64, bool) {
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	a := dst.Addr()
	if dst.Port() == 0 || !a.IsGlobalUnicast() || a.Zone() != "" {
		return dst, 0, false
	}
	b := a.As16()
	return dst, mix(binary.NativeEndian.Uint64(b[:8]), mix(binary.NativeEndian.Uint64(b[8:]), uint64(dst.Port()))), true
}

// AskedName says that the application asked for a name: name.namespace.svc, with
// the cluster's domain or without. It never blocks. Other names are ignored.
func (d *Demand) AskedName(host string) {
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	host = strings.TrimSuffix(host, d.client.domain)
	host, found := strings.CutSuffix(host, ".svc")
	name, namespace, two := strings.Cut(host, ".")
	if !found || !two || !isLabel(name) || !isLabel(namespace) {
		return
	}
	hash := uint64(len(name))
	for i := range len(host) {
		hash = mix(hash, uint64(host[i]))
	}
	d.ask(question{name: key{namespace, name}}, hash)
}

// ask puts q into the queue unless it was there in this second. Two that share
// a place in recent only lose what it saves.
func (d *Demand) ask(q question, hash uint64) {
	now := time.Since(d.began)
	stamp := mix(hash, uint64(now/time.Second)) | 1
	place := &d.recent[stamp>>54]
	if place.Load() == stamp {
		return
	}
	if q.addr.IsValid() && d.may(q.addr.Addr()) {
		d.pending.open(hash, now) // before the answer can come
	}
	select {
	case d.asked <- q:
		place.Store(stamp)
		d.counts.asked.Add(1)
	default:
		d.counts.dropped.Add(1)
		d.pending.close(hash, now)
	}
}

// mix folds b into a: the 128-bit product of two odd-ish numbers, both halves.
func mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a^0x9e3779b97f4a7c15, b^0xd1b54a32d192ed03)
	return hi ^ lo
}

func (d *Demand) setRanges(ranges []netip.Prefix) {
	if len(ranges) == 0 {
		d.within.Store(nil)
		return
	}
	d.within.Store(&ranges)
}

// Stats returns the counts.
func (d *Demand) Stats() DemandStats {
	c := &d.counts
	return DemandStats{
		Asked: c.asked.Load(), Dropped: c.dropped.Load(), Lookups: c.lookups.Load(),
		Found: c.found.Load(), NotFound: c.notFound.Load(), Failed: c.failed.Load(),
		Services: int(c.services.Load()),
	}
}

// Run sends the whole list of the services in use, sorted by name and address,
// whenever it changes, until ctx is done. Then it returns nil, and every
// goroutine that it started has ended.
//
// A service comes into the list when its address or name is asked for, and
// leaves it when it was not used for a time, or when it is gone. What cannot be
// served as kube-proxy would do it stays out: ExternalName, a proxy of its own
// (service.kubernetes.io/service-proxy-name), internalTrafficPolicy: Local with
// the node unknown.
func (d *Demand) Run(ctx context.Context, out chan<- []Service) error {
	s := &seeker{
		Demand:  d,
		found:   make(map[key]*found),
		byAddr:  make(map[netip.Addr]*found),
		pending: make(map[subject][]uint16),
		refused: make(map[subject]time.Time),
		toScan:  make(map[netip.Addr]bool),
		answers: make(chan answer, lookupsMax+2),
		wakeups: make(chan struct{}, 1),
		ranges:  d.options.Within,
		primary: d.client.primary,
		budget:  lookupsBurst,
	}
	s.recall()
	s.run(ctx, out)
	return nil
}
