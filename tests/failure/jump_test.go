package failure

import (
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// envJump is a unix socket. It makes this test binary one that has the test
// answer every system call which reads the wall clock, and then executes its
// arguments. The wall clock of a machine is everybody's, and no namespace has one
// of its own.
const envJump = "PILLION_FAILURE_JUMP"

// letIn returns only if it fails.
func letIn(args []string) error {
	// A filter is a thread's, and what it executes inherits it.
	runtime.LockOSThread()
	watched, err := watchClock()
	if err != nil {
		return err
	}
	c, err := net.Dial("unix", os.Getenv(envJump))
	if err != nil {
		return err
	}
	if _, _, err := c.(*net.UnixConn).WriteMsgUnix([]byte{0}, unix.UnixRights(watched), nil); err != nil {
		return err
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		return err
	}
	if err := os.Unsetenv(envJump); err != nil {
		return err
	}
	return unix.Exec(args[0], args, os.Environ())
}

// watchClock makes clock_gettime(CLOCK_REALTIME) of this thread, and of what it
// executes, an event of the descriptor that it returns.
func watchClock() (int, error) {
	const nr, arg0 = 0, 16 // in struct seccomp_data
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: nr},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_CLOCK_GETTIME, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: arg0},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.CLOCK_REALTIME, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return -1, fmt.Errorf("seccomp: %w", errno)
	}
	return int(fd), nil
}

// wallClock is that of one process.
type wallClock struct {
	jump  atomic.Int64 // ns, that it is ahead
	reads atomic.Int64
	ln    net.Listener
	done  chan error
}

// ownClock gives the instance a wall clock of its own.
func ownClock(t *testing.T, s *stage) string {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "clock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c := &wallClock{ln: ln, done: make(chan error, 1)}
	go func() { c.done <- c.serve() }()
	// After the instance, which cannot read the clock any more then.
	t.Cleanup(func() {
		ln.Close()
		if err := <-c.done; err != nil {
			t.Errorf("the clock: %v", err)
		}
	})
	s.Wrap = []string{"env", envJump + "=" + path, self}
	s.extra = c
	return ""
}

// serve answers one process until it has ended.
func (c *wallClock) serve() error {
	conn, err := c.ln.Accept()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return err
	}
	fd, err := testutil.PassedFD(oob[:n])
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if _, err := conn.Write([]byte{0}); err != nil {
		return err
	}
	for {
		ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(ready, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if ready[0].Revents&unix.POLLIN == 0 && ready[0].Revents != 0 {
			return nil // it has ended
		}
		if err := c.answer(fd); err != nil {
			return err
		}
	}
}

// notification and response are struct seccomp_notif and seccomp_notif_resp.
type notification struct {
	id         uint64
	pid, flags uint32
	nr, arch   uint32
	ip         uint64
	args       [6]uint64
}

type response struct {
	id        uint64
	val       int64
	err       int32
	responded uint32
}

const (
	notifReceive = 0xc0502100
	notifSend    = 0xc0182101
)

func (c *wallClock) answer(fd int) error {
	var n notification
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), notifReceive, uintptr(unsafe.Pointer(&n))); errno != 0 {
		if errno == unix.ENOENT || errno == unix.EINTR {
			return nil // the thread was interrupted, and asks again
		}
		return fmt.Errorf("receive: %w", errno)
	}
	at := time.Now().UnixNano() + c.jump.Load()
	text := binary.NativeEndian.AppendUint64(nil, uint64(at/1e9))
	text = binary.NativeEndian.AppendUint64(text, uint64(at%1e9))
	local := unix.Iovec{Base: &text[0], Len: uint64(len(text))}
	if _, err := unix.ProcessVMWritev(int(n.pid), []unix.Iovec{local}, []unix.RemoteIovec{{Base: uintptr(n.args[1]), Len: len(text)}}, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return fmt.Errorf("write the time: %w", err)
	}
	c.reads.Add(1)
	r := response{id: n.id}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), notifSend, uintptr(unsafe.Pointer(&r))); errno != 0 && errno != unix.ENOENT {
		return fmt.Errorf("send: %w", errno)
	}
	return nil
}

// jumps moves the wall clock of the instance, for good.
func jumps(by time.Duration) func(*testing.T, *stage) {
	return func(t *testing.T, s *stage) {
		c := s.extra.(*wallClock)
		c.jump.Store(int64(by))
		noVDSO(t, s)
	}
}

// noVDSO has the Go runtime of the instance read clocks by system call, as it does
// where the kernel maps no code for that.
func noVDSO(t *testing.T, s *stage) {
	t.Helper()
	f, err := elf.Open(rig.Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	symbols, err := f.Symbols()
	if err != nil {
		t.Fatal(err)
	}
	for _, sym := range symbols {
		if sym.Name != "runtime.vdsoClockgettimeSym" {
			continue
		}
		mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", s.Cmd.Process.Pid), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer mem.Close()
		if _, err := mem.WriteAt(make([]byte, 8), int64(sym.Value)); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatal("the binary has no such symbol: is it stripped?")
}

// jumped wants the instance to have read the clock that jumped.
func jumped(t *testing.T, s *stage) {
	testutil.Eventually(t, rig.Limit, func() bool {
		s.status(t)
		return s.extra.(*wallClock).reads.Load() > 20
	}, "it has read the clock")
}

// setBack has the clock be right again.
func setBack(_ *testing.T, s *stage) { s.extra.(*wallClock).jump.Store(0) }

// inTime has the instance see another monotonic clock than the kernel's programs
// do, as a container that was restored from a checkpoint does.
func inTime(seconds string) func(*testing.T, *stage) string {
	return func(t *testing.T, s *stage) string {
		testutil.Need(t, "unshare")
		s.Wrap = []string{"unshare", "-T", "--monotonic", seconds, "--"}
		return ""
	}
}

// TestOneClock: the kernel's programs go by one clock, which nobody can set.
func TestOneClock(t *testing.T) {
	specs, err := bpf.Specs()
	if err != nil {
		t.Fatal(err)
	}
	others := []asm.BuiltinFunc{asm.FnKtimeGetBootNs, asm.FnKtimeGetCoarseNs, asm.FnKtimeGetTaiNs, asm.FnJiffies64}
	reads := 0
	for _, spec := range specs {
		for name, prog := range spec.Programs {
			for _, ins := range prog.Instructions {
				if !ins.IsBuiltinCall() {
					continue
				}
				f := asm.BuiltinFunc(ins.Constant)
				if slices.Contains(others, f) {
					t.Errorf("%s calls %v", name, f)
				}
				if f == asm.FnKtimeGetNs {
					reads++
				}
			}
		}
	}
	if reads == 0 {
		t.Error("no program reads a clock: the test tests nothing")
	}
}
