package live

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// TestReloads reloads a thousand times under load, in all the ways there are. No
// connection to an endpoint that stays is closed, and no new one fails.
func TestReloads(t *testing.T) {
	t.Parallel()
	const warm, reloads = 30, 1000 // warm: so that everything has been there once
	const before = 1 + warm + 1
	r := rig.New(t)
	serve(t, r, 1, 2, 3, 4, 5)
	// What stays, in two families of change: what is in it, and what is beside it.
	config := func(n int) string {
		text := "services:\n"
		for i, path := range []string{"relay", "direct"} {
			more := "path: " + path
			switch n % 5 {
			case 1:
				more += ", policy: round_robin"
			case 2:
				more += ", health: {failures: 7}"
			case 3:
				more += ", no_endpoint: EHOSTUNREACH"
			default:
			}
			text += service(1+i, more, 1, 2, 3+n%3)
		}
		text += service(3+n%4, "path: relay", 1) + service(7+n%3, "path: direct", 2)
		if n%2 == 1 {
			text += "deny: [203.0.113.0/24]\nno_endpoint: ENETUNREACH\n"
		}
		return text
	}
	s := newStage(t, r, config(0))
	for n := range warm {
		s.reload(t, config(n+1))
	}
	s.NoLeaks(t)
	// Connections that are open go to 1 and 2 only: those stay.
	s.reload(t, "services:\n"+service(1, "path: relay", 1, 2)+service(2, "path: direct", 1, 2))
	s.load(t, 2, 20, vip(1), vip(2))
	for n := 1; n <= reloads; n++ {
		want := uint64(before + n)
		put(t, s.file, config(n))
		switch {
		case n%50 == 1: // the file alone
		case n%10 == 2:
			s.Signal(t, unix.SIGHUP)
		case n%100 == 3:
			out, err := s.Pillion(t, "reload", "--instance", s.Name)
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
		default:
			result, err := s.Instance.Reload(context.Background())
			if err != nil || len(result.Refused) > 0 || result.Generation != want {
				t.Fatalf("reload %d: %v, %+v", n, err, result)
			}
			continue
		}
		testutil.Eventually(t, rig.Limit, func() bool { return s.status(t).Configuration.Generation == want }, "generation ", want)
	}
	l := s.unload(t)
	if l.Rounds < 1000 || len(l.Names) != 5 {
		t.Errorf("the load was none: %d rounds, connects %v", l.Rounds, l.Names)
	}
	status := s.status(t)
	if g := status.Configuration.Generation; g != before+reloads || len(status.Configuration.Refused) != 0 {
		t.Errorf("generation %d, want %d; refused %v", g, before+reloads, status.Configuration.Refused)
	}
	s.has(t, "s1", "1", "2", fmt.Sprint(3+reloads%3))
	for name, want := range map[string]string{
		"pillion_config_generation":             fmt.Sprint(before + reloads),
		"pillion_config_last_reload_successful": "1",
		"pillion_config_reload_failures_total":  "0",
	} {
		if got := s.metric(t, name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
}

// TestRelayAgain has the only destination pass for a while, in which signs of life are
// rarer, and sends it to slots again: the next connect goes there.
func TestRelayAgain(t *testing.T) {
	t.Parallel()
	const rounds = 8
	r := rig.New(t)
	serve(t, r, 1)
	config := func(path string) string { return "default: pass\nservices:\n" + service(1, "path: "+path, 1) }
	s := newStage(t, r, config("direct"))
	rested, relayed, later := 0, 0, 0
	for n := range rounds {
		time.Sleep(600*time.Millisecond + time.Duration(n)*70*time.Millisecond) // at any time between two signs
		if s.status(t).State == admin.StateServing {
			rested++
		}
		s.reload(t, config("relay"))
		before := s.Reasons(t)[flow.ReasonService.String()]
		if got := s.Open(t, fmt.Sprint("c", n), vip(1)); got != far(1).String() {
			t.Fatal(got)
		}
		if s.Reasons(t)[flow.ReasonService.String()] > before {
			relayed++
		}
		// What said so at first may be over before the next sign.
		time.Sleep(450 * time.Millisecond)
		if got := s.Open(t, fmt.Sprint("d", n), vip(1)); got != far(1).String() {
			t.Fatal(got)
		}
		if s.Reasons(t)[flow.ReasonService.String()] > before+1 {
			later++
		}
		s.reload(t, config("direct"))
	}
	if min(rested, relayed, later) < rounds-1 { // once the machine may be too busy for heartbeats
		t.Errorf("of %d times it was serving at rest %d, and connections were relayed %d times at once and %d later", rounds, rested, relayed, later)
	}
}
