package main

import (
	"errors"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-project/pillion/loader"
)

// TestInForce: rules are in force although there is no room for some sets, which is
// tried again after a while; any other error leaves the last rules.
func TestInForce(t *testing.T) {
	i := &instance{plan: plan{log: slog.New(slog.DiscardHandler)}}
	c := &control{i: i}
	addr := netip.MustParseAddrPort("10.96.0.1:80")
	short := &loader.RoomError{Services: map[netip.AddrPort]error{addr: loader.ErrTooManySets}}
	broken := errors.New("broken")
	for n, tt := range []struct {
		err, want error
		lacking   bool
		workers   int // of the rules that hold
	}{
		{nil, nil, false, 1},
		{short, nil, true, 2},
		{short, nil, true, 3},
		{broken, broken, true, 3},
		{nil, nil, false, 5},
		{broken, broken, false, 5},
	} {
		lacking, err := i.inForce(loader.Rules{Workers: n + 1}, tt.err)
		if !errors.Is(err, tt.want) || (len(lacking) > 0) != (tt.err == short) || i.lacking != tt.lacking || i.lastRules.Workers != tt.workers {
			t.Errorf("%d: %v: lacking %v, %v, rules %d; want %+v", n, err, lacking, i.lacking, i.lastRules.Workers, tt)
		}
		c.short, c.again = i.lacking, time.Now().Add(-time.Second)
		if c.failing() != tt.lacking {
			t.Errorf("%d: it is tried again: %v", n, c.failing())
		}
		c.again = time.Now().Add(time.Hour)
		if c.failing() {
			t.Errorf("%d: it is tried again at once", n)
		}
	}
}
