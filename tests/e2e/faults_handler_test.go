package e2e

import (
	"bytes"
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

// TestThrottled leaves Pillion next to no processor time, under load, in both
// settings of on_failure: what it cannot carry goes by that, and all is well
// again afterwards. At no time does the application reach itself. Other faults
// are in tests/failure.
func TestThrottled(t *testing.T) {
	for _, setting := range []string{"open", "closed"} {
		t.Run(setting, func(t *testing.T) {
			g := newGround(t)
			i := g.Run(t, "on_failure: "+setting+"\nrelay: {workers: 1}")
			j := g.job()
			j.Patience = 20 * time.Second // an open connection may wait for it
			l := startLoad(t, g.Rig, j)
			l.becomes(t, "relayed", (*outcome).relayed)
			w := window{from: now()}
			end := throttle(t, i.Cmd.Process.Pid)
			w.to = now()
			l.some(t, 3*time.Second)
			end()
			l.becomes(t, "relayed again", (*outcome).relayed)
			judge(t, l.stop(t), setting, w)
		})
	}
}

// some waits until there were connections for a while.
func (l *load) some(t *testing.T, d time.Duration) {
	t.Helper()
	start := now()
	testutil.Eventually(t, rig.Limit, func() bool {
		return now()-start > int64(d) && len(l.since(start)) > 20
	}, "some connections")
}

// judge looks at every outcome. In the window a connection may suffer; it never
// reaches who it is not for.
func judge(t *testing.T, all []outcome, setting string, w window) {
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
		case o.passed() && setting == "open":
			counts["passed"]++
		case o.refused() && setting == "closed":
			counts["refused"]++
		case w.touches(&o) && !o.connected():
			counts["failed"]++
		case w.touches(&o):
			counts["unserved"]++
		default:
			if counts["wrong"]++; counts["wrong"] < 5 {
				t.Errorf("%v after the fault: %s", time.Duration(o.Start-w.from), &o)
			}
		}
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
