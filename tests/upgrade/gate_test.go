package upgrade

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// A gate holds a process at a system call that it is about to make: the one that swaps a
// hook, or that gives a map its name. All else of the process goes on. So it can be killed
// between any two of them, with nothing in it that knows of tests: a seccomp filter, which
// its children inherit, has these calls wait for the test.

// envGate has TestGated put itself behind the gate at this path.
const envGate = "PILLION_TEST_UPGRADE_GATE"

// point is a place between such calls: so many hooks were swapped, or so many maps have
// got their names.
type point struct {
	names bool
	n     int
}

// gate is where processes are held.
type gate struct {
	ln   *net.UnixListener
	stop chan struct{}
	done sync.WaitGroup

	mu   sync.Mutex
	at   point
	seen int      // calls of that kind
	held chan int // pids; nil: nobody is to be held
}

// newGate has every pillion run of a rig pass the gate.
func newGate(t testing.TB, r *rig.Rig) *gate {
	t.Helper()
	path := filepath.Join(t.TempDir(), "gate")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{ln: ln, stop: make(chan struct{})}
	r.Wrap = []string{os.Args[0], "-test.run=^TestGated$", "--"}
	r.Env = append(r.Env, envGate+"="+path)
	g.done.Go(g.accept)
	t.Cleanup(func() {
		close(g.stop)
		g.ln.Close()
		g.done.Wait()
	})
	return g
}

// hold has the next process that comes to a point wait there. The channel tells which.
func (g *gate) hold(at point) <-chan int {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.at, g.seen, g.held = at, 0, make(chan int, 1)
	return g.held
}

func (g *gate) accept() {
	for {
		c, err := g.ln.AcceptUnix()
		if err != nil {
			return
		}
		fd, err := receiveFD(c)
		c.Close()
		if err == nil {
			g.done.Go(func() { g.serve(fd) })
		}
	}
}

func receiveFD(c *net.UnixConn) (int, error) {
	b, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		return -1, err
	}
	return testutil.PassedFD(oob[:n])
}

// notif and notifResp are struct seccomp_notif and seccomp_notif_resp.
type notif struct {
	id         uint64
	pid, flags uint32
	nr         int32
	arch       uint32
	ip         uint64
	args       [6]uint64
}

type notifResp struct {
	id    uint64
	val   int64
	err   int32
	flags uint32
}

// serve answers for the processes of one filter, until they are gone.
func (g *gate) serve(fd int) {
	defer unix.Close(fd) // who is held then gets an error
	for {
		select {
		case <-g.stop:
			return
		default:
		}
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 50)
		if n == 0 || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || p[0].Revents&unix.POLLIN == 0 {
			return
		}
		var q notif
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&q))); e != 0 {
			continue // it was killed before it was told of
		}
		if !g.passes(&q) {
			continue
		}
		r := notifResp{id: q.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
		_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&r)))
	}
}

// passes counts a call, or holds who makes it.
func (g *gate) passes(q *notif) bool {
	names := q.nr != unix.SYS_BPF
	if names && !strings.HasSuffix(renamed(q), "_next") {
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.held == nil || names != g.at.names {
		return true
	}
	if g.seen++; g.seen <= g.at.n {
		return true
	}
	g.held <- processOf(int(q.pid))
	g.held = nil
	return false
}

// renamed is the old name in a call that renames.
func renamed(q *notif) string {
	b := make([]byte, 256)
	n, err := unix.ProcessVMReadv(int(q.pid), []unix.Iovec{{Base: &b[0], Len: uint64(len(b))}},
		[]unix.RemoteIovec{{Base: uintptr(q.args[1]), Len: len(b)}}, 0)
	if err != nil {
		return ""
	}
	name, _, _ := strings.Cut(string(b[:n]), "\x00")
	return name
}

// processOf is the process of a thread.
func processOf(thread int) (pid int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", thread))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), "\nTgid:")
	fmt.Sscan(rest, &pid)
	return pid
}

// TestGated becomes the program that its arguments name, behind a gate. As a test it does
// nothing.
func TestGated(*testing.T) {
	path := os.Getenv(envGate)
	if path == "" || flag.NArg() == 0 {
		return
	}
	fmt.Fprintln(os.Stderr, enterGate(path, flag.Args()))
	os.Exit(1)
}

func enterGate(path string, line []string) error {
	runtime.LockOSThread() // the filter is the thread's, and what is executed on it
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return err
	}
	fd, err := filterCalls()
	if err != nil {
		return fmt.Errorf("filter system calls: %w", err)
	}
	if _, _, err := c.WriteMsgUnix([]byte{0}, unix.UnixRights(fd), nil); err != nil {
		return err
	}
	return unix.Exec(line[0], line, os.Environ())
}

// filterCalls has the calls of this thread, and of what becomes of it, wait for who has
// the descriptor.
func filterCalls() (int, error) {
	const (
		linkUpdate = 29 // BPF_LINK_UPDATE
		load       = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal      = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		result     = unix.BPF_RET | unix.BPF_K
	)
	// struct seccomp_data begins with the number of the call; its arguments follow at 16.
	code := []unix.SockFilter{
		{Code: load, K: 0},
		{Code: equal, K: unix.SYS_RENAMEAT, Jt: 4},
		{Code: equal, K: unix.SYS_RENAMEAT2, Jt: 3},
		{Code: equal, K: unix.SYS_BPF, Jf: 3},
		{Code: load, K: 16},
		{Code: equal, K: linkUpdate, Jf: 1},
		{Code: result, K: unix.SECCOMP_RET_USER_NOTIF},
		{Code: result, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	// A signal does not have a call that waits begin again.
	const flags = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	fd, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	if e != 0 {
		return -1, e
	}
	return int(fd), nil
}
