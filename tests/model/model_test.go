package model

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

var (
	flagSeed    = flag.Uint64("seed", 0, "seed of the first script, 0 for a random one; the others follow it")
	flagScripts = flag.Int("scripts", 4000, "how many scripts")
	flagLanes   = flag.Int("lanes", 32, "how many scripts at once")
	flagConnect = flag.String("connect", "early,mirror,adaptive", "modes of connect that the scripts are shared out to")
	flagPrint   = flag.Bool("print", false, "print every script and what comes of it")
)

// programs are what the test binary is besides a test, by its first argument.
var programs = map[string]func() error{argPeer: runPeer, argServer: runServer, argClient: runClient, argBrief: runBrief}

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		if run := programs[os.Args[1]]; run != nil {
			if err := run(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	testutil.Main(m)
}

// vip is the address of services.
func vip(six bool) netip.Addr {
	if six {
		return netip.MustParseAddr("2001:db8:99::1")
	}
	return netip.MustParseAddr("10.96.0.12")
}

// world is what scripts are played in.
type world struct {
	rig              *rig.Rig
	direct, redirect *road
	instance         *rig.Instance
	ports            [2][]uint16 // by family and lane
	connect          string
	played           atomic.Int64
	shrinking        atomic.Bool
}

func newWorld(t *testing.T, lanes int, connect string) *world {
	t.Helper()
	r := rig.New(t)
	r.Give(t, rig.Far4)
	r.Give(t, rig.Far6)
	// A service's own address leads to its endpoint also past Pillion.
	r.Give(t, vip(false))
	r.Give(t, vip(true))
	w := &world{rig: r, connect: connect}
	far := startPeer(t, testutil.Place{NS: r.World}, lanes)
	for lane := range lanes {
		for f := range w.ports {
			o := order{Lane: lane, Op: op{Kind: opListen}, Six: f == 1, To: w.listener(lane, f == 1)}
			if err := far.order(&o); err != nil {
				t.Fatal(err)
			}
			a := far.answer(lane)
			if a.ReadError != 0 || a.Trouble != "" {
				t.Fatalf("listen: %v %s", a.ReadError, a.Trouble)
			}
			w.ports[f] = append(w.ports[f], uint16(a.Port))
		}
	}
	w.direct = &road{server: far, to: w.endpoint, at: w.listener}
	w.direct.client = startPeer(t, testutil.Place{NS: r.App}, lanes)
	w.redirect = &road{server: far, to: w.asked, at: w.listener}
	w.redirect.client = startPeer(t, testutil.Place{NS: r.App, Cgroup: r.Scope}, lanes)
	var services strings.Builder
	for lane := range lanes {
		for _, six := range []bool{false, true} {
			if to := w.asked(lane, six); to != w.endpoint(lane, six) {
				fmt.Fprintf(&services, "  - {address: %q, endpoints: [%q]}\n", to, w.endpoint(lane, six))
			}
		}
	}
	w.instance = r.Run(t, "connect: "+connect+"\nservices:\n"+services.String())
	return w
}

// listener is what a lane's server binds: a free port at first.
func (w *world) listener(lane int, six bool) netip.AddrPort {
	addr, ports := netip.IPv4Unspecified(), w.ports[0]
	if six {
		addr, ports = netip.IPv6Unspecified(), w.ports[1]
	}
	if lane < len(ports) {
		return netip.AddrPortFrom(addr, ports[lane])
	}
	return netip.AddrPortFrom(addr, 0)
}

// endpoint is where a lane's server is reached.
func (w *world) endpoint(lane int, six bool) netip.AddrPort {
	if six {
		return netip.AddrPortFrom(rig.Far6, w.ports[1][lane])
	}
	return netip.AddrPortFrom(rig.Far4, w.ports[0][lane])
}

// asked is what the client of a lane dials when it is redirected: every other
// lane a service, and else the server itself.
func (w *world) asked(lane int, six bool) netip.AddrPort {
	to := w.endpoint(lane, six)
	if lane%2 == 1 {
		to = netip.AddrPortFrom(vip(six), to.Port())
	}
	return to
}

// TestScripts plays random scripts, each twice directly and once redirected.
func TestScripts(t *testing.T) {
	seed := *flagSeed
	if seed == 0 {
		seed = rand.Uint64N(1 << 40)
	}
	t.Logf("replay with -seed %d -scripts %d", seed, *flagScripts)
	modes := strings.Split(*flagConnect, ",")
	for i, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			from, to := *flagScripts*i/len(modes), *flagScripts*(i+1)/len(modes)
			playAll(t, seed+uint64(from), to-from, mode)
		})
	}
}

// playAll plays n scripts, whose seeds follow each other.
func playAll(t *testing.T, seed uint64, n int, connect string) {
	lanes := min(*flagLanes, n)
	w := newWorld(t, lanes, connect)
	var next atomic.Int64
	var all sync.WaitGroup
	for lane := range lanes {
		all.Go(func() {
			for {
				i := next.Add(1) - 1
				if i >= int64(n) || t.Failed() {
					return
				}
				w.play(t, generate(seed+uint64(i), connect == "mirror"), lane)
			}
		})
	}
	all.Wait()
	if t.Failed() {
		return // half-way, some connections were never made
	}
	relayed(t, w.instance, int(w.played.Load()))
}

// relayed fails the test unless so many connections have ended, and nearly all
// were relayed: on a busy machine the handler may be late once, and then
// connections are passed by. It returns how many.
func relayed(t *testing.T, i *rig.Instance, want int) (passed int) {
	t.Helper()
	i.Idle(t)
	sum := 0
	testutil.Eventually(t, rig.Limit, func() bool {
		sum, passed = 0, 0
		for _, total := range i.Totals(t) {
			sum += total.Count
			if total.Path != flow.PathRelay {
				passed += total.Count
			}
		}
		return sum >= want
	}, "ended connections: want ", want)
	if sum != want {
		t.Errorf("%d connections ended, want %d: %+v", sum, want, i.Totals(t))
	}
	if passed > want/100 {
		t.Errorf("%d of %d connections were not relayed: %+v", passed, want, i.Totals(t))
	} else if passed > 0 {
		t.Logf("%d of %d connections were not relayed", passed, want)
	}
	return passed
}

// play plays a script on both roads, and fails the test unless they agree.
func (w *world) play(t *testing.T, s *script, lane int) {
	c := w.compare(s, lane)
	if *flagPrint {
		t.Logf("%v\n%s", s, strings.Join(c.redirected, "\n"))
	}
	switch {
	case c.undecided != "":
		t.Errorf("direct runs differ, which is a mistake of the generator's: %s\n%v\n%s", c.undecided, s, strings.Join(c.direct, "\n"))
	case c.difference != "":
		t.Errorf("redirected it is not the same (-seed %d -scripts 1 -connect %s):\n    %s\n%v\ndirect:\n%s", s.Seed, w.connect, c.difference, s, strings.Join(c.direct, "\n"))
		if w.shrinking.CompareAndSwap(false, true) { // one is enough
			less := shrink(s, func(less *script) bool {
				for range 3 { // by chance it may fail once
					c := w.compare(less, lane)
					if c.undecided != "" || c.difference == "" {
						return false
					}
				}
				return true
			})
			t.Logf("smaller:\n%v\n    %s", less, w.compare(less, lane).difference)
		}
	}
}

// comparison is what two direct runs and a redirected one have given.
type comparison struct {
	direct, redirected []string
	undecided          string // what the direct runs do not agree on
	difference         string // of the redirected one
}

func (w *world) compare(s *script, lane int) (c comparison) {
	var trouble string
	c.direct, trouble = w.direct.run(s, lane)
	if trouble != "" {
		c.undecided = trouble
		return c
	}
	second, trouble := w.direct.run(s, lane)
	if c.undecided = differ(c.direct, second) + trouble; c.undecided != "" {
		return c
	}
	w.played.Add(int64(s.connects()))
	c.redirected, trouble = w.redirect.run(s, lane)
	c.difference = differ(c.direct, c.redirected) + trouble
	return c
}
