package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// pinDir is where the pins of an instance are.
func pinDir(name string) string { return filepath.Join("/sys/fs/bpf/pillion", name) }

// ground is a world with a server of both families on one port, and an
// application that listens on that very port itself and dials the server.
type ground struct {
	*rig.Rig
	at4, at6 netip.AddrPort
}

func newGround(t *testing.T) *ground {
	t.Helper()
	g := &ground{Rig: rig.New(t)}
	g.at4 = g.Serve(t, netip.AddrPortFrom(rig.Far4, 7070), introduce("far"))
	g.at6 = g.Serve(t, netip.AddrPortFrom(rig.Far6, 7070), introduce("far"))
	return g
}

func (g *ground) job() job {
	return job{
		Targets: []netip.AddrPort{g.at4, g.at6}, Workers: 4, Pause: 8 * time.Millisecond,
		Listen: []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:7070"), netip.MustParseAddrPort("[::]:7070")},
	}
}

// command runs a program in the application's namespace, out of scope.
func (g *ground) command(t testing.TB, name string, args ...string) {
	t.Helper()
	testutil.Need(t, name)
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := g.App.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out.String())
	}
}

// window is a time in which, and a little after which, a fault may be felt.
type window struct{ from, to int64 }

func (w window) touches(o *outcome) bool { return o.Start < w.to && o.Done > w.from }

// settling is how long the kernel side may take to notice that the handler does
// not answer, with slack for a busy machine.
const settling = 750 * time.Millisecond

// faulty is a running instance, and the load on it.
type faulty struct {
	*ground
	*rig.Instance
	load    *load
	unbreak func()
}

// fault is something that goes wrong.
type fault struct {
	// breaks makes it so, and mends undoes it; nil: Pillion mends it.
	breaks, mends func(*testing.T, *faulty)
	// felt is how long after it connections may suffer.
	felt time.Duration
	// patience, if set, is how long a connection may take to be served.
	patience time.Duration
	// brief means that Pillion is quick to mend it, and that the setting of
	// on_failure may go unnoticed; vague that it may take effect at times only.
	brief, vague bool
	// escapes means that nobody is there to refuse.
	escapes bool
	// workers, if set, is how many connect at once.
	workers int
	// prepare, if set, comes before the start.
	prepare func(*testing.T, *ground)
}

var faults = map[string]fault{
	"killed": {
		breaks: func(t *testing.T, f *faulty) { f.Kill(t) },
		mends:  func(t *testing.T, f *faulty) { f.Launch(t) },
	},
	"stopped": {
		breaks: func(t *testing.T, f *faulty) {
			f.Signal(t, unix.SIGSTOP)
			waitState(t, f.Cmd.Process.Pid, "T")
		},
		mends: func(t *testing.T, f *faulty) { f.Signal(t, unix.SIGCONT) },
		felt:  500 * time.Millisecond,
	},
	"throttled": {
		breaks: func(t *testing.T, f *faulty) { f.unbreak = throttle(t, f.Cmd.Process.Pid) },
		mends:  func(_ *testing.T, f *faulty) { f.unbreak() },
		vague:  true, patience: 20 * time.Second,
	},
	"accept queue full": {
		prepare: func(t *testing.T, g *ground) { g.App.Sysctl(t, "net/core/somaxconn", "16") },
		breaks:  func(t *testing.T, f *faulty) { limitFiles(t, f.Cmd.Process.Pid, 8) },
		mends:   func(t *testing.T, f *faulty) { limitFiles(t, f.Cmd.Process.Pid, 20000) },
		felt:    settling, workers: 48, // more than the queue holds
	},
	"lookup link detached": {breaks: func(t *testing.T, f *faulty) { detachPin(t, f.Name, "link_pl_lookup") }, brief: true, felt: settling},
	"lookup pin removed": {breaks: func(t *testing.T, f *faulty) {
		pin := filepath.Join(pinDir(f.Name), "link_pl_lookup")
		if err := os.Remove(pin); err != nil {
			t.Fatal(err)
		}
		testutil.Eventually(t, rig.Limit, func() bool { _, err := os.Stat(pin); return err == nil }, "the pin is back")
	}, brief: true},
	"lookup pin removed and killed": {
		breaks: func(t *testing.T, f *faulty) {
			f.Signal(t, unix.SIGSTOP)
			waitState(t, f.Cmd.Process.Pid, "T")
			if err := os.Remove(filepath.Join(pinDir(f.Name), "link_pl_lookup")); err != nil {
				t.Fatal(err)
			}
			f.Kill(t)
		},
		mends: func(t *testing.T, f *faulty) { f.Launch(t) },
	},
	"connect links detached": {breaks: func(t *testing.T, f *faulty) {
		detachPin(t, f.Name, "link_pl_connect4")
		detachPin(t, f.Name, "link_pl_connect6")
	}, brief: true, escapes: true, felt: 2 * time.Second}, // links are looked at each second
	"route removed": {breaks: func(t *testing.T, f *faulty) {
		f.ground.command(t, "ip", "route", "del", "table", "local", f.status(t).Slots4)
		f.ground.command(t, "ip", "-6", "route", "del", "table", "local", f.status(t).Slots6)
	}, brief: true, felt: settling},
	"firewall": {
		breaks: func(t *testing.T, f *faulty) {
			s := f.status(t)
			f.ground.command(t, "nft", "add table inet faults; add chain inet faults in { type filter hook input priority 0; }; "+
				"add rule inet faults in ip daddr "+s.Slots4+" drop; add rule inet faults in ip6 daddr "+s.Slots6+" drop")
		},
		mends: func(t *testing.T, f *faulty) { f.ground.command(t, "nft", "delete table inet faults") },
		felt:  settling,
	},
}

// TestFaults breaks Pillion in every way there is, under load, in both settings
// of on_failure. With open nothing fails, but for a moment where the kernel
// side cannot know; with closed what is not redirected is refused at once; and
// it comes back by itself. At no time does the application reach itself.
func TestFaults(t *testing.T) {
	for name, f := range faults {
		for _, setting := range []string{"open", "closed"} {
			t.Run(name+"/"+setting, func(t *testing.T) { f.test(t, setting) })
		}
	}
}

func (f fault) test(t *testing.T, setting string) {
	g := newGround(t)
	if f.prepare != nil {
		f.prepare(t, g)
	}
	i := g.Run(t, "on_failure: "+setting+"\nrelay: {workers: 1}")
	j := g.job()
	j.Patience = f.patience
	if f.workers > 0 {
		j.Workers, j.Pause = f.workers, 50*time.Millisecond
	}
	h := &faulty{ground: g, Instance: i, load: startLoad(t, g.Rig, j)}
	h.load.becomes(t, "relayed", (*outcome).relayed)

	w := window{from: now()}
	f.breaks(t, h)
	w.to = now() + int64(f.felt)
	switch {
	case f.brief:
	case f.vague:
		h.some(t, 3*time.Second)
	case setting == "open":
		h.load.becomes(t, "passed", (*outcome).passed)
	default:
		h.load.becomes(t, "refused", (*outcome).refused)
	}
	if f.mends != nil {
		f.mends(t, h)
	}
	h.load.becomes(t, "relayed again", (*outcome).relayed)
	f.judge(t, h.load.stop(t), setting, w)
}

// some waits until there were connections for a while.
func (f *faulty) some(t *testing.T, d time.Duration) {
	start := now()
	testutil.Eventually(t, rig.Limit, func() bool {
		return now()-start > int64(d) && len(f.load.since(start)) > 20
	}, "some connections")
}

// judge looks at every outcome. In the window a connection may suffer; it never
// reaches who it is not for.
func (f fault) judge(t *testing.T, all []outcome, setting string, w window) {
	t.Helper()
	counts := map[string]int{}
	defer func() { t.Logf("%d connections: %v", len(all), counts) }()
	for _, o := range all {
		if strings.HasPrefix(o.Said, selfName) {
			t.Errorf("the application reached itself: %s", &o)
		}
		if o.connected() && o.Peer != o.To {
			t.Errorf("getpeername says %s: %s", o.Peer, &o)
		}
		switch {
		case o.relayed():
			counts["relayed"]++
		case o.passed() && (setting == "open" || f.escapes && w.touches(&o)):
			counts["passed"]++
		case o.refused() && setting == "closed":
			counts["refused"]++
			if time.Duration(o.Took) > 300*time.Millisecond && !f.vague && !w.touches(&o) {
				t.Errorf("not refused at once: %s", &o)
			}
		case w.touches(&o) && !o.connected():
			counts["failed"]++
		case w.touches(&o):
			counts["unserved"]++
		default:
			if counts["wrong"]++; counts["wrong"] < 5 {
				t.Errorf("%v after the fault, %v after its window: %s", time.Duration(o.Start-w.from), time.Duration(o.Start-w.to), &o)
			}
		}
	}
}

func waitState(t *testing.T, pid int, state string) {
	t.Helper()
	testutil.Eventually(t, rig.Limit, func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		return fields[0] == state
	}, "process state ", state)
}

func limitFiles(t *testing.T, pid int, n uint64) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &old); err != nil {
		t.Fatal(err)
	}
	old.Cur = min(n, old.Max)
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &old, nil); err != nil {
		t.Fatal(err)
	}
}

func detachPin(t *testing.T, name, pin string) {
	t.Helper()
	l, err := link.LoadPinnedLink(filepath.Join(pinDir(name), pin), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.(interface{ Detach() error }).Detach(); err != nil {
		t.Fatal(err)
	}
}

// quotas are the ways to leave a process five milliseconds of a second.
var quotas = []struct {
	root  string
	files []string // file, value, file, value...
}{
	{"/sys/fs/cgroup", []string{"cpu.max", "5000 1000000"}},
	{"/sys/fs/cgroup/unified", []string{"cpu.max", "5000 1000000"}},
	{"/sys/fs/cgroup/cpu", []string{"cpu.cfs_period_us", "1000000", "cpu.cfs_quota_us", "5000"}},
}

// throttle leaves a process next to no processor time, and returns what ends
// that: by a controller, or else by busy loops beside it.
func throttle(t *testing.T, pid int) (end func()) {
	t.Helper()
	for _, q := range quotas {
		dir := filepath.Join(q.root, fmt.Sprintf("pillion-test-slow-%d", pid))
		if os.Mkdir(dir, 0o755) != nil {
			continue
		}
		t.Cleanup(func() {
			testutil.Eventually(t, rig.Limit, func() bool {
				err := os.Remove(dir)
				return err == nil || errors.Is(err, os.ErrNotExist)
			}, "remove ", dir)
		})
		ok := true
		for n := 0; n < len(q.files) && ok; n += 2 {
			// Without O_CREATE: what is not there is no cgroup.
			f, err := os.OpenFile(filepath.Join(dir, q.files[n]), os.O_WRONLY, 0)
			if ok = err == nil; ok {
				_, err = f.WriteString(q.files[n+1])
				f.Close()
				ok = err == nil
			}
		}
		if !ok {
			continue
		}
		move := func(dir string) {
			if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
				t.Fatal(err)
			}
		}
		move(dir)
		return func() { move(q.root) }
	}
	return busy(t, pid)
}

// busy loops on every processor, at the highest priority, against a process at
// the lowest.
func busy(t *testing.T, pid int) (end func()) {
	t.Helper()
	niced := func(pid, nice int) {
		if err := unix.Setpriority(unix.PRIO_PROCESS, pid, nice); err != nil {
			t.Fatal(err)
		}
	}
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range threads {
		tid, _ := strconv.Atoi(e.Name())
		niced(tid, 19)
	}
	var loops []*exec.Cmd
	for range runtime.NumCPU() {
		cmd := exec.Command("sh", "-c", "while :; do :; done")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		niced(cmd.Process.Pid, -20)
		loops = append(loops, cmd)
	}
	var once sync.Once
	end = func() {
		once.Do(func() {
			for _, cmd := range loops {
				cmd.Process.Kill()
				cmd.Wait()
			}
		})
	}
	t.Cleanup(end)
	return end
}

func (f *faulty) status(t *testing.T) (s struct{ Slots4, Slots6 string }) {
	t.Helper()
	got, err := f.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	s.Slots4, s.Slots6 = got.Slots4, got.Slots6
	return s
}
