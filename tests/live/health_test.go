package live

import (
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// every is how often endpoints are checked here, and after how many results a
// state changes.
const every = "interval: 100ms, timeout: 1s, healthy: 2, unhealthy: 2"

// patients are endpoints 1 and 2 of which the health can be set.
type patients struct {
	check string // in YAML
	set   func(t testing.TB, n int, well bool)
}

// checks are the ways to check health.
var checks = map[string]func(t testing.TB, r *rig.Rig) patients{
	// The port of the endpoint itself is closed.
	"tcp": func(t testing.TB, r *rig.Rig) patients {
		all := serve(t, r, 1, 2)
		return patients{"{tcp: {}, " + every + "}", func(t testing.TB, n int, well bool) {
			if well {
				all[n].Start(t)
			} else {
				all[n].Refuse()
			}
		}}
	},
	// Another port answers for it.
	"http": func(t testing.TB, r *rig.Rig) patients {
		serve(t, r, 1, 2)
		var sick [3]atomic.Bool
		for n := 1; n < 3; n++ {
			r.ServeHTTP(t, netip.AddrPortFrom(far(n).Addr(), 9000), http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
				if q.URL.Path != "/healthz" || q.Host != "shop.test" || sick[n].Load() {
					w.WriteHeader(http.StatusServiceUnavailable)
				}
			}))
		}
		return patients{"{http: {path: /healthz, host: shop.test, status: [200-299]}, port: 9000, " + every + "}",
			func(_ testing.TB, n int, well bool) { sick[n].Store(!well) }}
	},
	// A file says so.
	"command": func(t testing.TB, r *rig.Rig) patients {
		testutil.Need(t, "sh")
		serve(t, r, 1, 2)
		dir := t.TempDir()
		return patients{fmt.Sprintf(`{command: [sh, -c, 'test ! -e "%s/$PILLION_ENDPOINT_ADDRESS"'], %s}`, dir, every),
			func(t testing.TB, n int, well bool) {
				file := filepath.Join(dir, far(n).Addr().String())
				if well {
					remove(t, file)
				} else if err := os.WriteFile(file, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}}
	},
}

// TestChecks has endpoints go down, all of them, and come back.
func TestChecks(t *testing.T) {
	t.Parallel()
	for kind, ward := range checks {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			for _, more := range []string{"path: direct", "path: relay, connect: mirror", "path: relay, connect: adaptive"} {
				t.Run(more, func(t *testing.T) {
					t.Parallel()
					checked(t, ward, more)
				})
			}
		})
	}
}

func checked(t *testing.T, ward func(testing.TB, *rig.Rig) patients, more string) {
	r := rig.New(t)
	p := ward(t, r)
	with := "services:\n" + service(1, more+", policy: random, no_endpoint: EHOSTUNREACH, health_check: "+p.check, 1, 2)
	s := newStage(t, r, with)
	s.goes(t, 1, 1, 2)
	if got := s.Open(t, "old", vip(1)); got == "" {
		t.Fatal("not connected")
	}

	p.set(t, 1, false)
	s.has(t, "s1", "1 down", "2")
	s.goes(t, 1, 2)
	testutil.Eventually(t, rig.Limit, func() bool {
		return !slices.ContainsFunc(s.service(t, "s1").Endpoints, func(e admin.EndpointStatus) bool {
			return e.ChecksPassed == 0 && !e.Down || e.ChecksFailed == 0 && e.Down || e.Down != (e.CheckError != "")
		})
	}, "all are checked, and one that is down says why")
	if got := s.metric(t, `pillion_endpoint_down{cluster="s1",endpoint="`+far(1).String()+`"}`); got != "1" {
		t.Errorf("the metric of what is down says %q", got)
	}

	p.set(t, 2, false)
	s.has(t, "s1", "1 down", "2 down")
	// The hook may go by what it was told for a moment.
	testutil.Eventually(t, rig.Limit, func() bool { return s.Dial(t, vip(1)) == "EHOSTUNREACH" }, "it is refused")
	for range 10 {
		if got := s.Dial(t, vip(1)); got != "EHOSTUNREACH" {
			t.Fatalf("all are down, and connect gives %q", got)
		}
	}
	if got := s.Talk(t, "old"); got != "" {
		t.Errorf("the connection that was open: %s", got)
	}

	p.set(t, 1, true)
	s.has(t, "s1", "1", "2 down")
	testutil.Eventually(t, rig.Limit, func() bool { return s.Dial(t, vip(1)) == far(1).String() }, "it serves again")
	s.goes(t, 1, 1)

	p.set(t, 2, true)
	s.has(t, "s1", "1", "2")
	s.goes(t, 1, 1, 2)
}

// TestCheckRemoved has a check that is taken away while endpoints are down: they
// count as up again. A check that comes back looks anew.
func TestCheckRemoved(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		p := checks["command"](t, r)
		without := "services:\n" + service(1, "path: "+path, 1, 2)
		with := "services:\n" + service(1, "path: "+path+", health_check: "+p.check, 1, 2)
		s := newStage(t, r, with)
		p.set(t, 1, false)
		p.set(t, 2, false)
		s.has(t, "s1", "1 down", "2 down")
		s.reload(t, without)
		s.has(t, "s1", "1", "2")
		testutil.Eventually(t, rig.Limit, func() bool { return s.Dial(t, vip(1)) != "ECONNREFUSED" }, "somebody serves")
		s.goes(t, 1, 1, 2)
		s.reload(t, with)
		s.has(t, "s1", "1 down", "2 down")

		// What is down stays so, whatever else changes: its name, its address,
		// its policy, its neighbours.
		p.set(t, 2, true)
		s.has(t, "s1", "1 down", "2")
		check := "path: " + path + ", health_check: " + p.check
		for _, text := range []string{
			service(1, check+", policy: random", 1, 2), service(1, check+", policy: maglev", 1, 2) + service(2, "", 1), service(1, check, 1, 2),
		} {
			s.reload(t, "services:\n"+text)
			s.goes(t, 1, 2)
		}
		moved := fmt.Sprintf("  - {name: s1, address: %q, endpoints: %s, %s}\n", vip(9), list(1, 2), check)
		s.reload(t, "services:\n"+moved)
		s.goes(t, 9, 2)
		s.reload(t, with)
		s.goes(t, 1, 2)
	})
}

// TestCheckFlaps removes and brings back a check while the state changes all the
// time: nothing may be down that nobody checks.
func TestCheckFlaps(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "sh", "od")
	r := rig.New(t)
	serve(t, r, 1)
	check := `, health_check: {command: [sh, -c, 'exit $(($(od -An -N1 -tu1 /dev/urandom) % 2))'], interval: 10ms, healthy: 1, unhealthy: 1}`
	with, without := "services:\n"+service(1, "path: direct"+check, 1), "services:\n"+service(1, "path: direct", 1)
	s := newStage(t, r, with)
	for range 30 {
		s.reload(t, without)
		s.goes(t, 1, 1)
		s.has(t, "s1", "1")
		s.reload(t, with)
	}
	s.reload(t, without)
	s.has(t, "s1", "1")
}

// TestHealthKept renames services, and has them change places: what checks have found goes
// with the service, and nothing of it stays where the service was.
func TestHealthKept(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		p := checks["command"](t, r)
		p.set(t, 2, false)
		of := func(name string, at int, more string) string {
			return fmt.Sprintf("  - {name: %s, address: %q, path: %s, policy: random, endpoints: %s%s}\n", name, vip(at), path, list(1, 2), more)
		}
		checked := ", health_check: " + p.check
		// Nobody looks again.
		seldom := strings.ReplaceAll(checked, "interval: 100ms", "interval: 1000h")
		s := newStage(t, r, "services:\n"+of("a", 1, checked)+of("b", 2, ""))
		s.has(t, "a", "1", "2 down")
		for _, tt := range []struct {
			services string
			to       map[int][]int
		}{
			{of("a", 1, seldom) + of("b", 2, ""), map[int][]int{1: {1}, 2: {1, 2}}},
			{of("c", 1, seldom) + of("b", 2, ""), map[int][]int{1: {1}, 2: {1, 2}}},    // another name
			{of("c", 2, seldom) + of("b", 1, ""), map[int][]int{1: {1, 2}, 2: {1}}},    // in each other's place
			{of("b", 2, seldom) + of("c", 1, ""), map[int][]int{1: {1, 2}, 2: {1, 2}}}, // and name
			{of("b", 1, "") + of("c", 2, checked), map[int][]int{1: {1, 2}}},
		} {
			s.reload(t, "services:\n"+tt.services)
			for n, want := range tt.to {
				s.goes(t, n, want...)
			}
		}
		s.has(t, "c", "1", "2 down")
		s.goes(t, 2, 1)
		s.reload(t, "services:\n"+of("d", 2, ""))
		s.goes(t, 2, 1, 2)
	})
}

// TestHealthAdopted: what checks have found outlives the process that did, in the hook
// and in the handler.
func TestHealthAdopted(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		p := checks["command"](t, r)
		p.set(t, 2, false)
		config := "services:\n" + service(1, "path: "+path+", policy: random, health_check: "+p.check, 1, 2)
		s := newStage(t, r, config)
		s.has(t, "s1", "1", "2 down")
		s.goes(t, 1, 1)     // what is known is being told,
		s.reload(t, config) // and it is
		s.Kill(t)
		// Nobody looks again.
		put(t, s.file, strings.ReplaceAll(config, "interval: 100ms", "interval: 1000h"))
		s.Launch(t)
		s.goes(t, 1, 1)
		s.has(t, "s1", "1", "2 down")
		s.goes(t, 1, 1)
	})
}
