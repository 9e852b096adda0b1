package upgrade

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

var (
	vip  = netip.MustParseAddrPort("10.96.0.1:80")
	ends = []netip.AddrPort{
		netip.MustParseAddrPort("198.51.100.1:8080"), netip.MustParseAddrPort("198.51.100.2:8080"),
		netip.MustParseAddrPort("198.51.100.3:8080"),
	}
)

// builds returns two builds that differ in their versions.
func builds(t testing.TB) [2]string {
	t.Helper()
	var all [2]string
	for i, version := range []string{"v1.0.0-test", "v1.1.0-test"} {
		all[i] = filepath.Join(t.TempDir(), "pillion")
		cmd := exec.Command("go", "build", "-ldflags=-X main.version="+version, "-o", all[i], "github.com/pillion-project/pillion/cmd/pillion")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build: %v\n%s", err, out)
		}
	}
	return all
}

// stage is an instance whose flows are logged, with servers and an application.
type stage struct {
	*rig.Rig
	*rig.Instance
	*app
	far *far
	log string // of flows
	dir string
}

func newStage(t *testing.T, more string, q task) *stage {
	t.Helper()
	s := &stage{Rig: rig.New(t), far: newFar(), dir: t.TempDir()}
	for _, e := range ends {
		s.Serve(t, e, s.far.serve)
	}
	t.Cleanup(s.far.finish)
	s.log = filepath.Join(s.dir, "flows")
	s.Instance = s.Run(t, fmt.Sprintf("flow_log: %s\n%s", s.log, more))
	q.To = vip
	s.app = newApp(t, s.Rig, q)
	return s
}

// finish ends the connections, and wants every byte where it was to go, and a record
// of each connection.
func (s *stage) finish(t *testing.T, q task) outcome {
	t.Helper()
	s.far.finish()
	o := s.end(t)
	if len(o.Conns) != q.Conns {
		t.Errorf("%d connections have ended, want %d", len(o.Conns), q.Conns)
	}
	testutil.Eventually(t, rig.Limit, func() bool {
		s.far.mu.Lock()
		defer s.far.mu.Unlock()
		return len(s.far.counts) >= len(o.Conns)+o.New
	}, "the server has seen the end of every connection")
	s.far.mu.Lock()
	defer s.far.mu.Unlock()
	for _, err := range s.far.errs {
		t.Error(err)
	}
	for id, c := range o.Conns {
		if got := s.far.counts[id]; got != c.counts {
			t.Errorf("connection %d (%c): the server counts %+v, the application %+v", id, c.Kind, got, c.counts)
		}
	}
	s.Conserved(t)
	s.recorded(t, o, q)
	return o
}

// recorded wants one record of each connection in the flow log.
func (s *stage) recorded(t *testing.T, o outcome, q task) {
	t.Helper()
	want := q.Conns + o.New
	var all []flow.Record
	testutil.Eventually(t, rig.Limit, func() bool {
		all = readLog(t, s.log)
		return len(all) >= want
	}, "records of ", want, " connections")
	time.Sleep(3 * time.Second) // what comes twice may wait for its other half
	all = readLog(t, s.log)
	if len(all) != want {
		t.Errorf("%d records of %d connections", len(all), want)
	}
	cookies := map[uint64]int{}
	byPort := map[uint16][]flow.Record{}
	other := map[string]int{}
	for _, r := range all {
		if cookies[r.Cookie]++; cookies[r.Cookie] == 2 {
			t.Errorf("two records of one connection: %+v", r)
		}
		byPort[r.Source.Port()] = append(byPort[r.Source.Port()], r)
		if r.Path != flow.PathRelay || r.End != flow.ReasonClosed {
			other[r.Path.String()+" "+r.Reason.String()+" "+r.End.String()]++
		}
	}
	if len(other) > 0 {
		t.Errorf("connections that were not relayed to their end: %v", other)
	}
	for id, c := range o.Conns {
		ok := slices.ContainsFunc(byPort[c.Port], func(r flow.Record) bool {
			return r.Sent == c.Up+headSize+urgents(r, c) && r.Received == c.Down
		})
		if !ok {
			t.Errorf("connection %d (%c) has no record of its bytes %+v: %+v", id, c.Kind, c.counts, byPort[c.Port])
		}
	}
}

// urgents are the bytes that a connection has sent beside its stream.
func urgents(r flow.Record, c conn) uint64 {
	if c.Kind != kindUrgent {
		return 0
	}
	return r.Sent - c.Up - headSize // not counted here
}

func readLog(t testing.TB, path string) []flow.Record {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var all []flow.Record
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r flow.Record
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return all // half written
		}
		all = append(all, r)
	}
	return all
}

// TestUpgrades has two builds take over from each other, twenty times.
func TestUpgrades(t *testing.T) {
	const upgrades = 20
	versions := builds(t)
	q := task{Conns: 1000, Come: 3}
	s := newStage(t, service(ends...), q)
	time.Sleep(time.Second)
	quiet := s.turn(t)
	var pauses []int64
	for n := range upgrades {
		s.Replace(t, versions[n%2])
		o := s.turn(t)
		pauses = append(pauses, o.Slowest...)
	}
	o := s.finish(t, q)
	slices.Sort(pauses)
	slices.Sort(quiet.Slowest)
	slow := 0
	for _, p := range pauses {
		if p > time.Second.Microseconds() {
			slow++
		}
	}
	if slow > 0 {
		t.Errorf("%d answers took more than a second", slow)
	}
	t.Logf("slowest answer of each of %d connections, in an upgrade: p50 %v, p99 %v, most %v; without: p50 %v, p99 %v, most %v; %d new connections",
		len(quiet.Slowest), at(pauses, 50), at(pauses, 99), at(pauses, 100),
		at(quiet.Slowest, 50), at(quiet.Slowest, 99), at(quiet.Slowest, 100), o.New)
}

func at(sorted []int64, percent int) time.Duration {
	return time.Duration(sorted[min(len(sorted)*percent/100, len(sorted)-1)]) * time.Microsecond
}

func service(endpoints ...netip.AddrPort) string {
	text := fmt.Sprintf("services:\n  - name: s\n    address: %q\n    endpoints: [", vip)
	for _, e := range endpoints {
		text += fmt.Sprintf("%q, ", e)
	}
	return text + "]\n"
}
