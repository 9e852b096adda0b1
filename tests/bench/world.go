package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/loader/probe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses of the world. The server's is none of loopback's, whose connections
// the kernel treats better (TIME_WAIT), and Pillion not at all.
var (
	podAddr     = netip.MustParsePrefix("192.0.2.1/24")
	worldAddr   = netip.MustParsePrefix("198.51.100.7/32")
	server      = netip.AddrPortFrom(worldAddr.Addr(), 9000)
	serviceAddr = netip.MustParseAddrPort("10.96.0.12:9000")
	mirrorAddr  = netip.MustParseAddrPort("10.96.0.13:9000")
	haproxyAddr = netip.AddrPortFrom(podAddr.Addr(), 7001)
	nginxAddr   = netip.AddrPortFrom(podAddr.Addr(), 7002)
)

const (
	// startLimit is how long a program may take to start, endLimit to end.
	startLimit = 20 * time.Second
	endLimit   = 20 * time.Second
	// settle is how long a proxy has after the client's end to end too.
	settle = 20 * time.Millisecond
	// repeatsMax is how many measurements may fail and be made again.
	repeatsMax = 3
)

// world is everything that must be gone in the end.
type world struct {
	dir    string
	server *process
	pill   *pillion
	// spinners have what of the processors nobody else wants, others what is
	// no part of any work: Pillions whose turn it is not.
	spinners, others []*process
	// clientOn has a client keep to a processor; nil: it does not.
	clientOn func(start func() error) error
	// The clients' cgroups: one that Pillion captures, one beside it.
	scope, beside *os.File
	undo          []func() error // in the order of doing
	repeats       int
}

// newWorld is an empty one. If it fails, it leaves nothing.
func newWorld() (w *world, err error) {
	w = &world{}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.dir, err = os.MkdirTemp("", "pillion-bench-"); err != nil {
		return w, err
	}
	w.later(func() error { return os.RemoveAll(w.dir) })
	if w.scope, err = w.cgroup("scope"); err != nil {
		return w, err
	}
	w.beside, err = w.cgroup("beside")
	return w, err
}

// furnish makes what part relay needs in the network namespace that the process
// is in.
func (w *world) furnish() error {
	if err := furnish(); err != nil {
		return fmt.Errorf("furnish the network namespace: %w", err)
	}
	return w.serve(server)
}

// serve starts the server.
func (w *world) serve(addrs ...netip.AddrPort) (err error) {
	var args []string
	for _, a := range addrs {
		args = append(args, a.String())
	}
	if w.server, err = w.startSelf(roleServer, args...); err != nil {
		return err
	}
	for _, a := range args {
		if err := answers(a, startLimit); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) later(f func() error) { w.undo = append(w.undo, f) }

// close takes everything away, last things first.
func (w *world) close() error {
	var errs []error
	for _, f := range slices.Backward(w.undo) {
		errs = append(errs, f())
	}
	w.undo = nil
	return errors.Join(errs...)
}

// furnish gives the namespace addresses and a default route, which leads nowhere.
func furnish() error {
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer0"}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth: %w", err)
	}
	for _, name := range []string{"lo", "eth0", "peer0"} {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("set %s up: %w", name, err)
		}
	}
	for _, p := range []netip.Prefix{podAddr, worldAddr} {
		a, err := netlink.ParseAddr(p.String())
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(veth, a); err != nil {
			return fmt.Errorf("add %s: %w", p, err)
		}
	}
	gw := net.IP(podAddr.Addr().Next().AsSlice())
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: veth.Attrs().Index, Gw: gw}); err != nil {
		return fmt.Errorf("add default route: %w", err)
	}
	// With thousands of ports in TIME_WAIT, what is measured is the search for
	// a free one.
	return os.WriteFile("/proc/sys/net/ipv4/tcp_max_tw_buckets", []byte("500"), 0)
}

// cgroup makes a cgroup of the v2 hierarchy.
func (w *world) cgroup(kind string) (*os.File, error) {
	root, err := probe.CgroupRoot()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(root, fmt.Sprintf("pillion-bench-%d-%s", os.Getpid(), kind))
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.Open(path)
	w.later(func() error { return errors.Join(dir.Close(), removeCgroup(path)) })
	return dir, err
}

// removeCgroup ends what is in a cgroup and removes it.
func removeCgroup(path string) error {
	if err := os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0); err != nil {
		return err
	}
	end := time.Now().Add(endLimit)
	for {
		err := os.Remove(path)
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// process is a program that runs as long as the world.
type process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
	err  error // once done is closed
}

// start runs a program until the world ends. What it says goes to a file.
func (w *world) start(name string, args ...string) (*process, error) {
	log, err := os.CreateTemp(w.dir, "log-")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &process{name: filepath.Base(name), cmd: cmd, done: make(chan struct{})}
	go p.wait()
	w.later(func() error {
		if err := p.stop(); err != nil {
			said, _ := os.ReadFile(log.Name())
			return fmt.Errorf("%w\n%s", err, said)
		}
		return nil
	})
	return p, nil
}

func (w *world) startSelf(role string, args ...string) (*process, error) {
	return w.start("/proc/self/exe", append([]string{role}, args...)...)
}

func (p *process) wait() {
	p.err = p.cmd.Wait()
	close(p.done)
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// stop ends the process. It is an error if it has ended before.
func (p *process) stop() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s has ended by itself: %w", p.name, p.err)
	default:
	}
	// It has ended or will.
	_ = p.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(endLimit):
		_ = p.cmd.Process.Kill()
		<-p.done
		return fmt.Errorf("%s did not end within %v", p.name, endLimit)
	}
}

func (w *world) startSpinners() error {
	cpus, err := processors()
	if err != nil {
		return err
	}
	for _, cpu := range cpus {
		p, err := w.startSelf(roleSpin, strconv.Itoa(cpu))
		if err != nil {
			return err
		}
		w.spinners = append(w.spinners, p)
	}
	return nil
}

// sample is one measurement: costs in ns per unit of work.
type sample struct {
	// Proxy is the processor time of the proxy, All that of client, server and
	// proxy together.
	Proxy float64 `json:"proxy_ns"`
	All   float64 `json:"all_ns"`
	// Wall is the time on the wall, P50 the median of what the client timed.
	Wall float64 `json:"wall_ns"`
	P50  float64 `json:"p50_ns,omitempty"`
	// Machine is the processor time that the spinners did not get, less that of
	// Pillions whose turn it was not; 0 without spinners. It has also what the
	// kernel does for the work in nobody's name.
	Machine float64 `json:"machine_ns,omitempty"`
	// Programs is what Pillion's cost, of work workHook.
	Programs map[string]programCost `json:"programs,omitempty"`
}

// run is once with an arm. A few may fail: on a machine that is kept from
// working for half a second, Pillion is configured to refuse connections.
func (w *world) run(ctx context.Context, a *arm, wk work) (sample, error) {
	for {
		s, err := w.once(ctx, a, wk)
		if err == nil || ctx.Err() != nil || w.repeats == repeatsMax {
			return s, err
		}
		w.repeats++
		fmt.Fprintf(os.Stderr, "\n%s, %s: %v: once more\n", wk.Name, a.name, err)
		if err := pause(ctx, time.Second); err != nil {
			return s, err
		}
	}
}

func (w *world) once(ctx context.Context, a *arm, wk work) (s sample, err error) {
	j := job{Work: wk}
	for _, addr := range a.addrs {
		j.Addrs = append(j.Addrs, addr.String())
	}
	spec, err := json.Marshal(j)
	if err != nil {
		return s, err
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", roleClient, string(spec))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, UseCgroupFD: true, CgroupFD: int(a.cgroup.Fd())}
	in, err := cmd.StdinPipe()
	if err != nil {
		return s, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return s, err
	}
	start := cmd.Start
	if w.clientOn != nil {
		start = func() error { return w.clientOn(cmd.Start) }
	}
	if err := within(a.netns, start); err != nil {
		return s, fmt.Errorf("start client: %w", err)
	}
	defer func() {
		in.Close()
		err = errors.Join(err, cmd.Wait())
	}()
	lines := bufio.NewReader(out)
	if _, err := lines.ReadString('\n'); err != nil {
		return s, fmt.Errorf("wait for client: %w", err)
	}
	if wk.Name == workHook {
		// Not by kernel.bpf_stats_enabled: with the file the kernel closes
		// this again, however the bench ends.
		stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
		if err != nil {
			return s, fmt.Errorf("have programs timed: %w", err)
		}
		defer stats.Close()
	}
	before, err := w.clocks(a)
	if err != nil {
		return s, err
	}
	if _, err := in.Write([]byte("\n")); err != nil {
		return s, fmt.Errorf("start client: %w", err)
	}
	var r result
	if err := json.NewDecoder(lines).Decode(&r); err != nil {
		return s, fmt.Errorf("read result of client: %w", err)
	}
	if err := pause(ctx, settle); err != nil {
		return s, err
	}
	after, err := w.clocks(a)
	if err != nil {
		return s, err
	}
	a.opened += r.Opened
	n := float64(wk.Ops)
	s.Proxy = float64(after.proxy-before.proxy) / n
	s.All = s.Proxy + float64(after.server-before.server+r.CPU)/n
	s.Wall, s.P50 = float64(r.Wall)/n, float64(r.P50)
	if len(w.spinners) > 0 {
		processors := int64(len(w.spinners))
		s.Machine = float64(processors*(after.now-before.now)-(after.unused-before.unused)) / n
	}
	if wk.Name == workHook {
		s.Programs, err = costs(before.programs, after.programs, n)
	}
	return s, err
}

// clocks are processor times in ns, but for now.
type clocks struct {
	proxy, server int64
	// unused is that of the spinners and of what is no part of the work.
	unused int64
	// now is read in the middle.
	now      int64
	programs map[string]tally
}

func (w *world) clocks(a *arm) (c clocks, err error) {
	if a.process != nil {
		if c.proxy, err = cpuOf(a.process.pid()); err != nil {
			return c, err
		}
	}
	if c.server, err = cpuOf(w.server.pid()); err != nil {
		return c, err
	}
	for _, p := range slices.Concat(w.spinners, w.others) {
		if p == a.process {
			continue
		}
		ns, err := processClock(p.pid())
		if err != nil {
			return c, err
		}
		c.unused += ns
	}
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		return c, err
	}
	c.now = t.Nano()
	c.programs, err = a.programs.tallies()
	return c, err
}
