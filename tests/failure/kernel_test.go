package failure

import (
	"context"
	"encoding/binary"
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
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// pins is where the instance's are.
func (s *stage) pins() string { return filepath.Join(loader.BPFFS, "pillion", s.Name) }

func (s *stage) status(t *testing.T) admin.Status {
	t.Helper()
	st, err := s.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// says waits until status tells of a problem.
func (s *stage) says(t *testing.T, problem string) {
	t.Helper()
	testutil.Eventually(t, rig.Limit, func() bool {
		return strings.Contains(strings.Join(s.status(t).Problems, "\n"), problem)
	}, "status says ", problem)
}

// counted returns a counter of the kernel side.
func (s *stage) counted(t *testing.T, reason string) uint64 { return s.Reasons(t)[reason] }

// command runs a program in the application's namespace, out of scope.
func (s *stage) command(t *testing.T, name string, args ...string) {
	t.Helper()
	testutil.Need(t, name)
	cmd := exec.Command(name, args...)
	var out rig.Log
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := s.App.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out.String())
	}
}

// unroute takes the slots' routes away.
func unroute(t *testing.T, s *stage) { s.unroute(t, s.status(t)) }

func (s *stage) unroute(t *testing.T, st admin.Status) {
	t.Helper()
	s.command(t, "ip", "route", "del", "table", "local", st.Slots4)
	s.command(t, "ip", "-6", "route", "del", "table", "local", st.Slots6)
}

// firewall drops what goes to slots.
func firewall(t *testing.T, s *stage) {
	st := s.status(t)
	s.command(t, "nft", "add table inet faults; add chain inet faults in { type filter hook input priority 0; }; "+
		"add rule inet faults in ip daddr "+st.Slots4+" drop; add rule inet faults in ip6 daddr "+st.Slots6+" drop")
}

func noFirewall(t *testing.T, s *stage) { s.command(t, "nft", "delete table inet faults") }

// loDown switches the interface off that slots are reached by.
func loDown(t *testing.T, s *stage) { s.command(t, "ip", "link", "set", "lo", "down") }
func loUp(t *testing.T, s *stage)   { s.command(t, "ip", "link", "set", "lo", "up") }

// shortQueue bounds the accept queue of the namespace's listeners.
func shortQueue(length string) func(*testing.T, *stage) string {
	return func(t *testing.T, s *stage) string {
		s.App.Sysctl(t, "net/core/somaxconn", length)
		return ""
	}
}

// noFiles and files bound the descriptors of the handler, which then cannot
// accept.
func noFiles(t *testing.T, s *stage) { limitFiles(t, s, 8) }
func files(t *testing.T, s *stage)   { limitFiles(t, s, 20000) }

func limitFiles(t *testing.T, s *stage, n uint64) {
	t.Helper()
	var l unix.Rlimit
	if err := unix.Prlimit(s.Cmd.Process.Pid, unix.RLIMIT_NOFILE, nil, &l); err != nil {
		t.Fatal(err)
	}
	l.Cur = min(n, l.Max)
	if err := unix.Prlimit(s.Cmd.Process.Pid, unix.RLIMIT_NOFILE, &l, nil); err != nil {
		t.Fatal(err)
	}
}

// hang stops the handler's only worker, and no other thread.
func hang(t *testing.T, s *stage) {
	t.Helper()
	s.undo = hold(t, worker(t, s.Cmd.Process.Pid))
}

// worker finds the thread that waits for connections.
func worker(t *testing.T, pid int) (tid int) {
	t.Helper()
	testutil.Eventually(t, rig.Limit, func() bool {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			call, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/syscall", pid, task.Name()))
			if err != nil {
				continue
			}
			var nr, epfd int
			if n, _ := fmt.Sscanf(string(call), "%d %v", &nr, &epfd); n < 2 || nr != unix.SYS_EPOLL_PWAIT && nr != epollWait {
				continue
			}
			info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, epfd))
			if err == nil && listens(pid, string(info)) {
				tid, err = strconv.Atoi(task.Name())
				return err == nil
			}
		}
		return false
	}, "the worker waits")
	return tid
}

// epollWait is the call that not every architecture has.
const epollWait = 232

// listens tells whether an epoll instance looks at a TCP socket that listens: only
// the workers' do.
func listens(pid int, fdinfo string) bool {
	var tables strings.Builder
	for _, name := range []string{"tcp", "tcp6"} {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, name))
		tables.Write(b)
	}
	listening := map[string]bool{}
	for line := range strings.Lines(tables.String()) {
		if w := strings.Fields(line); len(w) > 9 && w[3] == "0A" {
			listening["socket:["+w[9]+"]"] = true
		}
	}
	for line := range strings.Lines(fdinfo) {
		var fd int
		if n, _ := fmt.Sscanf(line, "tfd: %d", &fd); n < 1 {
			continue
		}
		if what, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); listening[what] {
			return true
		}
	}
	return false
}

// busy wants the accept queue to be a reason. On a busy machine the heartbeat may
// be old before the queue is looked at: then it is tried again.
func busy(t *testing.T, s *stage) {
	for range 10 {
		if s.counted(t, "handler_busy") > 0 {
			return
		}
		start := now()
		hang(t, s)
		s.becomes(t, start, func(kind string) word { return byFailure(kind, s.setting) })
		s.undo()
		s.becomes(t, now(), usual)
	}
	t.Error("nothing is counted as handler_busy")
}

// crowd opens connections until no more are redirected. None may end meanwhile,
// which would make room for one more.
func crowd(t *testing.T, s *stage) {
	s.do(t, order{Do: "quiet"})
	defer s.streams(t)
	const enough = 5
	for row := 0; row < enough; {
		for _, o := range s.do(t, order{Do: "open", Key: "crowd", To: s.to[toRelay], Count: 1, Patience: patience}) {
			switch o.Word {
			case carried:
				row = 0
			case byFailure(toRelay, s.setting):
				row++
			default:
				t.Fatalf("one of a crowd: %s", &o)
			}
		}
	}
}

func disperse(t *testing.T, s *stage) { s.do(t, order{Do: "close", Key: "crowd"}) }

// full wants a reason to be counted.
func full(reason string) func(*testing.T, *stage) {
	return func(t *testing.T, s *stage) {
		if n := s.counted(t, reason); n < attempts {
			t.Errorf("%d connections are counted as %s, want %d at least", n, reason, attempts)
		}
	}
}

// fresh are addresses that nobody has connected to.
var freshNet = netip.MustParsePrefix("198.18.0.0/16")

// manyServers gives the world a network of addresses, and a server on all.
func manyServers(t *testing.T, s *stage) string {
	s.World.Do(t, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		_, dst, err := parseNet(freshNet)
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: dst, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: unix.RT_SCOPE_HOST})
	})
	s.Serve(t, netip.AddrPortFrom(netip.IPv4Unspecified(), manyPort), introduce(origin))
	s.extra = new(int)
	return ""
}

// newAddresses has tries of what no service names go where none went before.
func newAddresses(s *stage, kind string) []netip.AddrPort {
	if kind != toUnnamed {
		return nil
	}
	n := s.extra.(*int)
	var all []netip.AddrPort
	for range attempts {
		*n++
		a := freshNet.Addr().As4()
		binary.BigEndian.PutUint16(a[2:], uint16(*n))
		all = append(all, netip.AddrPortFrom(netip.AddrFrom4(a), manyPort))
	}
	return all
}

// noSlots takes all slots that no destination has; their number is in memory
// that the kernel side shares.
func noSlots(t *testing.T, s *stage) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(s.pins(), "state"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	page, err := unix.Mmap(m.FD(), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	next := &(*bpf.State)(unsafe.Pointer(&page[0])).NextSlot
	before := *next
	*next = bpf.SlotLast + 1
	s.undo = sync.OnceFunc(func() {
		*next = before
		unix.Munmap(page)
	})
	t.Cleanup(s.undo)
}

func undo(_ *testing.T, s *stage) { s.undo() }

// stuckRing is a record of the ring of events that is reserved and never
// committed: the reader waits for it, and what comes behind fills the ring.
type stuckRing struct {
	fault int // a userfaultfd
	page  []byte
	done  chan error
}

// fillRing has the kernel wait in the middle of a record, for a page that nobody
// brings, and then lets the application fill the ring.
func fillRing(t *testing.T, s *stage) {
	ring, err := ebpf.LoadPinnedMap(filepath.Join(s.pins(), "events"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer ring.Close()
	r := &stuckRing{done: make(chan error, 1)}
	if err := r.open(); err != nil {
		t.Fatal(err)
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.Syscall, Flags: unix.BPF_F_SLEEPABLE, License: "GPL",
		Instructions: asm.Instructions{
			asm.LoadMapPtr(asm.R1, ring.FD()),
			asm.Mov.Imm(asm.R2, 8),
			asm.Mov.Imm(asm.R3, 0),
			asm.FnRingbufReserve.Call(),
			asm.JEq.Imm(asm.R0, 0, "exit"),
			asm.Mov.Reg(asm.R6, asm.R0),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, 8),
			asm.LoadImm(asm.R3, int64(uintptr(unsafe.Pointer(&r.page[0]))), asm.DWord),
			asm.FnCopyFromUser.Call(),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, 0),
			asm.FnRingbufDiscard.Call(),
			asm.Mov.Imm(asm.R0, 1),
			asm.Return().WithSymbol("exit"),
		},
	})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	go r.hold(prog)
	s.undo = sync.OnceFunc(func() {
		unix.Close(r.fault) // the kernel then brings the page itself
		if err := <-r.done; err != nil {
			t.Error(err)
		}
		unix.Munmap(r.page)
		prog.Close()
	})
	t.Cleanup(s.undo)
	// A connection that is denied is a record, and next to no work.
	nowhere := []netip.AddrPort{netip.MustParseAddrPort("100.64.0.1:80")}
	testutil.Eventually(t, rig.Limit, func() bool {
		s.do(t, order{Do: "try", To: nowhere, Count: 1000, Patience: patience})
		return s.lostInRing(t) > 0
	}, "records are lost")
}

// hold is the thread that waits in the kernel.
func (r *stuckRing) hold(prog *ebpf.Program) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ret, err := prog.Run(&ebpf.RunOptions{})
	if err == nil && ret != 1 {
		err = fmt.Errorf("the record was not reserved: %d", ret)
	}
	r.done <- err
}

// The calls of userfaultfd(2) that are needed.
const (
	uffdAPI           = 0xaa
	uffdioAPI         = 0xc018aa3f
	uffdioRegister    = 0xc020aa00
	uffdRegisterModes = 1 // missing pages
)

func (r *stuckRing) open() error {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		return fmt.Errorf("userfaultfd: %w", errno)
	}
	r.fault = int(fd)
	api := [3]uint64{uffdAPI}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uffdioAPI, uintptr(unsafe.Pointer(&api))); errno != 0 {
		return fmt.Errorf("userfaultfd: %w", errno)
	}
	var err error
	if r.page, err = unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON); err != nil {
		return fmt.Errorf("map a page: %w", err)
	}
	reg := [4]uint64{uint64(uintptr(unsafe.Pointer(&r.page[0]))), uint64(len(r.page)), uffdRegisterModes}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uffdioRegister, uintptr(unsafe.Pointer(&reg))); errno != 0 {
		return fmt.Errorf("userfaultfd: %w", errno)
	}
	return nil
}

func (s *stage) lostInRing(t *testing.T) int {
	t.Helper()
	return s.Metric(t, `pillion_records_lost_total{where="ring"}`)
}

// ringLoses wants more records to be lost, and status to say so.
func ringLoses(t *testing.T, s *stage) { s.says(t, "flow records of the kernel side were lost") }

// recorded wants new records to arrive.
func recorded(t *testing.T, s *stage) {
	before := ended(t, s)
	s.tries(t, s.app, toDirect, direct)
	testutil.Eventually(t, rig.Limit, func() bool { return ended(t, s) >= before+attempts }, "connections are on record again")
}

func ended(t *testing.T, s *stage) (n int) {
	for _, total := range s.Totals(t) {
		n += total.Count
	}
	return n
}
