package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// webService is where applications find the backends.
var webService = netip.MustParseAddrPort("10.96.0.12:80")

// backend is a server that says its name, and can die and return.
type backend struct {
	name string
	addr netip.AddrPort
	ln   net.Listener
	all  sync.WaitGroup
}

func newBackend(t testing.TB, r *rig.Rig, name string, addr netip.AddrPort) *backend {
	t.Helper()
	b := &backend{name: name, addr: addr}
	b.start(t, r)
	t.Cleanup(b.die)
	return b
}

func (b *backend) start(t testing.TB, r *rig.Rig) {
	t.Helper()
	b.ln = r.Listen(t, b.addr)
	b.all.Go(func() {
		for {
			c, err := b.ln.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, b.name)
			c.Close()
		}
	})
}

// die closes the listener, with those who wait in it.
func (b *backend) die() {
	b.ln.Close()
	b.all.Wait()
}

// backends starts three, one of them of IPv6.
func backends(t testing.TB, r *rig.Rig) []*backend {
	t.Helper()
	return []*backend{
		newBackend(t, r, "a", at4(8081)),
		newBackend(t, r, "b", at4(8082)),
		newBackend(t, r, "c", at6(8083)),
	}
}

// threeOf is a configuration of the service with these backends.
func threeOf(policy, more string, all []*backend, weights ...int) string {
	var endpoints []string
	for i, b := range all {
		weight := 1
		if i < len(weights) {
			weight = weights[i]
		}
		endpoints = append(endpoints, fmt.Sprintf("{address: %q, weight: %d}", b.addr, weight))
	}
	return fmt.Sprintf("services: [{name: web, address: %q, policy: %s, endpoints: [%s]}]\n%s", webService, policy, strings.Join(endpoints, ", "), more)
}

// requesting is an application that makes requests.
type requesting struct {
	lines *bufio.Scanner
	wait  func() error
	errs  rig.Log
}

func (s *stage) requests(t testing.TB, count, workers int, pause time.Duration) *requesting {
	t.Helper()
	cmd := goCommand(t, s.Rig, "requests", fmt.Sprint(count), fmt.Sprint(workers), pause.String(), webService.String())
	q := &requesting{}
	cmd.Stderr = &q.errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(cmd); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(appLimit, func() { cmd.Process.Kill() })
	var once sync.Once
	q.wait = func() (err error) {
		once.Do(func() {
			late.Stop()
			err = cmd.Wait()
		})
		return err
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		q.wait()
	})
	q.lines = bufio.NewScanner(out)
	return q
}

// next returns some more outcomes.
func (q *requesting) next(t testing.TB, n int) []request {
	t.Helper()
	some := make([]request, n)
	for i := range some {
		if !q.lines.Scan() {
			t.Fatalf("the application ended after %d of %d requests: %v\n%s", i, n, q.wait(), q.errs.String())
		}
		if err := json.Unmarshal(q.lines.Bytes(), &some[i]); err != nil {
			t.Fatal(err)
		}
	}
	return some
}

// answers counts who answered, and fails the test if a request failed.
func answers(t testing.TB, all []request) map[string]int {
	t.Helper()
	counts := map[string]int{}
	for _, q := range all {
		if q.Err != "" {
			t.Errorf("a request failed: %s", q.Err)
		}
		counts[q.Answer]++
	}
	return counts
}

// run makes requests and returns all outcomes.
func (s *stage) run(t testing.TB, count, workers int) []request {
	t.Helper()
	q := s.requests(t, count, workers, 0)
	all := q.next(t, count)
	if err := q.wait(); err != nil {
		t.Fatalf("%v\n%s", err, q.errs.String())
	}
	return all
}

// endpoint returns the state of a backend.
func (s *stage) endpoint(t testing.TB, b *backend) admin.EndpointStatus {
	t.Helper()
	status, err := s.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, service := range status.Services {
		for _, e := range service.Endpoints {
			if e.Address == b.addr.String() {
				return e
			}
		}
	}
	t.Fatalf("no endpoint %s in %+v", b.addr, status.Services)
	return admin.EndpointStatus{}
}

// TestSpread spreads requests over three backends, in either policy.
func TestSpread(t *testing.T) {
	t.Parallel()
	for policy, bounds := range map[string][2]int{"round_robin": {200, 200}, "least_connections": {130, 270}} {
		t.Run(policy, func(t *testing.T) {
			r := rig.New(t)
			all := backends(t, r)
			s := play(t, r, threeOf(policy, "", all))
			counts := answers(t, s.run(t, 600, 3))
			if n := s.AllRelayed(t, 600); n != 600 {
				t.Errorf("%d connections, want 600", n)
			}
			for _, b := range all {
				if n := counts[b.name]; n < bounds[0] || n > bounds[1] {
					t.Errorf("%s answered %d of 600, want %d to %d", b.name, n, bounds[0], bounds[1])
				}
				if e := s.endpoint(t, b); int(e.Connects) != counts[b.name] || e.Failures != 0 || e.Ejected || e.Live != 0 {
					t.Errorf("%s answered %d: %+v", b.name, counts[b.name], e)
				}
			}
			for _, rec := range s.Ended(t, 600) {
				if rec.OrigDst != webService || rec.Service != "web" || rec.Reason != flow.ReasonService || rec.Attempts != 1 || rec.End != flow.ReasonClosed {
					t.Fatalf("record %+v", rec)
				}
			}
		})
	}
}

// TestWeights gives one backend three times the weight of another.
func TestWeights(t *testing.T) {
	t.Parallel()
	for policy, slack := range map[string]int{"round_robin": 0, "least_connections": 75} { // six sigma
		t.Run(policy, func(t *testing.T) {
			r := rig.New(t)
			all := backends(t, r)[:2]
			s := play(t, r, threeOf(policy, "", all, 3, 1))
			const count = 800
			counts := answers(t, s.run(t, count, 1))
			if off := counts["a"] - count*3/4; off > slack || off < -slack || counts["a"]+counts["b"] != count {
				t.Errorf("answers %v of %d, want 3:1 (± %d)", counts, count, slack)
			}
			s.AllRelayed(t, count)
		})
	}
}

// TestBackendDies has one of three backends die in mid-run: no request fails but
// those that were in flight, and it is ejected; then it returns.
func TestBackendDies(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	all := backends(t, r)
	s := play(t, r, threeOf("round_robin", "health: {base: 300ms, max: 600ms}", all))
	const count, workers = 1500, 4
	q := s.requests(t, count, workers, 2*time.Millisecond)
	before := answers(t, q.next(t, 300))
	for _, b := range all {
		if before[b.name] == 0 {
			t.Errorf("%s answered none of %v", b.name, before)
		}
	}
	from := now()
	all[1].die()
	to := now()
	rest, failed := q.next(t, count-300), 0
	for _, q := range rest {
		inFlight := q.From < to && q.To > from
		switch {
		case q.Err != "" && !inFlight:
			t.Errorf("a request failed %v after the backend died: %s", time.Duration(q.From-to), q.Err)
		case q.Err != "":
			failed++
		case q.Answer == "b" && q.From > to:
			t.Error("the dead answers")
		}
	}
	if failed > workers {
		t.Errorf("%d requests in flight failed, there were at most %d", failed, workers)
	}
	if err := q.wait(); err != nil {
		t.Fatal(err)
	}
	if e := s.endpoint(t, all[1]); e.Failures < 3 || e.LastReason != flow.ReasonDialRefused {
		t.Errorf("the dead one: %+v", e)
	}
	sum := count

	// While it is out, hardly a dial meets it: most records have one attempt.
	testutil.Eventually(t, rig.Limit, func() bool {
		sum += 6
		for name := range answers(t, s.run(t, 6, 1)) {
			if name == "b" {
				t.Fatal("the dead answers")
			}
		}
		return s.endpoint(t, all[1]).Ejected
	}, "it is ejected")

	all[1].start(t, r)
	testutil.Eventually(t, rig.Limit, func() bool {
		sum += 6
		return answers(t, s.run(t, 6, 1))["b"] == 2 && !s.endpoint(t, all[1]).Ejected
	}, "it takes its share again")
	if n := s.AllRelayed(t, sum); n != sum {
		t.Errorf("%d connections, want %d", n, sum)
	}
}

// TestAllDead has no endpoint left: the application's connect is refused, and the
// record says why.
func TestAllDead(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	all := backends(t, r)
	s := play(t, r, threeOf("round_robin", "", all))
	for _, b := range all {
		b.die()
	}
	const count = 20
	for _, q := range s.run(t, count, 2) {
		if !strings.HasSuffix(q.Err, "connect: connection refused") {
			t.Errorf("answer %q, error %q, want ECONNREFUSED", q.Answer, q.Err)
		}
	}
	if n := s.AllRelayed(t, count); n != count {
		t.Errorf("%d connections, want %d", n, count)
	}
	for _, rec := range s.Ended(t, count) {
		if rec.End != flow.ReasonDialRefused || rec.OrigDst != webService || rec.Attempts != 3 {
			t.Errorf("record %+v", rec)
		}
	}
	// They return, and are served again.
	for _, b := range all {
		b.start(t, r)
	}
	testutil.Eventually(t, rig.Limit, func() bool {
		for _, q := range s.run(t, 3, 1) {
			if q.Err != "" {
				return false
			}
		}
		return true
	}, "requests are answered again")
}
