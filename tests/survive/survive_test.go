package survive

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/rig/app"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

var (
	vip = netip.MustParseAddrPort("10.96.0.1:80")
	// poison is where a connection kills its handler.
	poison = netip.MustParseAddrPort("198.51.100.3:666")
	ends   = []netip.AddrPort{netip.MustParseAddrPort("198.51.100.1:8080"), netip.MustParseAddrPort("198.51.100.2:8080")}
)

// entry is the linker's flag of the Makefile.
const entry = "-E=github.com/pillion-project/pillion/cmd/pillion/keeper.entry"

// faultyDir is where faulty's build is: TestMain removes it.
func faultyDir() string {
	return filepath.Join(os.TempDir(), fmt.Sprintf("pillion-faulty-%d", os.Getpid()))
}

var buildFaulty = sync.OnceValues(func() (path string, err error) {
	if path, ok := testutil.Prebuilt("pillion-faulty"); ok {
		return path, nil
	}
	path = filepath.Join(faultyDir(), "pillion")
	cmd := exec.Command("go", "build", "-tags", "pillion_fault", "-ldflags", entry, "-o", path, "github.com/pillion-project/pillion/cmd/pillion")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return path, nil
})

// faulty returns the path of a build that kills itself at every point that matters, when
// it is told to.
func faulty(t *testing.T) string {
	t.Helper()
	path, err := buildFaulty()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// task is what the application does.
type task struct {
	// Workers make one connection after the other, of all kinds; Pings stay, and Urgent,
	// which send urgent bytes too.
	Workers, Pings, Urgent int
	// Most is the most that a connection sends in one direction, in bytes.
	Most uint32
}

// kinds are those of the connections that do not stay, as often as they are here.
func kinds() []app.Kind {
	return []app.Kind{
		app.Both, app.Both, app.Both, app.Both, app.AppFirst, app.AppFirst, app.FarFirst, app.FarFirst,
		app.AppResets, app.FarResets, app.Empty,
	}
}

// stage is an instance that survives, with servers and an application.
type stage struct {
	*rig.Rig
	*rig.Instance
	*app.Application
	far   *app.Server
	flows string // the flow log
}

func newStage(t *testing.T, r *rig.Rig, more string, q task) *stage {
	t.Helper()
	if testutil.InVM() { // its processor is emulated
		q.Workers, q.Pings, q.Most = (q.Workers+4)/5, (q.Pings+4)/5, (q.Most+3)/4
	}
	s := &stage{Rig: r, far: app.NewServer(""), flows: filepath.Join(t.TempDir(), "flows")}
	for _, e := range ends {
		s.Serve(t, e, s.far.Serve)
	}
	s.Instance = s.Run(t, fmt.Sprintf(`
survive: crash
flow_log: %s
%s
services:
  - name: s
    address: %q
    endpoints: [%q, %q]
  - name: poison
    address: %q
    endpoints: [%q]
    on_failure: closed
`, s.flows, more, vip, ends[0], ends[1], poison, poison))
	s.Application = app.Start(t, r)
	s.Load(t, app.Load{
		To: []netip.AddrPort{vip}, Stay: q.Pings + q.Urgent, Kinds: slices.Concat(slices.Repeat([]app.Kind{app.Echo}, q.Pings), slices.Repeat([]app.Kind{app.Marked}, q.Urgent)), Every: 30 * time.Millisecond,
		Come: q.Workers, Visits: kinds(), Most: q.Most,
	})
	return s
}

// worker is the process that carries the connections: the keeper's child.
func (s *stage) worker() int {
	pid := s.Cmd.Process.Pid
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	n, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	return n
}

// ready waits until the present worker is.
func (s *stage) ready(t *testing.T) {
	t.Helper()
	testutil.Eventually(t, rig.Limit, func() bool {
		now, err := s.Status(context.Background())
		return err == nil && now.Pid == s.worker() && now.Ready
	}, "the worker is ready\n", s.Log())
}

// finish ends all and wants every byte where it was to go.
func (s *stage) finish(t *testing.T) {
	t.Helper()
	o := s.Unload(t)
	o.Check(t)
	s.far.Check(t)
	s.Conserved(t)
	s.Idle(t)
	t.Logf("%d connections, %d bytes there and %d back", o.Opened, s.far.Right(), o.Bytes)
	s.recorded(t, o)
}

// recorded wants one record of each connection, with all its bytes.
func (s *stage) recorded(t *testing.T, o *app.Report) {
	t.Helper()
	var all []flow.Record
	// What has lost its other half waits for it.
	for still := time.Now(); time.Since(still) < 4*time.Second && len(all) < o.Opened; time.Sleep(100 * time.Millisecond) {
		if now := rig.ReadFlows(t, s.flows); len(now) > len(all) {
			all, still = now, time.Now()
		}
	}
	type whole struct {
		port           uint16
		sent, received uint64
	}
	cookies, ends, bytes := map[uint64]int{}, map[string]int{}, map[whole]int{}
	alone := 0
	for _, r := range all {
		if r.End == flow.ReasonHandlerLost && testutil.InVM() {
			// There a handler takes seconds to come back, for which a half does not
			// wait: the other has a record of its own.
			alone++
			continue
		}
		cookies[r.Cookie]++
		ends[r.Path.String()+" "+r.End.String()]++
		bytes[whole{r.Source.Port(), r.Sent, r.Received}]++
	}
	missing := func(list []app.Conn) (none []app.Conn) {
		for _, c := range list {
			w := whole{c.Port, c.Up + app.HeadSize, c.Down}
			if bytes[w]--; bytes[w] < 0 {
				none = append(none, c)
			}
		}
		return none
	}
	stayed, others := missing(o.Stayed), missing(o.Came)
	t.Logf("%d records of %d connections: %v; %d without one of their bytes", len(all), o.Opened, ends, len(others))
	for _, w := range stayed {
		near := slices.DeleteFunc(slices.Clone(all), func(r flow.Record) bool { return r.Source.Port() != w.Port })
		t.Errorf("of %d connections that were open all the time, %+v has no record: %+v", len(o.Stayed), w, near)
	}
	if len(cookies) != len(all)-alone {
		t.Errorf("%d records, of %d connections", len(all)-alone, len(cookies))
	}
}

// TestKills kills the handler from outside.
func TestKills(t *testing.T) {
	const kills = 5
	s := newStage(t, rig.New(t), "", task{Workers: 40, Pings: 180, Urgent: 20, Most: 1 << 19})
	time.Sleep(500 * time.Millisecond)
	last := 0
	for n := range kills {
		testutil.Eventually(t, rig.Limit, func() bool { w := s.worker(); return w != 0 && w != last }, "there is a worker\n", s.Log())
		if n%4 > 0 { // else perhaps in the middle of its start
			s.ready(t)
		}
		time.Sleep(time.Duration(rand.IntN(500)) * time.Millisecond)
		if w := s.worker(); w != 0 { // kill(2) would take 0 for everybody
			last = w
			// It may have died just now.
			_ = unix.Kill(last, unix.SIGKILL)
		}
	}
	s.finish(t)
}

// faults has an instance kill itself at one in so many points, until it has done so
// often enough or the time is over.
func faults(t *testing.T, program string, oneIn int, more string, q task) {
	t.Helper()
	const enough, limit = 8, 6 * time.Second // after ten in a row the keeper gives up
	if testutil.InVM() {
		oneIn /= 10 // it comes to less in the time
	}
	r := rig.New(t)
	count := filepath.Join(t.TempDir(), "count")
	if err := os.WriteFile(count, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r.Program = program
	r.Env = []string{
		"PILLION_FAULT=" + strconv.Itoa(oneIn), "PILLION_FAULT_MOST=" + strconv.Itoa(enough), "PILLION_FAULT_COUNT=" + count,
	}
	s := newStage(t, r, more, q)
	var hits []byte
	var err error
	for start := time.Now(); len(hits) < enough && time.Since(start) < limit; time.Sleep(50 * time.Millisecond) {
		if hits, err = os.ReadFile(count); err != nil {
			t.Fatal(err)
		}
	}
	s.finish(t)
	if hits, err = os.ReadFile(count); err != nil {
		t.Fatal(err)
	}
	points := map[byte]int{}
	for _, b := range hits {
		points[b]++
	}
	t.Logf("%d deaths, by point: %v", len(hits), points)
	if len(hits) == 0 {
		t.Error("the handler has never killed itself")
	}
}

// TestFaults has the handler kill itself wherever that could do harm.
func TestFaults(t *testing.T) {
	program := faulty(t)
	t.Run("messages", func(t *testing.T) { faults(t, program, 400, "", task{Workers: 30, Pings: 20, Most: 200_000}) })
	t.Run("handshakes", func(t *testing.T) {
		faults(t, program, 200, "connect: mirror", task{Workers: 15, Pings: 5, Most: 3000})
	})
	t.Run("urgent", func(t *testing.T) { faults(t, program, 800, "", task{Urgent: 40}) })
	t.Run("bulk", func(t *testing.T) { faults(t, program, 50, "", task{Workers: 8, Pings: 5, Most: 4 << 20}) })
}

// TestEndings has the handler kill itself at each point of the end of connections: each is
// on record with all of its bytes.
func TestEndings(t *testing.T) {
	program := faulty(t)
	for name, point := range map[string]int{ // as in redirect/l4/fault.go
		"an end was passed on": 15, "and is noted": 16, "and is shut": 17,
		"it is on record": 20, "a side is forgotten": 22, "and is closed": 23, "it has ended": 24,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := rig.New(t)
			count := filepath.Join(t.TempDir(), "count")
			if err := os.WriteFile(count, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			r.Program = program
			r.Env = []string{
				"PILLION_FAULT=1", fmt.Sprintf("PILLION_FAULT_ONLY=%d", point), "PILLION_FAULT_MOST=4", "PILLION_FAULT_COUNT=" + count,
			}
			s := newStage(t, r, "", task{Pings: 10, Urgent: 10})
			s.finish(t)
			if hits, err := os.ReadFile(count); err != nil || len(hits) == 0 {
				t.Errorf("the handler has never killed itself: %v", err)
			}
		})
	}
}

// TestPoison has one connection kill its handler each time: it is ended, and the others
// go on.
func TestPoison(t *testing.T) {
	r := rig.New(t)
	r.Program, r.Env = faulty(t), []string{fmt.Sprintf("PILLION_FAULT_POISON=%d", poison.Port())}
	s := newStage(t, r, "", task{Pings: 50})
	s.Serve(t, poison, func(c net.Conn) { io.Copy(io.Discard, c) })
	time.Sleep(500 * time.Millisecond)
	// The handler may be late, on a busy machine.
	out, err := s.Try(os.Args[0], "-test.run=^TestPoisoned$", "-poison="+poison.String())
	for start := time.Now(); err != nil && strings.Contains(out, "refused") && time.Since(start) < rig.Limit; {
		out, err = s.Try(os.Args[0], "-test.run=^TestPoisoned$", "-poison="+poison.String())
	}
	if err == nil || !strings.Contains(out, "reset by peer") {
		t.Errorf("the connection that kills: %q, %v; want a reset", out, err)
	}
	s.ready(t)
	s.finish(t)
	crashed := 0
	for _, r := range rig.ReadFlows(t, s.flows) {
		if r.End == flow.ReasonCrashed {
			crashed++
		}
	}
	if crashed != 1 {
		t.Errorf("%d connections are on record as %v, want 1", crashed, flow.ReasonCrashed)
	}
}

// dialPoison is where TestPoisoned goes.
var dialPoison = flag.String("poison", "", "dial this address")

// TestPoisoned is the application that kills its handler. As a test it does nothing.
func TestPoisoned(t *testing.T) {
	if *dialPoison == "" {
		return
	}
	c, err := net.DialTimeout("tcp", *dialPoison, 2*rig.Limit)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * rig.Limit))
	_, err = io.WriteString(c, "hello\n")
	if _, again := io.Copy(io.Discard, c); again != nil {
		err = again
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestTakeOver has a process of another build take a kept one over, and kills that one
// then, to and fro: what each was given must be written down, too.
func TestTakeOver(t *testing.T) {
	builds := []string{faulty(t), rig.Binary(t)} // nothing tells the one to kill itself
	s := newStage(t, rig.New(t), "", task{Workers: 10, Pings: 50, Most: 1 << 20})
	time.Sleep(300 * time.Millisecond)
	for _, build := range builds {
		s.Replace(t, build)
		s.ready(t)
		if w := s.worker(); w != 0 {
			_ = unix.Kill(w, unix.SIGKILL)
		}
		s.ready(t)
	}
	s.finish(t)
}

// TestBadConfiguration kills a handler whose configuration file no start would take any
// more: it goes on with what it had, also what it learned since its start.
func TestBadConfiguration(t *testing.T) {
	s := newStage(t, rig.New(t), "", task{Workers: 4, Pings: 20, Most: 1 << 16})
	good, err := os.ReadFile(s.file(t))
	if err != nil {
		t.Fatal(err)
	}
	kill := func(want int) {
		t.Helper()
		if err := unix.Kill(s.worker(), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		s.ready(t)
		now, err := s.Status(context.Background())
		if err != nil || len(now.Services) != want {
			t.Errorf("%d services, want %d: %v", len(now.Services), want, err)
		}
	}
	s.ready(t)
	if err := os.WriteFile(s.file(t), []byte("services: no\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	kill(2)
	kill(2)
	more := string(good) + "  - name: more\n    address: 10.96.0.9:80\n    endpoints: [198.51.100.1:8080]\n"
	if err := os.WriteFile(s.file(t), []byte(more), 0o600); err != nil {
		t.Fatal(err)
	}
	if r, err := s.Reload(context.Background()); err != nil || len(r.Refused) > 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	if err := os.Remove(s.file(t)); err != nil {
		t.Fatal(err)
	}
	kill(3)
	s.finish(t)
}

// file is the configuration.
func (s *stage) file(t *testing.T) string {
	t.Helper()
	at := slices.Index(s.Cmd.Args, "--config")
	return s.Cmd.Args[at+1]
}

// contests is how often TestGiverKilled has a handler taken over.
var contests = flag.Int("contests", 8, "how often a handler is taken over that kills itself meanwhile")

// giving is the fault point of what a giver tells a taker: faultGiving.
const giving = 28

// TestGiverKilled has kept handlers kill themselves while another process takes them over:
// one of the two has the connections in the end, and the other has none.
func TestGiverKilled(t *testing.T) {
	r := rig.New(t)
	count := filepath.Join(t.TempDir(), "count")
	r.Program = faulty(t)
	r.Env = []string{
		"PILLION_FAULT=2", fmt.Sprintf("PILLION_FAULT_ONLY=%d", giving), "PILLION_FAULT_COUNT=" + count,
		"PILLION_FAULT_MOST=8", // in a contest: after ten in a row the keeper gives up
	}
	s := newStage(t, r, "", task{Workers: 8, Pings: 100, Most: 1 << 18})
	replaced, deaths := map[bool]int{}, 0
	for range *contests {
		s.ready(t)
		if err := os.WriteFile(count, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		replaced[s.Contend(t, r.Program)]++
		hits, err := os.ReadFile(count)
		if err != nil {
			t.Fatal(err)
		}
		deaths += len(hits)
	}
	s.ready(t)
	s.finish(t)
	t.Logf("taken over %d times, and not %d times; %d deaths", replaced[true], replaced[false], deaths)
	if deaths == 0 {
		t.Error("no handler has killed itself")
	}
}

// taking are the fault points of who takes an instance over, from the first connection
// that it has written down to the first that it carries; and whether the connections are
// its own by then.
var taking = []struct {
	name  string
	point int
	ours  bool
}{
	{"one is written down", 29, false},
	{"all are", 30, true},
	{"the giver knows", 31, true},
	{"the giver has let go", 32, true},
	{"one is taken up", 33, true},
}

// TestTakerKilled has kept handlers kill themselves at each point of taking over from one
// another: the connections go on with either.
func TestTakerKilled(t *testing.T) {
	s := newStage(t, rig.New(t), "", task{Workers: 2, Pings: 90, Urgent: 10, Most: 1 << 16})
	program := faulty(t)
	for _, at := range taking {
		s.ready(t)
		count := filepath.Join(t.TempDir(), "count")
		if err := os.WriteFile(count, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		s.Env = []string{
			"PILLION_FAULT=1", fmt.Sprintf("PILLION_FAULT_ONLY=%d", at.point), "PILLION_FAULT_MOST=1", "PILLION_FAULT_COUNT=" + count,
		}
		before := len(s.Log())
		s.Replace(t, program)
		s.ready(t)
		hits, err := os.ReadFile(count)
		if err != nil || len(hits) == 0 { // two threads may die at once
			t.Errorf("%s: nobody has died: %v", at.name, err)
		}
		log := s.Log()[before:]
		if recovered := strings.Contains(log, "the handler was killed: its connections go on"); recovered != at.ours {
			t.Errorf("%s: the next worker has them at once: %v, want %v\n%s", at.name, recovered, at.ours, log)
		}
	}
	s.finish(t)
}

// TestClients asks a handler all the time while it is killed: whoever asks waits, and
// nobody is told that there is none.
func TestClients(t *testing.T) {
	const kills = 4
	probes := netip.MustParseAddrPort("127.0.0.1:15021")
	s := newStage(t, rig.New(t), fmt.Sprintf("probes: %s\nmetrics: 127.0.0.1:15020", probes), task{Pings: 20})
	ctx, end := context.WithCancel(context.Background())
	var asked [2]atomic.Int64
	var all sync.WaitGroup
	all.Go(func() {
		for ; ctx.Err() == nil; asked[0].Add(1) {
			if _, err := s.Status(context.Background()); err != nil {
				t.Errorf("status: %v", err)
			}
		}
	})
	all.Go(func() {
		for ; ctx.Err() == nil; asked[1].Add(1) {
			// A connect that is refused, and not an answer that breaks off, which no
			// client of HTTP takes for the end of a service.
			err := s.App.Run(func() error {
				c, err := net.Dial("tcp", probes.String())
				if err == nil {
					c.Close()
				}
				return err
			})
			if err != nil {
				t.Errorf("probe: %v", err)
			}
			time.Sleep(time.Millisecond)
		}
	})
	for range kills {
		s.ready(t)
		if err := unix.Kill(s.worker(), unix.SIGKILL); err != nil {
			t.Error(err)
		}
	}
	s.ready(t)
	end()
	all.Wait()
	if deaths := strings.Count(s.Log(), "the handler was killed"); deaths != kills {
		t.Errorf("%d deaths, want %d\n%s", deaths, kills, s.Log())
	}
	t.Logf("%d questions, %d probes", asked[0].Load(), asked[1].Load())
	s.finish(t)
}
