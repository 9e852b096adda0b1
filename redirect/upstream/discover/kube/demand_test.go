package kube

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// demanded is what a Demand said.
type demanded struct {
	*Demand
	t    *testing.T
	mu   sync.Mutex
	last []Service
	n    int
}

func demand(t *testing.T, c *Client, o DemandOptions) *demanded {
	t.Helper()
	d := &demanded{Demand: c.Demand(o), t: t}
	ctx, cancel := context.WithCancel(context.Background())
	out, done := make(chan []Service), make(chan error, 1)
	go func() { done <- d.Run(ctx, out) }()
	var collect sync.WaitGroup
	collect.Go(func() { d.collect(ctx, out) })
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		collect.Wait()
		c.mu.Lock()
		defer c.mu.Unlock()
		if len(c.watchers) > 0 {
			t.Errorf("%d watchers are left", len(c.watchers))
		}
	})
	return d
}

func (d *demanded) collect(ctx context.Context, out <-chan []Service) {
	for {
		select {
		case list := <-out:
			d.mu.Lock()
			d.last = list
			d.n++
			d.mu.Unlock()
		case <-ctx.Done():
			return
		}
	}
}

func (d *demanded) list() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var list []string
	for _, s := range d.last {
		addr := "-"
		if s.Addr.Addr().IsValid() {
			addr = s.Addr.String()
		}
		list = append(list, s.Name+"="+addr)
	}
	return list
}

func (d *demanded) at(i int) Service {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.last[i]
}

// waitFor waits until the list is this: name=address, sorted.
func (d *demanded) waitFor(want ...string) {
	d.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !slices.Equal(d.list(), want); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			d.t.Fatalf("list is %v, want %v; %+v", d.list(), want, d.Stats())
		}
	}
}

// ask asks until n look-ups in all are done.
func (d *demanded) ask(n uint64, addrs ...string) {
	d.t.Helper()
	for _, a := range addrs {
		d.Asked(netip.MustParseAddrPort(a))
	}
	eventually(d.t, fmt.Sprintf("%d look-ups", n), func() bool {
		s := d.Stats()
		return s.Found+s.NotFound+s.Failed >= n
	})
}

// isLookup is about requests for the service of an address.
func isLookup(r *http.Request) bool { return r.URL.Path == "/api/v1/services" }

// clusterKube has a client that knows that services are IPv4 first.
func clusterKube(t *testing.T) (*kube, *Client) {
	t.Helper()
	k := startKube(t)
	c := k.client(t)
	c.primary = FamilyIPv4
	return k, c
}

// TestDemand: a service is watched when it is asked for, one port at a time.
func TestDemand(t *testing.T) {
	k, c := clusterKube(t)
	spec := `{"spec":{"clusterIP":"10.96.0.10","clusterIPs":["10.96.0.10"],"sessionAffinity":"ClientIP","ports":[{"name":"http","port":80},{"name":"admin","port":81},{"name":"dns","port":53,"protocol":"UDP"}]}}`
	k.put("services", "default", "web", "", spec)
	k.put("endpointslices", "default", "web-1", "web", sliceOf("IPv4", httpPort+`,{"name":"admin","port":9090}`, ep("10.0.0.1")))
	k.put("services", "prod", "db", "", strings.ReplaceAll(strings.Replace(spec, "ClientIP", "None", 1), "10.96.0.10", "10.96.0.11"))

	d := demand(t, c, DemandOptions{})
	d.Asked(netip.MustParseAddrPort("[::ffff:10.96.0.10]:80"))
	d.waitFor("default/web:80=10.96.0.10:80")
	d.Asked(netip.MustParseAddrPort("10.96.0.10:81"))
	d.waitFor("default/web:80=10.96.0.10:80", "default/web:81=10.96.0.10:81")
	if n := k.count(isLookup); n != 1 {
		t.Errorf("%d look-ups for two ports of a service", n)
	}
	d.Asked(netip.MustParseAddrPort("10.96.0.10:53")) // not TCP
	d.Asked(netip.MustParseAddrPort("10.96.0.11:80"))
	d.waitFor("default/web:80=10.96.0.10:80", "default/web:81=10.96.0.10:81", "prod/db:80=10.96.0.11:80")

	web, db := d.at(1), d.at(2)
	if web.Host != "web.default.svc.cluster.local" || !web.Affinity || db.Affinity {
		t.Errorf("got %+v, %+v", web, db)
	}
	listen(t, web.Source).waitFor("10.0.0.1:9090")
	watches := func() int {
		return k.count(func(r *http.Request) bool { return isWatch(r) && strings.Contains(r.URL.Path, "/default/") })
	}
	// One of its Service, one of its slices; either may begin last.
	eventually(t, "the watches of a service", func() bool { return watches() >= 2 })
	if n := watches(); n != 2 {
		t.Errorf("%d watches for one service", n)
	}
	if s := d.Stats(); s.Found != 2 || s.Services != 2 || s.Lookups != 2 {
		t.Errorf("stats are %+v", s)
	}
}

// TestDemandNotFound: what is no service's is asked for once in a while, and
// remembered within bounds.
func TestDemandNotFound(t *testing.T) {
	t.Parallel()
	k, c := clusterKube(t)
	var now atomic.Int64
	d := demand(t, c, DemandOptions{NotFound: time.Minute, MaxNotFound: 8, Now: func() time.Time { return time.Unix(now.Load(), 0) }})
	d.ask(1, "192.0.2.1:443", "192.0.2.1:80")
	asked := func(addr string) {
		t.Helper()
		before := d.Stats().Asked
		eventually(t, "asked again", func() bool {
			d.Asked(netip.MustParseAddrPort(addr))
			return d.Stats().Asked > before
		})
	}
	asked("192.0.2.1:443")
	asked("192.0.2.1:443")
	d.ask(2, "192.0.2.2:443")
	if n := k.count(isLookup); n != 2 {
		t.Errorf("%d look-ups of two addresses", n)
	}
	now.Store(61)
	asked("192.0.2.1:443")
	d.ask(3)
	// What is no address of a service's at all is not even looked up.
	for _, a := range []string{"127.0.0.1:80", "[::1]:80", "169.254.169.254:80", "224.0.0.1:80", "0.0.0.0:80", "192.0.2.9:0", "[fe80::1%lo]:80"} {
		d.Asked(netip.MustParseAddrPort(a))
	}
	for i := range 40 {
		d.ask(uint64(4+i), fmt.Sprintf("192.0.2.%d:80", 100+i))
	}
	if n := k.count(isLookup); n != 43 {
		t.Errorf("%d look-ups, want 43", n)
	}
	if s := d.Stats(); s.NotFound != 43 || s.Services != 0 {
		t.Errorf("stats are %+v", s)
	}
}

// TestRefusedBounded: what is remembered as no service's has a bound.
func TestRefusedBounded(t *testing.T) {
	d := (&Client{}).Demand(DemandOptions{MaxNotFound: 8})
	s := &seeker{Demand: d, refused: make(map[subject]time.Time)}
	for i := range 100 {
		s.refuse(subject{addr: netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})}, time.Minute)
	}
	if len(s.refused) != 8 {
		t.Errorf("%d are remembered", len(s.refused))
	}
}

// TestDemandSecond: the second address of a service is found by reading all
// services, once for all that are asked for.
func TestDemandSecond(t *testing.T) {
	t.Parallel()
	k, c := clusterKube(t)
	k.put("services", "default", "web", "", `{"spec":{"clusterIP":"10.96.0.10","clusterIPs":["10.96.0.10","fd00:96::10"],"ports":[{"name":"http","port":80}]}}`)
	k.put("endpointslices", "default", "web-4", "web", sliceOf("IPv4", httpPort, ep("10.0.0.1")))
	k.put("endpointslices", "default", "web-6", "web", sliceOf("IPv6", httpPort, ep("fd00::1")))
	d := demand(t, c, DemandOptions{})
	d.Asked(netip.MustParseAddrPort("[fd00:96::10]:80"))
	d.waitFor("default/web:80/ipv6=[fd00:96::10]:80")
	listen(t, d.at(0).Source).waitFor("[fd00::1]:8080")
	d.Asked(netip.MustParseAddrPort("10.96.0.10:80"))
	d.waitFor("default/web:80=10.96.0.10:80", "default/web:80/ipv6=[fd00:96::10]:80")
	listen(t, d.at(0).Source).waitFor("10.0.0.1:8080")
	// The next scan is a while away, so what no service has is not known yet, and
	// not asked for again.
	d.Asked(netip.MustParseAddrPort("[2001:db8::1]:80"))
	eventually(t, "its look-up", func() bool { return k.count(isLookup) == 3 })
	if n := k.count(func(r *http.Request) bool { return isLookup(r) && r.URL.Query().Get("fieldSelector") == "" }); n != 1 {
		t.Errorf("%d scans", n)
	}
}

// TestDemandSecondMany: what waits for the next scan does not keep services from being found.
func TestDemandSecondMany(t *testing.T) {
	t.Parallel()
	k, c := clusterKube(t)
	k.put("services", "default", "web", "", `{"spec":{"clusterIP":"10.96.0.10","ports":[{"name":"http","port":80}]}}`)
	d := demand(t, c, DemandOptions{MaxNotFound: 8})
	d.ask(1, "[2001:db8::1]:443") // which is scanned for
	before := k.count(isLookup)
	for i := range 20 {
		d.Asked(netip.MustParseAddrPort(fmt.Sprintf("[2001:db8::2:%x]:443", i)))
		if i < 4 {
			eventually(t, "its look-up", func() bool { return k.count(isLookup) > before+i })
		}
	}
	eventually(t, "all were taken or dropped", func() bool { s := d.Stats(); return s.Asked >= 21 && len(d.asked) == 0 })
	d.Asked(netip.MustParseAddrPort("10.96.0.10:80"))
	for deadline := time.Now().Add(10 * time.Second); len(d.list()) == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("a service is not found: %+v", d.Stats())
		}
		d.Asked(netip.MustParseAddrPort("10.96.0.10:80"))
	}
}

// TestDemandRanges: where the server says in which ranges services are, nothing
// else is looked up.
func TestDemandRanges(t *testing.T) {
	t.Parallel()
	k := startKube(t)
	c := k.client(t)
	k.web("10.0.0.1")
	k.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/servicecidrs") {
			return false
		}
		fmt.Fprint(w, `{"kind":"ServiceCIDRList","metadata":{"resourceVersion":"9"},"items":[{"metadata":{"name":"kubernetes"},"spec":{"cidrs":["10.96.0.0/16","fd00:96::/112"]}}]}`)
		return true
	})
	d := demand(t, c, DemandOptions{})
	d.ask(0, "192.0.2.1:443", "192.0.2.2:443", "10.97.0.1:80", "10.96.0.10:80")
	d.waitFor("default/web:80=10.96.0.10:80")
	if n := k.count(isLookup); n != 1 {
		t.Errorf("%d look-ups of one address in the range", n)
	}
	// They say too that services are IPv4 first: this one is looked for no longer.
	d.ask(2, "10.96.0.99:80")
	if s := d.Stats(); s.NotFound != 1 || s.Lookups != 2 {
		t.Errorf("stats are %+v", s)
	}
	narrow := k.client(t)
	narrow.primary = FamilyIPv4
	within := demand(t, narrow, DemandOptions{Within: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}})
	within.ask(1, "10.96.0.10:80", "192.0.2.1:80")
	if s := within.Stats(); s.Lookups != 1 || s.NotFound != 1 {
		t.Errorf("stats are %+v", s)
	}
}

// TestDemandNames: names in the forms that the cluster's DNS has put every port
// of a service into use.
func TestDemandNames(t *testing.T) {
	k, c := clusterKube(t)
	k.put("services", "default", "web", "", `{"spec":{"clusterIP":"10.96.0.10","clusterIPs":["10.96.0.10","fd00:96::10"],"ports":[{"name":"http","port":80},{"name":"admin","port":81}]}}`)
	k.put("services", "prod", "db", "", `{"spec":{"clusterIP":"None","ports":[{"name":"sql","port":5432}]}}`)
	k.put("endpointslices", "prod", "db-1", "db", sliceOf("IPv4", `{"name":"sql","port":5432}`, ep("10.0.0.1"), ep("10.0.0.2")))
	d := demand(t, c, DemandOptions{})
	for _, bad := range []string{"", ".", "web", "web.default", "www.example.com.", "a.b.c.svc", "web.default.svc.example.org", "we_b.default.svc", ".default.svc"} {
		d.AskedName(bad)
	}
	d.AskedName("Web.Default.svc.cluster.local.")
	d.waitFor("default/web:80=10.96.0.10:80", "default/web:80/ipv6=[fd00:96::10]:80",
		"default/web:81=10.96.0.10:81", "default/web:81/ipv6=[fd00:96::10]:81")
	d.AskedName("db.prod.svc")
	d.waitFor("default/web:80=10.96.0.10:80", "default/web:80/ipv6=[fd00:96::10]:80",
		"default/web:81=10.96.0.10:81", "default/web:81/ipv6=[fd00:96::10]:81", "prod/db:5432=-")
	listen(t, d.at(4).Source).waitFor("10.0.0.1:5432", "10.0.0.2:5432")
	d.AskedName("none.prod.svc")
	d.ask(3)
	if s := d.Stats(); s.NotFound != 1 || s.Found != 2 {
		t.Errorf("stats are %+v", s)
	}
}

// TestDemandIdle: what is not used is dropped, with its watches; what has
// connections, or had one since, stays.
func TestDemandIdle(t *testing.T) {
	t.Parallel()
	k, c := clusterKube(t)
	k.web("10.0.0.1")
	k.put("services", "default", "old", "", strings.ReplaceAll(webSpec, "10.96.0.10", "10.96.0.11"))
	var connects, live atomic.Int64
	live.Store(1)
	d := demand(t, c, DemandOptions{Idle: 40 * time.Millisecond, Used: func(a netip.AddrPort) (uint64, int) {
		if a.Addr() == netip.MustParseAddr("10.96.0.11") {
			return 0, 0
		}
		return uint64(connects.Load()), int(live.Load())
	}})
	d.Asked(netip.MustParseAddrPort("10.96.0.10:80"))
	d.Asked(netip.MustParseAddrPort("10.96.0.11:80"))
	eventually(t, "the one that is not used dropped", func() bool {
		return d.Stats().Found == 2 && slices.Equal(d.list(), []string{"default/web:80=10.96.0.10:80"})
	})
	live.Store(0)
	for range 20 {
		connects.Add(1)
		time.Sleep(5 * time.Millisecond)
	}
	d.waitFor()
	c.mu.Lock()
	left := len(c.watchers)
	c.mu.Unlock()
	if left > 0 {
		t.Errorf("%d watchers are left", left)
	}
	// It comes back when it is asked for again.
	eventually(t, "back", func() bool {
		d.Asked(netip.MustParseAddrPort("10.96.0.10:80"))
		return slices.Equal(d.list(), []string{"default/web:80=10.96.0.10:80"})
	})
}

// TestDemandChanges: the list follows what becomes of a service. An address may
// become another service's.
func TestDemandChanges(t *testing.T) {
	t.Parallel()
	k, c := clusterKube(t)
	c.settle = 200 * time.Millisecond
	k.web("10.0.0.1")
	var now atomic.Int64
	d := demand(t, c, DemandOptions{Now: func() time.Time { return time.Unix(now.Load(), 0) }})
	again := func(want ...string) {
		t.Helper()
		eventually(t, fmt.Sprint(want), func() bool {
			now.Add(100)
			d.Asked(netip.MustParseAddrPort("10.96.0.10:80"))
			return slices.Equal(d.list(), want)
		})
	}
	again("default/web:80=10.96.0.10:80")
	k.put("services", "default", "web", "", strings.Replace(webSpec, `"port":80`, `"port":81`, 1))
	d.waitFor()
	k.put("services", "default", "web", "", webSpec)
	again("default/web:80=10.96.0.10:80")
	k.delete("services", "default", "web")
	d.waitFor()
	k.put("services", "prod", "other", "", webSpec)
	again("prod/other:80=10.96.0.10:80")
	// It is somebody else's to serve.
	k.put("services", "prod", "other", "", strings.Replace(webSpec, `{`, `{"labels":{"service.kubernetes.io/service-proxy-name":"x"},`, 1))
	d.waitFor()
	k.put("services", "prod", "other", "", strings.Replace(webSpec, `"type"`, `"internalTrafficPolicy":"Local","type"`, 1))
	d.ask(d.Stats().NotFound+d.Stats().Found, "10.96.0.10:80")
	if list := d.list(); len(list) > 0 {
		t.Errorf("list is %v", list)
	}
	k.put("services", "prod", "other", "", webSpec)
	again("prod/other:80=10.96.0.10:80")
	d.mu.Lock()
	n := d.n
	d.mu.Unlock()
	k.put("services", "prod", "other", "", strings.Replace(webSpec, `{`, `{"labels":{"a":"b"},`, 1)) // nothing that matters
	k.put("services", "prod", "other", "", strings.Replace(webSpec, `"type"`, `"sessionAffinity":"ClientIP","type"`, 1))
	eventually(t, "the affinity", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.last[0].Affinity && d.n == n+1
	})
}

// TestDemandBehind: the watch of a namespace may know less than a look-up. What
// was found stays.
func TestDemandBehind(t *testing.T) {
	k, c := clusterKube(t)
	k.put("services", "default", "old", "", strings.ReplaceAll(webSpec, "10.96.0.10", "10.96.0.11"))
	k.mu.Lock()
	version := k.version
	k.mu.Unlock()
	k.web("10.0.0.1")
	hold := make(chan struct{})
	k.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/api/v1/namespaces/default/services" {
			return false
		}
		if !isWatch(r) {
			fmt.Fprintf(w, `{"kind":"List","metadata":{"resourceVersion":"%d"},"items":[]}`, version)
			return true
		}
		<-hold
		return false
	})
	d := demand(t, c, DemandOptions{Idle: 40 * time.Millisecond, Used: func(netip.AddrPort) (uint64, int) { return 0, 1 }})
	d.Asked(netip.MustParseAddrPort("10.96.0.10:80"))
	d.waitFor("default/web:80=10.96.0.10:80")
	eventually(t, "the watch", func() bool {
		return k.count(func(r *http.Request) bool { return isWatch(r) && !isSlices(r) }) > 0
	})
	close(hold)
	listen(t, d.at(0).Source).waitFor("10.0.0.1")
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.n != 1 {
		t.Errorf("%d lists", d.n)
	}
}

// TestDemandVanished: what is gone before its watch knew it leaves all the same.
func TestDemandVanished(t *testing.T) {
	k, c := clusterKube(t)
	c.settle = 50 * time.Millisecond
	k.web("10.0.0.1")
	k.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/api/v1/namespaces/default/services" || isWatch(r) {
			return false
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		fmt.Fprintf(w, `{"kind":"List","metadata":{"resourceVersion":"%d"},"items":[]}`, k.version)
		return true
	})
	d := demand(t, c, DemandOptions{})
	d.Asked(netip.MustParseAddrPort("10.96.0.10:80"))
	eventually(t, "found", func() bool { return d.Stats().Found == 1 })
	d.waitFor()
	eventually(t, "dropped", func() bool { return d.Stats().Services == 0 })
}

// TestDemandOutage: a server that is away leaves what is in use, and what was
// asked for meanwhile is asked for again soon.
func TestDemandOutage(t *testing.T) {
	t.Parallel()
	k, c := clusterKube(t)
	k.web("10.0.0.1")
	k.put("services", "default", "db", "", strings.ReplaceAll(webSpec, "10.96.0.10", "10.96.0.11"))
	d := demand(t, c, DemandOptions{Failed: time.Millisecond})
	d.Asked(netip.MustParseAddrPort("10.96.0.10:80"))
	d.waitFor("default/web:80=10.96.0.10:80")
	k.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		status(w, http.StatusInternalServerError, "no")
		return true
	})
	k.CloseClientConnections()
	d.ask(2, "10.96.0.11:80")
	if s := d.Stats(); s.Failed != 1 || s.Services != 1 {
		t.Errorf("stats are %+v", s)
	}
	k.setIntercept(nil)
	eventually(t, "both", func() bool {
		d.Asked(netip.MustParseAddrPort("10.96.0.11:80"))
		return slices.Equal(d.list(), []string{"default/db:80=10.96.0.11:80", "default/web:80=10.96.0.10:80"})
	})
}

// TestDemandBounds: services in use have a bound, and so has the queue; the hot
// path neither blocks nor allocates.
func TestDemandBounds(t *testing.T) {
	k, c := clusterKube(t)
	for i := range 4 {
		k.put("services", "default", fmt.Sprintf("s%d", i), "", strings.ReplaceAll(webSpec, "10.96.0.10", fmt.Sprintf("10.96.0.%d", i+1)))
	}
	idle := c.Demand(DemandOptions{}) // nobody takes what it is told
	dst := netip.MustParseAddrPort("[2001:db8::1]:443")
	// Before there is anybody else who allocates.
	if n := testing.AllocsPerRun(100, func() { idle.Asked(dst) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
	d := demand(t, c, DemandOptions{MaxServices: 2})
	for i := range 4 {
		d.Asked(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, byte(i + 1)}), 80))
	}
	eventually(t, "two found, two dropped", func() bool { s := d.Stats(); return s.Found == 2 && s.Dropped == 2 })

	for i := range 2 * askedMax {
		idle.Asked(netip.AddrPortFrom(dst.Addr(), uint16(i+1)))
	}
	// The first is in the queue once for each second that this took.
	if s := idle.Stats(); s.Dropped == 0 || s.Asked != askedMax {
		t.Errorf("stats are %+v", s)
	}
}

// TestDemandRate: a burst is answered at once, and then so many in a second.
func TestDemandRate(t *testing.T) {
	s := &seeker{Demand: (&Client{}).Demand(DemandOptions{Within: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}), budget: 0.5}
	s.queue = []subject{{addr: netip.MustParseAddr("192.0.2.1")}}
	s.pending = map[subject][]uint16{s.queue[0]: {80}}
	if s.start(t.Context()) == nil || len(s.queue) != 1 || s.inFlight != 0 {
		t.Errorf("a look-up was started without a budget")
	}
}

func BenchmarkAsked(b *testing.B) {
	d := (&Client{}).Demand(DemandOptions{})
	dst := netip.MustParseAddrPort("10.96.0.10:80")
	for b.Loop() {
		d.Asked(dst)
	}
}
