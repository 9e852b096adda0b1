package e2e

import (
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// unroute takes the application's route to everything of IPv6 that is not its
// own link, but for what is said to stay, as on a host without IPv6.
func unroute(t testing.TB, r *rig.Rig) {
	t.Helper()
	for _, args := range [][]string{
		{"-6", "route", "del", "default"},
		{"-6", "route", "add", rig.Far6.String(), "via", testutil.WorldV6.Addr().String(), "dev", testutil.AppLink},
	} {
		cmd := r.Command("ip", args...)
		if err := r.App.Start(cmd); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Fatalf("ip %v: %v", args, err)
		}
	}
}

// relayedBut waits until some connections have ended and fails the test unless
// all were relayed but unrouted ones, which the kernel itself refused for want
// of a route.
func (s *stage) relayedBut(t testing.TB, relayed, unrouted int) {
	t.Helper()
	s.Idle(t)
	var got, none number
	testutil.Eventually(t, rig.Limit, func() bool {
		got, none = 0, 0
		for _, total := range s.Totals(t) {
			switch {
			case total.Path == flow.PathRelay:
				got += number(total.Count)
			default:
				t.Fatalf("%d connections took %s (%s, %s)", total.Count, total.Path, total.Reason, total.End)
			}
		}
		none = number(s.Reasons(t)[flow.ReasonNoRoute.String()])
		return int(got) >= relayed && int(none) >= unrouted
	}, "relayed: ", &got, " of ", relayed, ", without a route: ", &none, " of ", unrouted)
	if int(got) != relayed || int(none) != unrouted {
		t.Errorf("%d relayed and %d without a route, want %d and %d", got, none, relayed, unrouted)
	}
}

func TestNode(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "node")
	r := rig.New(t)
	r.ServeHTTP(t, at4(8080), webSite())
	s := play(t, r, "")
	same(t, "node", runApp(t, r, "", "node", "testdata/node_client.js"), `
http 50 of 50 over 5
big 50000000 `+sumOf(t, randomBytes(50000000)))
	// The big download takes one of the five connections again.
	if n := s.AllRelayed(t, 5); n != 5 {
		t.Errorf("%d connections, want 5", n)
	}
}
