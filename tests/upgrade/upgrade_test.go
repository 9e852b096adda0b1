package upgrade

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/handover"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/rig/app"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

var (
	vip  = netip.MustParseAddrPort("10.96.0.1:80")
	ends = []netip.AddrPort{
		netip.MustParseAddrPort("198.51.100.1:8080"), netip.MustParseAddrPort("198.51.100.2:8080"),
		netip.MustParseAddrPort("198.51.100.3:8080"),
	}
)

// builds returns two builds that differ in their versions: the one under test, and
// another.
func builds(t testing.TB) [2]string {
	t.Helper()
	other := testutil.Build(t, "pillion-other", "-ldflags=-X main.version=v0.0.1-other", "github.com/pillion-project/pillion/cmd/pillion")
	return [2]string{other, rig.Binary(t)}
}

// few is how many upgrades there are where it is not their number that matters.
func few() int {
	if testutil.InVM() { // its processor is emulated
		return 2
	}
	return 6
}

// many is how many connections make it worth while to wait for a second record of any.
const many = 500

// stage is an instance whose flows are logged, with servers and an application.
type stage struct {
	*rig.Rig
	*rig.Instance
	client
	far *app.Server
	log string // of flows
	dir string
}

func newStage(t *testing.T, more string, q task, prepare ...func(*stage)) *stage {
	t.Helper()
	s := &stage{Rig: rig.New(t), far: app.NewServer(""), dir: t.TempDir()}
	for _, e := range ends {
		s.Serve(t, e, s.far.Serve)
	}
	t.Cleanup(s.far.Finish)
	for _, f := range prepare {
		f(s)
	}
	s.log = filepath.Join(s.dir, "flows")
	s.Instance = s.Run(t, fmt.Sprintf("flow_log: %s\n%s", s.log, more))
	s.client = newClient(t, s.Rig, q)
	return s
}

// finish ends the connections, and wants every byte where it was to go, and a record
// of each connection.
func (s *stage) finish(t *testing.T, q task) *app.Report {
	t.Helper()
	s.far.Finish()
	o := s.end(t)
	if len(o.Stayed) != q.Conns {
		t.Errorf("%d connections have ended, want %d", len(o.Stayed), q.Conns)
	}
	testutil.Eventually(t, rig.Limit, func() bool { return len(s.far.Seen()) >= o.Opened }, "the server has seen the end of every connection")
	s.far.Check(t)
	seen := s.far.Seen()
	for _, c := range slices.Concat(o.Stayed, o.Came) {
		if got := seen[c.ID]; got != c.Bytes {
			t.Errorf("connection %d (%c): the server counts %+v, the application %+v", c.ID, c.Kind, got, c.Bytes)
		}
	}
	s.Conserved(t)
	s.recorded(t, o, q)
	return o
}

// recorded wants one record of each connection in the flow log.
func (s *stage) recorded(t *testing.T, o *app.Report, q task) {
	t.Helper()
	want := o.Opened
	var all []flow.Record
	testutil.Eventually(t, rig.Limit, func() bool {
		all = rig.ReadFlows(t, s.log)
		return len(all) >= want
	}, "records of ", want, " connections")
	if q.Conns >= many {
		// A half that is left over comes when it has waited for the other in vain.
		time.Sleep(3 * time.Second)
		all = rig.ReadFlows(t, s.log)
	}
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
		switch {
		case r.End != flow.ReasonClosed:
			t.Errorf("a connection ended by %s: %+v", r.End, r)
		case r.Path != flow.PathRelay:
			other[r.Path.String()+" "+r.Reason.String()]++
		default:
		}
	}
	if len(other) > 0 {
		// A machine that is too busy for heartbeats: on_failure.
		t.Logf("connections that were not relayed: %v of %d", other, len(all))
	}
	for _, c := range slices.Concat(o.Stayed, o.Came) {
		ok := slices.ContainsFunc(byPort[c.Port], func(r flow.Record) bool {
			return r.Sent == c.Up+app.HeadSize+urgents(r, c) && r.Received == c.Down
		})
		if !ok {
			t.Errorf("connection %d (%c) has no record of its bytes %+v: %+v", c.ID, c.Kind, c.Bytes, byPort[c.Port])
		}
	}
}

// urgents are the bytes that a connection has sent beside its stream.
func urgents(r flow.Record, c app.Conn) uint64 {
	if c.Kind != app.Urgent {
		return 0
	}
	return r.Sent - c.Up - app.HeadSize // not counted here
}

// TestUpgrades has two builds take over from each other, twenty times, so that every
// second time is a downgrade.
func TestUpgrades(t *testing.T) {
	versions := builds(t)
	t.Run("a thousand connections", func(t *testing.T) { testUpgrades(t, versions) })
	t.Run("handshakes that wait", func(t *testing.T) { testUpgradesOfHandshakes(t, versions) })
	t.Run("endpoints change", func(t *testing.T) { testUpgradesWhileEndpointsChange(t, versions) })
}

func testUpgrades(t *testing.T, versions [2]string) {
	t.Helper()
	upgrades, q := 20, task{Conns: 1000, Come: 3}
	if testutil.InVM() { // its processor is emulated
		upgrades, q = 4, task{Conns: 100, Come: 1}
	}
	s := newStage(t, service(ends...), q)
	s.turn(t)
	time.Sleep(time.Second)
	quiet := s.turn(t)
	var answers, pauses []time.Duration
	first := 0 // descriptors
	for n := range upgrades {
		before := s.Cmd.Process.Pid
		s.Replace(t, versions[n%2])
		answers = append(answers, s.turn(t).Slowest...)
		status, err := s.Status(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		o := status.TakenOver
		if o == nil || o.Pid != before || o.At.Before(status.Started) || o.Connections == 0 {
			t.Fatalf("upgrade %d: taken over: %+v", n, o)
		}
		if o.Version == status.Version {
			t.Fatalf("upgrade %d: both are %s", n, o.Version)
		}
		pauses = append(pauses, o.Pause)
		if n == 1 {
			first, _ = descriptors(t, s.Cmd.Process.Pid)
		}
	}
	// New connections come and go: not all have the same.
	last, pipes := descriptors(t, s.Cmd.Process.Pid)
	if last > first+15 {
		t.Errorf("%d descriptors are open after %d upgrades, %d after 2", last, upgrades, first)
	}
	// A worker, of which each processor has one at most, keeps eight pipes that nobody
	// uses, once it had so many.
	if most := 2*8*runtime.NumCPU() + 15; pipes > most {
		t.Errorf("%d ends of pipes are open after %d upgrades, and not %d at most", pipes, upgrades, most)
	}
	o := s.finish(t, q)
	slices.Sort(answers)
	slices.Sort(quiet.Slowest)
	slices.Sort(pauses)
	t.Logf("connections paused for: p50 %v, p99 %v, most %v", at(pauses, 50), at(pauses, 99), at(pauses, 100))
	t.Logf("slowest answer of each of %d connections, in an upgrade: p50 %v, p99 %v, most %v; in a second without: p50 %v, p99 %v, most %v; %d new connections",
		len(quiet.Slowest), at(answers, 50), at(answers, 99), at(answers, 100),
		at(quiet.Slowest, 50), at(quiet.Slowest, 99), at(quiet.Slowest, 100), o.Opened-q.Conns)
	// The bound is 50 ms. Where an answer takes long at the best of times, so does all
	// else.
	if typical := at(pauses, 50); typical > max(time.Second, 5*at(quiet.Slowest, 99)) {
		t.Errorf("connections pause for %v as a rule", typical)
	}
}

// testUpgradesOfHandshakes has every connect wait for its dial, and dials that take a
// second, so that some of each are under way at every upgrade.
func testUpgradesOfHandshakes(t *testing.T, versions [2]string) {
	t.Helper()
	upgrades := few()
	slow := netip.MustParseAddrPort("198.51.100.9:8080")
	q := task{Conns: 20, Come: 20}
	s := newStage(t, service(slow)+"connect: mirror\n", q, func(s *stage) { s.serveSlowly(t, slow) })
	for n := range upgrades {
		s.Replace(t, versions[n%2])
		s.turn(t)
	}
	o := s.finish(t, q)
	late, waited, early := 0, 0, 0
	for _, r := range rig.ReadFlows(t, s.log) {
		switch {
		case r.Path != flow.PathRelay:
		case !r.Mirrored:
			early++ // on a machine that is too busy for heartbeats
		case r.Connect > 500*time.Millisecond:
			late++
			fallthrough
		default:
			waited++
		}
	}
	if late < upgrades || waited < early {
		t.Errorf("of %d connections %d have waited, %d for long, and %d have not", o.Opened, waited, late, early)
	}
	t.Logf("%d of %d dials took long", late, o.Opened)
}

// serveSlowly serves at an address where a third of the SYNs is lost, which come again
// after a second.
func (s *stage) serveSlowly(t *testing.T, at netip.AddrPort) {
	t.Helper()
	ln := s.Listen(t, at)
	const (
		random     = 0xfffff000 + 56 // SKF_AD_OFF + SKF_AD_RANDOM
		flags, syn = 13, 2           // of the TCP header, which is where a packet begins here
	)
	lossy := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: flags},
		{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: syn, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: random},
		{Code: unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K, K: 1 << 32 / 3, Jt: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
		{Code: unix.BPF_RET | unix.BPF_K, K: 1 << 16},
	}
	var err error
	control := handover.FD(ln, func(fd int) {
		err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(lossy)), Filter: &lossy[0]})
	})
	if err = errors.Join(control, err); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			// It is the listener's, and not what is tested.
			raw, err := c.(*net.TCPConn).SyscallConn()
			if err == nil {
				raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0) })
			}
			all.Go(func() {
				defer c.Close()
				s.far.Serve(c)
			})
		}
	})
	t.Cleanup(func() {
		s.far.Finish()
		ln.Close()
		all.Wait()
	})
}

// testUpgradesWhileEndpointsChange has endpoints come and go all the time.
func testUpgradesWhileEndpointsChange(t *testing.T, versions [2]string) {
	t.Helper()
	upgrades, q := few(), task{Conns: 200, Come: 2}
	if testutil.InVM() {
		q.Conns = 50
	}
	file := filepath.Join(t.TempDir(), "endpoints.json")
	change := func(n int) {
		all := []string{}
		for i, e := range ends {
			if n%3 != i {
				all = append(all, fmt.Sprintf("%q", e))
			}
		}
		if err := os.WriteFile(file+".next", []byte(`[{"targets": [`+strings.Join(all, ",")+"]}]"), 0o600); err != nil {
			t.Error(err)
		}
		if err := os.Rename(file+".next", file); err != nil {
			t.Error(err)
		}
	}
	change(0)
	s := newStage(t, fmt.Sprintf("services:\n  - {name: s, address: %q, discover: {file: %s}}\n", vip, file), q)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for n := 1; ; n++ {
			select {
			case <-stop:
				return
			case <-time.After(37 * time.Millisecond):
				change(n)
			}
		}
	}()
	for n := range upgrades {
		s.Replace(t, versions[n%2])
		s.turn(t)
	}
	close(stop)
	<-stopped
	s.finish(t, q)
}

// TestUpgradesWithKeeper has processes take over from each other that have keepers, which
// hold their descriptors too.
func TestUpgradesWithKeeper(t *testing.T) {
	if os.Getenv("PILLION") == "" {
		t.Skip("a build without the Makefile has no keeper")
	}
	q := task{Conns: 100, Come: 1}
	s := newStage(t, service(ends...)+"survive: crash\n", q)
	for range 3 {
		s.Replace(t, rig.Binary(t))
		s.turn(t)
	}
	s.finish(t, q)
}

// TestNobodyThere takes over where there is nobody, and what was killed.
func TestNobodyThere(t *testing.T) {
	s := &stage{Rig: rig.New(t), far: app.NewServer("")}
	s.far.Finish()
	s.Serve(t, ends[0], s.far.Serve)
	s.Instance = s.Run(t, service(ends[0]), "--take-over")
	talk := func() {
		t.Helper()
		s.client = newClient(t, s.Rig, task{Conns: 1})
		s.end(t)
	}
	talk()
	if log := s.Log(); !strings.Contains(log, "nobody is there to take over from") {
		t.Error("it does not say that nobody was there")
	}
	s.Kill(t)
	s.Launch(t)
	talk()
	s.Replace(t, rig.Binary(t))
	talk()
	if status, err := s.Status(context.Background()); err != nil || status.TakenOver == nil {
		t.Errorf("taken over: %+v, %v", status.TakenOver, err)
	}
	out, err := s.Pillion(t, "status")
	if err != nil || !strings.Contains(out, "taken over ") {
		t.Errorf("status: %v\n%s", err, out)
	}
	// The process that has it can be told to end, and takes all away.
	if out, err := s.Pillion(t, "unload", s.Name, "--force"); err != nil {
		t.Errorf("unload: %v\n%s", err, out)
	}
	if err := s.Wait(t); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(filepath.Join(s.Runtime, "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestSilentSource takes over while a source has nothing to say: what the service had
// stays.
func TestSilentSource(t *testing.T) {
	s := &stage{Rig: rig.New(t), far: app.NewServer("")}
	s.far.Finish()
	s.Serve(t, ends[0], s.far.Serve)
	file := filepath.Join(t.TempDir(), "endpoints.json")
	if err := os.WriteFile(file, fmt.Appendf(nil, `[{"targets": [%q]}]`, ends[0]), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Instance = s.Run(t, fmt.Sprintf("services:\n  - {name: s, address: %q, discover: {file: %s}}\n", vip, file))
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		s.Replace(t, rig.Binary(t))
		newClient(t, s.Rig, task{Conns: 3}).end(t)
	}
	// Those of the processes before are known, too.
	if all := s.Ended(t, 6); len(all) != 6 {
		t.Errorf("%d records of 6 connections", len(all))
	}
}

// TestRemovalsGoOn has endpoints removed just before, and between, whose connections
// are to end after a while: they do, and no others.
func TestRemovalsGoOn(t *testing.T) {
	config := func(endpoints ...netip.AddrPort) string {
		return strings.TrimSuffix(service(endpoints...), "\n") + "\n    on_remove: close\n    remove_after: 1s\n    policy: round_robin\n"
	}
	s := &stage{Rig: rig.New(t)}
	for _, e := range ends {
		s.Serve(t, e, app.NewServer(e.String()).Serve)
	}
	file := filepath.Join(t.TempDir(), "config.yaml")
	put := func(text string) {
		if err := os.WriteFile(file+".next", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".next", file); err != nil {
			t.Fatal(err)
		}
	}
	put(config(ends...))
	s.Instance = s.Run(t, "", "--config", file)
	s.client = client{app.Start(t, s.Rig)}
	byEnd := map[string][]string{} // connections
	for n := 0; len(byEnd) < len(ends); n++ {
		if n == 100 {
			t.Fatalf("of %d connections each endpoint has %v", n, byEnd)
		}
		id := fmt.Sprint(n)
		at := s.Open(t, id, vip)
		if _, err := netip.ParseAddrPort(at); err != nil {
			t.Fatalf("connection %d: %s", n, at)
		}
		byEnd[at] = append(byEnd[at], id)
	}
	put(config(ends[1], ends[2]))
	if r, err := s.Reload(context.Background()); err != nil || len(r.Refused) > 0 {
		t.Fatal(r, err)
	}
	// The next process has the last word on the other.
	put(config(ends[2]))
	s.Replace(t, rig.Binary(t))
	for _, e := range ends[:2] {
		for _, id := range byEnd[e.String()] {
			// The other one is from who was not relayed: a machine too busy for heartbeats.
			if got := s.EndOf(t, id); got != "ECONNRESET" && got != "ECONNABORTED" {
				t.Errorf("the connection to %s ends with %s", e, got)
			}
		}
	}
	time.Sleep(time.Second)
	for _, id := range byEnd[ends[2].String()] {
		if got := s.Talk(t, id); got != "" {
			t.Errorf("a connection whose endpoint is still there: %s", got)
		}
	}
}

// descriptors are those that a process has open: ends of pipes, and all else.
func descriptors(t testing.TB, pid int) (others, pipes int) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range all {
		// What has been closed since has no target.
		if to, _ := os.Readlink(filepath.Join(dir, fd.Name())); strings.HasPrefix(to, "pipe:") {
			pipes++
		} else if to != "" {
			others++
		}
	}
	return others, pipes
}

func at(sorted []time.Duration, percent int) time.Duration {
	return sorted[min(len(sorted)*percent/100, len(sorted)-1)]
}

func service(endpoints ...netip.AddrPort) string {
	text := fmt.Sprintf("services:\n  - name: s\n    address: %q\n    endpoints: [", vip)
	for _, e := range endpoints {
		text += fmt.Sprintf("%q, ", e)
	}
	return text + "]\n"
}
