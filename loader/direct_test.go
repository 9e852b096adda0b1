package loader

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// direct makes an instance with a service on direct to endpoints of the world, all
// of which listen.
func (p *place) direct(t testing.TB, service netip.AddrPort, endpoints ...netip.AddrPort) (*Datapath, []<-chan net.Conn) {
	t.Helper()
	d := p.create(t, "one")
	t.Cleanup(func() { p.unload(t, d) })
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{service: setOf(endpoints...)}))
	p.attach(t, d)
	var all []<-chan net.Conn
	for _, e := range endpoints {
		all = append(all, serve(t, p.World, e))
	}
	return d, all
}

// stateOf is the state of one endpoint of a service.
func stateOf(t testing.TB, d *Datapath, service, endpoint netip.AddrPort) EndpointState {
	t.Helper()
	states, err := d.EndpointStates(service)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range states {
		if s.Addr == endpoint {
			return s
		}
	}
	t.Fatalf("%s is not among %+v", endpoint, states)
	return EndpointState{}
}

// TestConnectionsDirect: an open connection on direct is listed with what was asked
// for and what was picked, and ended by endpoint; no other one is.
func TestConnectionsDirect(t *testing.T) {
	for _, family := range []struct {
		service netip.AddrPort
		world   netip.Addr
	}{{shop, testutil.WorldV4.Addr()}, {shop6, testutil.WorldV6.Addr()}} {
		t.Run(family.service.String(), func(t *testing.T) {
			p := newPlace(t)
			one, two := netip.AddrPortFrom(family.world, 8001), netip.AddrPortFrom(family.world, 8002)
			d, conns := p.direct(t, family.service, one, two)
			// Straight to an endpoint, which is not Pillion's doing.
			straight, err := p.open(t, one)
			if err != nil {
				t.Fatal(err)
			}
			defer straight.Close()
			straightPeer := <-conns[0]
			defer straightPeer.Close()
			open := map[uint64]net.Conn{} // by cookie
			for range 100 {
				c, err := p.open(t, family.service)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if c.RemoteAddr().(*net.TCPAddr).AddrPort() != family.service {
					t.Errorf("the application sees %s", c.RemoteAddr())
				}
				open[cookieOf(t, fdOf(t, c))] = c
				if len(conns[0]) > 0 && len(conns[1]) > 0 {
					break
				}
			}
			to := map[netip.AddrPort]int{}
			for _, r := range connections(t, d) {
				if r.Path != flow.PathDirect {
					continue
				}
				if c := open[r.Cookie]; c == nil || r.Source != c.LocalAddr().(*net.TCPAddr).AddrPort() || r.OrigDst != family.service || r.Reason != flow.ReasonService {
					t.Errorf("%+v", r)
				}
				to[r.Endpoint]++
			}
			if to[one]+to[two] != len(open) || to[one] == 0 || to[two] == 0 {
				t.Fatalf("%d connections are to %v", len(open), to)
			}
			if n := stateOf(t, d, family.service, one).Live; n != to[one] {
				t.Errorf("%d are counted, %d open", n, to[one])
			}
			// Also when the endpoint is removed, and the service.
			setRules(t, d, plain)
			if n, err := d.End(family.service, one); err != nil || n != to[one] {
				t.Errorf("ended %d: %v; want %d", n, err, to[one])
			}
			ended := 0
			for _, c := range open {
				c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
				if _, err := c.Read(make([]byte, 1)); errors.Is(err, unix.ECONNABORTED) {
					ended++
				}
			}
			if ended != to[one] {
				t.Errorf("%d applications know, want %d", ended, to[one])
			}
			peer := <-conns[0]
			peer.SetReadDeadline(time.Now().Add(patience))
			if _, err := peer.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the endpoint sees %v", err)
			}
			peer.Close()
			exchange(t, straight, straightPeer, 1, 1)
			testutil.Eventually(t, patience, func() bool {
				return stateOf(t, d, family.service, one).Live == 0
			}, "nobody is counted there")
			if n, err := d.End(family.service, one); err != nil || n != 0 {
				t.Errorf("ended %d again: %v", n, err)
			}
		})
	}
}

// TestRecount: a count that is wrong is mended, but not at the first look, and also
// where connections come and go.
func TestRecount(t *testing.T) {
	p := newPlace(t)
	at := netip.AddrPortFrom(testutil.WorldV4.Addr(), 8001)
	d, conns := p.direct(t, shop, at)
	index := publishedOf(t, d, shop)[at]
	e := d.sets.table.at(index)
	recount := func() {
		t.Helper()
		if err := d.recount(); err != nil {
			t.Fatal(err)
		}
	}
	live := func(want uint32) {
		t.Helper()
		if got := e.live().Load(); got != want {
			t.Fatalf("live is %d, want %d", got, want)
		}
	}
	var open []net.Conn
	dial := func() {
		t.Helper()
		c, err := p.open(t, shop)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		open = append(open, c, <-conns[0])
	}
	dial()
	dial()
	live(2)
	recount()
	recount()
	live(2)
	for _, wrong := range []uint32{3, ^uint32(0)} {
		e.live().Add(wrong)
		recount()
		live(2 + wrong)
		// It is wrong in another way.
		e.live().Add(wrong)
		recount()
		live(2 + 2*wrong)
		// Who comes and goes changes nothing about that.
		dial()
		live(3 + 2*wrong)
		recount()
		live(3)
		recount()
		live(3)
		open[0].Close()
		open[1].Close()
		open = open[2:]
		testutil.Eventually(t, patience, func() bool { return e.live().Load() == 2 }, "it is not counted any more")
	}
	if n := stats(t, d).Mended; n != 2 {
		t.Errorf("mended %d", n)
	}
}

// TestRecountBusy: the counts of an endpoint that is busy are left alone.
func TestRecountBusy(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	at := netip.MustParseAddrPort("127.0.0.9:8001")
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: setOf(at)}))
	p.attach(t, d)
	stop := greet(t, p.App, []netip.AddrPort{at})
	defer stop()
	connects := 1500
	if testutil.InVM() {
		connects = 100
	}
	var busy sync.WaitGroup
	var done atomic.Bool
	var failed atomic.Value
	p.inScope(t, func() {
		for range 4 {
			busy.Go(func() {
				err := p.App.Run(func() error {
					for range connects {
						if _, err := greeted(shop); err != nil {
							return err
						}
					}
					return nil
				})
				if err != nil {
					failed.Store(err)
				}
			})
		}
		go func() { busy.Wait(); done.Store(true) }()
		for !done.Load() {
			if err := d.recount(); err != nil {
				t.Fatal(err)
			}
		}
		busy.Wait()
	})
	if err := failed.Load(); err != nil {
		t.Fatal(err)
	}
	if n := stats(t, d).Mended; n != 0 {
		t.Errorf("mended %d", n)
	}
	testutil.Eventually(t, patience, func() bool { return stateOf(t, d, shop, at).Live == 0 }, "nobody is counted")
	if s := stateOf(t, d, shop, at); s.Connects != uint64(4*connects) || s.Failed != 0 {
		t.Errorf("%+v", s)
	}
}

// greet listens at addresses of a namespace, says to everybody that comes at which
// of them it was, and waits for the end. stop ends it.
func greet(t testing.TB, ns *testutil.NS, at []netip.AddrPort) (stop func()) {
	t.Helper()
	var served sync.WaitGroup
	var all []net.Listener
	ns.Do(t, func() error {
		for i, a := range at {
			var c net.ListenConfig
			c.SetMultipathTCP(false)
			l, err := c.Listen(t.Context(), "tcp", a.String())
			if err != nil {
				return err
			}
			all = append(all, l)
			served.Go(func() { greetAll(l, byte(i)) })
		}
		return nil
	})
	return func() {
		for _, l := range all {
			l.Close()
		}
		served.Wait()
	}
}

func greetAll(l net.Listener, who byte) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		// The other side ends it by a reset, so that no port is used up.
		c.Write([]byte{who})
		c.Read(make([]byte, 1))
		c.Close()
	}
}

// greeted connects, and returns who is there.
func greeted(to netip.AddrPort) (int, error) {
	family := unix.AF_INET6
	sa := unix.Sockaddr(&unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())})
	if to.Addr().Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return 0, err
	}
	for {
		err := unix.Connect(fd, sa)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			return 0, fmt.Errorf("connect: %w", err)
		}
	}
	var b [1]byte
	for {
		n, err := unix.Read(fd, b[:])
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, fmt.Errorf("read: %w", err)
		case n == 0:
			return 0, io.EOF
		default:
			return int(b[0]), nil
		}
	}
}

// TestSwaps replaces the sets of four services all the time while connections to them
// are made: a hundred times a second, as far as the machine can. None goes to an
// endpoint that is neither in the set of the moment nor in its neighbours. The kernel
// waits for RCU, some 8 ms and more where much runs, once for all four.
func TestSwaps(t *testing.T) {
	const (
		total, perSet, pool = 20_000, 3, 60
		every               = 10 * time.Millisecond
		services            = 4
	)
	connects := total
	if testutil.InVM() {
		connects = total / 20
	}
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	var at []netip.AddrPort
	for i := range pool {
		at = append(at, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 1, byte(i + 1)}), 8001))
	}
	shopAt := func(i int) netip.AddrPort { return netip.AddrPortFrom(shop.Addr(), shop.Port()+uint16(i)) }
	set := func(n int) map[netip.AddrPort]*flow.Set {
		first := n * perSet % pool
		sets := map[netip.AddrPort]*flow.Set{}
		for i := range services {
			sets[shopAt(i)] = setOf(at[first : first+perSet]...)
		}
		return sets
	}
	setRules(t, d, withServices(set(0)))
	p.attach(t, d)
	stop := greet(t, p.App, at)
	defer stop()
	// Sets up to begun may be in force, those before done may not.
	var begun, done, bad, left atomic.Int64
	left.Store(int64(connects))
	var apps sync.WaitGroup
	var failed atomic.Value
	app := func() error {
		for n := left.Add(-1); n >= 0; n = left.Add(-1) {
			oldest := done.Load()
			who, err := greeted(shopAt(int(n) % services))
			if err != nil {
				return err
			}
			newest := begun.Load()
			ok := newest-oldest >= pool/perSet
			for n := oldest; n <= newest && !ok; n++ {
				ok = int(n)%(pool/perSet) == who/perSet
			}
			if !ok {
				bad.Add(1)
				failed.Store(fmt.Errorf("endpoint %d, while sets %d to %d were in force", who, oldest, newest))
			}
		}
		return nil
	}
	p.inScope(t, func() {
		for range 4 {
			apps.Go(func() {
				if err := p.App.Run(app); err != nil {
					failed.Store(err)
					left.Store(0)
				}
			})
		}
		start := time.Now()
		for n := 1; left.Load() > 0; n++ {
			// What took longer is made up for.
			time.Sleep(time.Until(start.Add(time.Duration(n) * every)))
			begun.Store(int64(n))
			if err := d.SetEndpoints(set(n)); err != nil {
				t.Error(err)
				left.Store(0)
			}
			done.Store(int64(n))
		}
		took := time.Since(start)
		apps.Wait()
		t.Logf("%d times %d sets in %v: each %.0f times a second", done.Load(), services, took.Round(time.Millisecond), float64(done.Load())/took.Seconds())
	})
	if err := failed.Load(); err != nil {
		t.Errorf("%d were wrong: %v", bad.Load(), err)
	}
	s := stats(t, d)
	if got := int(s.Reasons[flow.ReasonService]); got != connects {
		t.Errorf("%d connects were on direct, want %d", got, connects)
	}
	answered := uint64(0)
	testutil.Eventually(t, patience, func() bool {
		live := 0
		answered = 0
		for i := range services {
			states, err := d.EndpointStates(shopAt(i))
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range states {
				live += s.Live
				answered += s.Connects
			}
		}
		return live == 0
	}, "nobody is counted")
	if answered != uint64(connects) {
		t.Errorf("%d were answered, want %d", answered, connects)
	}
}

// TestDryRun: what the connect hook says it would do.
func TestDryRun(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	at := netip.AddrPortFrom(testutil.WorldV4.Addr(), 8001)
	relayed := netip.MustParseAddrPort("198.51.100.81:80")
	rules := withServices(map[netip.AddrPort]*flow.Set{shop: setOf(at)})
	rules.Services = append(rules.Services, Service{Addr: relayed, Set: setOf(at)})
	denied, excluded := netip.MustParseAddrPort("198.51.100.2:25"), netip.MustParseAddrPort("203.0.113.1:80")
	rules.Deny = []Rule{{Prefix: netip.MustParsePrefix("10.0.0.0/8")}, {Prefix: netip.MustParsePrefix("198.51.100.0/24"), Port: 25}}
	rules.Exclude = []Rule{{Prefix: netip.MustParsePrefix("203.0.113.0/24")}}
	setRules(t, d, rules)
	p.attach(t, d)
	p.handler(t, d)
	for dst, want := range map[netip.AddrPort]Verdict{
		shop:     {Path: flow.PathDirect, Reason: flow.ReasonService, Rule: -1, Service: shop, Endpoint: at},
		relayed:  {Path: flow.PathRelay, Reason: flow.ReasonService, Rule: -1, Service: relayed, Endpoint: at},
		denied:   {Path: flow.PathDeny, Reason: flow.ReasonDenied, Rule: 1, Errno: unix.ECONNREFUSED},
		excluded: {Path: flow.PathPass, Reason: flow.ReasonExcluded},
		far:      {Path: flow.PathRelay, Reason: flow.ReasonDefault, Rule: -1},
	} {
		var got Verdict
		// A test run is in the namespace of the thread.
		p.App.Do(t, func() (err error) { got, err = d.DryRun(netip.Addr{}, dst); return err })
		if got != want {
			t.Errorf("%s: %+v, want %+v", dst, got, want)
		}
	}
	if s := stats(t, d); s.Decided != 0 || s.Reasons[flow.ReasonService] != 0 || s.Named != 0 {
		t.Errorf("it counted: %+v", s)
	}
	if err := d.SetDown(shop, at, true); err != nil {
		t.Fatal(err)
	}
	if got, err := d.DryRun(netip.Addr{}, shop); err != nil || got.Path != flow.PathDeny || got.Reason != flow.ReasonNoEndpoint || got.Endpoint.IsValid() || got.Errno == 0 {
		t.Errorf("all are down: %+v, %v", got, err)
	}
}

// TestAdoptDirect: while no process is there, and when another has come, connections
// stay open, picks go on, and counts are right.
func TestAdoptDirect(t *testing.T) {
	p := newPlace(t)
	one, two := netip.AddrPortFrom(testutil.WorldV4.Addr(), 8001), netip.AddrPortFrom(testutil.WorldV4.Addr(), 8002)
	d := p.create(t, "one")
	defer func() { p.unload(t, d) }()
	sets := map[netip.AddrPort]*flow.Set{shop: setOf(one)}
	setRules(t, d, withServices(sets))
	p.attach(t, d)
	conns := serve(t, p.World, one)
	var open []net.Conn
	dial := func() {
		t.Helper()
		c, err := p.open(t, shop)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		open = append(open, c, <-conns)
	}
	live := func(when string, addr netip.AddrPort, want int) {
		t.Helper()
		testutil.Eventually(t, patience, func() bool { return stateOf(t, d, shop, addr).Live == want },
			fmt.Sprintf("%s: %d are counted", when, want))
	}
	dial()
	dial()
	before := stateOf(t, d, shop, one)
	index := publishedOf(t, d, shop)[one]
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	// Nobody is there: one comes, one goes.
	dial()
	open[0].Close()
	if err := p.do(t, "one", func(o Options) (err error) { d, err = Open(o); return err }); err != nil {
		t.Fatal(err)
	}
	dial()
	live("opened", one, 3)
	if s := stateOf(t, d, shop, one); s.Connects != before.Connects+2 || !s.InSet {
		t.Errorf("%+v, before %+v", s, before)
	}
	// The endpoint is no more in the configuration that the new process has.
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: setOf(two)}))
	p.attach(t, d)
	for range 3 {
		if err := d.recount(); err != nil {
			t.Fatal(err)
		}
	}
	live("published", one, 3)
	for i := 2; i < len(open); i += 2 {
		exchange(t, open[i], open[i+1], 10, 10)
	}
	if all := connections(t, d); len(all) != 3 {
		t.Errorf("connections: %+v", all)
	}
	d.sets.grace = 0
	forget(t, d)
	if n, err := d.End(shop, one); err != nil || n != 3 {
		t.Errorf("ended %d: %v", n, err)
	}
	live("ended", one, 0)
	forget(t, d)
	if len(d.sets.table.free) != 1 || d.sets.table.free[0] != index {
		t.Errorf("free: %v, want %d", d.sets.table.free, index)
	}
	if n := stats(t, d).Mended; n != 0 {
		t.Errorf("mended %d", n)
	}
}

// TestConnectionsMPTCP: an MPTCP socket is known by its first subflow, and ended by
// it.
func TestConnectionsMPTCP(t *testing.T) {
	p := newPlace(t)
	at := netip.AddrPortFrom(testutil.WorldV4.Addr(), 8001)
	d, conns := p.direct(t, shop, at)
	c, err := p.open(t, shop, func(d *net.Dialer) { d.SetMultipathTCP(true) })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	peer := <-conns[0]
	defer peer.Close()
	exchange(t, c, peer, 10, 10)
	all := connections(t, d)
	if len(all) != 1 || all[0].Endpoint != at || all[0].OrigDst != shop {
		t.Fatalf("connections: %+v", all)
	}
	if n, err := d.End(shop, at); err != nil || n != 1 {
		t.Errorf("ended %d: %v", n, err)
	}
	c.SetReadDeadline(time.Now().Add(patience))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the application sees %v", err)
	}
}

// dryPick is what a dry run of the connect hook picks for a service.
func dryPick(t testing.TB, d *Datapath, service netip.AddrPort) (netip.AddrPort, uint32) {
	t.Helper()
	v, err := d.dryRun(bpf.DryRun{Dst: bpf.FromAddr(service.Addr()), Port: service.Port()})
	if err != nil {
		t.Fatal(err)
	}
	return netip.AddrPortFrom(bpf.ToAddr(v.Endpoint), v.EndpointPort), v.Id
}
