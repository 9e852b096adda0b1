package main

import (
	"context"
	"net/netip"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/cmd/pillion/handover"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/discover"
)

// sized is a service of n endpoints.
func sized(name string, n int) service {
	s := service{Service: config.Service{Name: name, Addr: netip.AddrPortFrom(netip.IPv6Loopback(), uint16(name[0]))}, path: flow.PathDirect, known: true}
	for port := range n {
		s.endpoints = append(s.endpoints, discover.Endpoint{Addr: netip.AddrPortFrom(netip.IPv6Loopback(), uint16(port+1))})
	}
	return s
}

// Services share the room for endpoints; who wants more than there is keeps what it
// has, and the others are not held up.
func TestBound(t *testing.T) {
	type sizes map[string]int
	moved, renamed := sized("a", 4), sized("b", 9)
	moved.Addr, renamed.former = sized("z", 0).Addr, "a"
	next := sized("b", 7)
	next.Addr = sized("a", 0).Addr
	for name, tt := range map[string]struct {
		before, now []service
		want        sizes
		unknown     string
	}{
		"room for all":      {nil, []service{sized("a", 4), sized("b", 6)}, sizes{"a": 4, "b": 6}, ""},
		"one grows":         {[]service{sized("a", 4), sized("b", 4)}, []service{sized("a", 9), sized("b", 5)}, sizes{"a": 4, "b": 5}, ""},
		"shrinks and grows": {[]service{sized("a", 8), sized("b", 2)}, []service{sized("a", 1), sized("b", 9)}, sizes{"a": 1, "b": 9}, ""},
		"renamed":           {[]service{sized("a", 4), sized("c", 2)}, []service{renamed, sized("c", 2)}, sizes{"b": 4, "c": 2}, ""},
		"another's place":   {[]service{sized("a", 4)}, []service{moved, next}, sizes{"a": 4, "b": 0}, "b"},
		"new":               {[]service{sized("a", 8)}, []service{sized("a", 8), sized("b", 3), sized("c", 2)}, sizes{"a": 8, "b": 0, "c": 2}, "b"},
	} {
		refused := bound(tt.now, tt.before, 10)
		got := sizes{}
		for _, s := range tt.now {
			got[s.Name] = len(s.endpoints)
			if s.known == (s.Name == tt.unknown) {
				t.Errorf("%s: %s is known: %v", name, s.Name, s.known)
			}
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: -want +got:\n%s", name, diff)
		}
		kept := 0
		for _, s := range tt.now {
			kept += len(s.endpoints)
		}
		if kept > 10 {
			t.Errorf("%s: %d endpoints", name, kept)
		}
		if (name != "room for all" && name != "shrinks and grows") != (len(refused) == 1) {
			t.Errorf("%s: refused: %v", name, refused)
		}
	}
}

// prompted is a source that tells what it is sent.
type prompted chan discover.Snapshot

func (p prompted) Run(ctx context.Context, out chan<- discover.Snapshot) error {
	for {
		select {
		case s := <-p:
			out <- s
		case <-ctx.Done():
			return nil
		}
	}
}

// TestLackingSet: until a source has told all once, what it cannot tell leaves what the
// service had, whoever said so.
func TestLackingSet(t *testing.T) {
	addr := netip.MustParseAddrPort("10.96.0.1:80")
	at := func(weight uint32, last ...byte) []discover.Endpoint {
		all := []discover.Endpoint{}
		for _, n := range last {
			all = append(all, discover.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, n}), 80), Weight: weight})
		}
		return all
	}
	given := func(endpoints []discover.Endpoint) []handover.Service {
		s := handover.Service{Name: "shop", Addr: addr}
		for _, e := range endpoints {
			s.Endpoints = append(s.Endpoints, handover.Endpoint{Addr: e.Addr, Weight: e.Weight})
		}
		return []handover.Service{s}
	}
	type step struct {
		name string
		do   func(c *control) // first, if there is anything
		told *discover.Snapshot
		want []discover.Endpoint
	}
	lacking := func(all []discover.Endpoint) *discover.Snapshot {
		return &discover.Snapshot{Endpoints: all, Lacks: discover.LackIPv4}
	}
	whole := func(all []discover.Endpoint) *discover.Snapshot { return &discover.Snapshot{Endpoints: all} }
	for name, steps := range map[string][]step{
		"nothing was": {
			{"a part", nil, lacking(at(1, 1)), at(1, 1)},
			{"another part", nil, lacking(at(1, 2)), at(1, 2)},
		},
		"an earlier source": {
			{"it has not told", func(c *control) {
				s := sized("shop", 0)
				s.Addr, s.endpoints = addr, at(1, 1, 2)
				c.services = listingOf([]service{s})
			}, nil, at(1, 1, 2)},
			{"a part", nil, lacking(at(5, 1, 3)), append(append(at(5, 1), at(1, 2)...), at(5, 3)...)},
			{"what it told is gone", nil, lacking(at(5, 1)), append(at(5, 1), at(1, 2)...)},
			{"also what was there before it told it", nil, lacking(at(5, 3)), append(at(1, 2), at(5, 3)...)},
			{"all", nil, whole(at(5, 1)), at(5, 1)},
		},
		"nobody": {
			{"it has not told", func(c *control) {
				s := sized("shop", 0)
				s.Addr, s.endpoints = addr, at(1, 1, 2)
				c.services = listingOf([]service{s})
			}, nil, at(1, 1, 2)},
			{"explicitly", nil, whole(at(1)), at(1)},
		},
		"a take-over": {
			{"what was said", func(c *control) { c.i.taking = &taking{}; c.i.taking.tells(given(at(1, 1, 2))) }, nil, at(1, 1, 2)},
			{"a part", nil, lacking(at(1, 1)), at(1, 1, 2)},
			{"what was said last", func(c *control) { c.i.taking.tells(given(at(1, 2, 3))) }, nil, at(1, 1, 2, 3)},
			{"it is settled", func(c *control) { c.i.taking.tells(nil) }, nil, at(1, 1, 2, 3)},
			{"another part", nil, lacking(at(1, 4)), at(1, 2, 3, 4)},
		},
		"a take-over, and then another one": {
			{"what was said", func(c *control) { c.i.taking = &taking{}; c.i.taking.tells(given(at(1, 1, 2))) }, nil, at(1, 1, 2)},
			{"a part", nil, lacking(at(1, 3)), at(1, 1, 2, 3)},
			{"another part, settled", func(c *control) { c.i.taking.tells(nil) }, lacking(at(1, 4)), at(1, 1, 2, 4)},
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			conf := config.Default()
			conf.Services = []config.Service{config.NewService("shop", addr)}
			conf.Services[0].Discover = &config.Discover{DNS: &config.DNS{}}
			c := newControl(&instance{plan: plan{config: &conf}})
			from := make(prompted)
			keeper := discover.NewKeeper(from, nil)
			c.sources.byName["shop"] = &source{keeper: keeper}
			ctx, stop := context.WithCancel(t.Context())
			ended := make(chan error)
			go func() { ended <- keeper.Run(ctx) }()
			for _, s := range steps {
				if s.do != nil {
					s.do(c)
				}
				if s.told != nil {
					from <- *s.told
					synctest.Wait()
				}
				services := c.gather(&conf)
				c.services = listingOf(services)
				equal := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
				if diff := cmp.Diff(s.want, services[0].endpoints, equal); diff != "" || !services[0].known {
					t.Errorf("%s, %s: known: %v (-want +got)\n%s", name, s.name, services[0].known, diff)
				}
			}
			stop()
			<-ended
		})
	}
}
