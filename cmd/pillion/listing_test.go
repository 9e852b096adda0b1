package main

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/cmd/pillion/handover"
	"github.com/pillion-project/pillion/redirect/upstream"
	"github.com/pillion-project/pillion/redirect/upstream/health/check"
)

func TestListing(t *testing.T) {
	l := listingOf([]service{sized("a", 1), sized("b", 2), sized("a", 3)})
	b := sized("b", 0)
	other := service{Service: config.Service{Name: "c", Addr: b.Addr}}
	renamed := service{Service: config.Service{Name: "a", Addr: b.Addr}}
	for name, tt := range map[string]struct {
		got  *service
		want int // endpoints; 0: nobody
	}{
		"by name":               {l.named("b"), 2},
		"the first of two":      {l.named("a"), 1},
		"by address":            {l.at(b.Addr), 2},
		"no name":               {l.named("c"), 0},
		"no address":            {l.at(netip.AddrPort{}), 0},
		"the name goes first":   {l.same(&renamed), 1},
		"else the address":      {l.same(&other), 2},
		"none":                  {l.same(&service{}), 0},
		"of none":               {(*listing)(nil).same(&b), 0},
		"of none by an address": {(*listing)(nil).at(b.Addr), 0},
	} {
		if tt.got == nil && tt.want == 0 || tt.got != nil && len(tt.got.endpoints) == tt.want && tt.want > 0 {
			continue
		}
		t.Errorf("%s: %+v, want the one with %d endpoints", name, tt.got, tt.want)
	}
}

// crowd is n services: a control that has them in force, and what comes next, in which
// each has one endpoint more.
func crowd(t *testing.T, n int) (c *control, next *config.Config) {
	t.Helper()
	addr := func(i, port int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), uint16(port))
	}
	conf := func(endpoints int) *config.Config {
		c := config.Default()
		for i := range n {
			s := config.NewService(fmt.Sprintf("service-%d", i), addr(i, 80))
			for e := range endpoints {
				s.Endpoints = append(s.Endpoints, config.Endpoint{Addr: addr(i, 8000+e), Weight: 1})
			}
			c.Services = append(c.Services, s)
		}
		return &c
	}
	i := &instance{plan: plan{config: conf(1), taking: &taking{}}}
	for n := range i.plan.config.Services {
		s := &i.plan.config.Services[n]
		i.taking.welcome.Services = append(i.taking.welcome.Services, handover.Service{Name: s.Name, Addr: s.Addr})
	}
	c = newControl(i)
	c.checker = check.New(check.Options{})
	c.services = listingOf(c.gather(i.plan.config))
	return c, conf(2)
}

// TestManyServices: what every change does, and status, takes eight times as long for
// eight times as many services. To look through all of them for each would take 64
// times as long; the time is that of the processor, and the line is drawn between.
func TestManyServices(t *testing.T) {
	const few, times, most = 1000, 8, 20
	works := map[string]func(c *control, next *config.Config){
		"diff": func(c *control, next *config.Config) {
			if d := next.Diff(c.config); len(d.Services) != len(next.Services) {
				t.Errorf("%d services differ", len(d.Services))
			}
		},
		"change": func(c *control, next *config.Config) {
			services := c.gather(next)
			if refused := bound(services, c.list(), bpf.Endpoints); len(refused) > 0 {
				t.Errorf("refused: %v", refused)
			}
			snapshot, err := upstream.Build(nil, specs(next, services), upstream.Options{Health: next.Health})
			if err != nil {
				t.Fatal(err)
			}
			c.arrange(services, snapshot)
			if _, err := tableOf(next, services); err != nil {
				t.Fatal(err)
			}
			c.removed(c.list(), services)
			c.removedBefore(c.list(), &note{})
		},
		"status": func(c *control, next *config.Config) {
			if n := len(c.serviceStatus()); n != len(next.Services) {
				t.Errorf("%d services", n)
			}
			said := saidBy(next)
			for i := range next.Services {
				s := &next.Services[i]
				_, told := c.i.taking.told(s)
				if c.listing().named(s.Name) == nil || c.listing().at(s.Addr) == nil || !said.lists(s.Name, s.Addr) || !told {
					t.Fatalf("service %s is not found", s.Name)
				}
			}
		},
	}
	took := map[string]map[int]time.Duration{}
	for _, n := range []int{few, few * times} {
		c, next := crowd(t, n)
		for name, f := range works {
			least := time.Hour
			for range 2 {
				least = min(least, ownTime(t, func() { f(c, next) }))
			}
			if took[name] == nil {
				took[name] = map[int]time.Duration{}
			}
			took[name][n] = least
		}
	}
	for name, took := range took {
		ratio := float64(took[few*times]) / float64(took[few])
		t.Logf("%s: %s for %d services, %s for %d: %.1f times", name, took[few], few, took[few*times], few*times, ratio)
		if ratio > most {
			t.Errorf("%s takes %.1f times as long for %d times as many services, want at most %d", name, ratio, times, most)
		}
	}
}

// ownTime is the processor time that a function takes, on one thread.
func ownTime(t *testing.T, f func()) time.Duration {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	now := func() time.Duration {
		var ts unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
			t.Fatal(err)
		}
		return time.Duration(ts.Nano())
	}
	runtime.GC() // what others left is not this one's
	before := now()
	f()
	return now() - before
}
