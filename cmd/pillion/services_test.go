package main

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/cmd/pillion/config"
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
