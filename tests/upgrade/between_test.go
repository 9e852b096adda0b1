package upgrade

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/cmd/pillion/handover"
	"github.com/pillion-project/pillion/redirect/l4"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// between stands between the process that gives and the one that takes, and may do
// something before it passes a frame on.
type between struct {
	ln   net.Listener
	path string // of the giver's own socket
	stop chan struct{}
	done sync.WaitGroup

	mu     sync.Mutex
	frame  handover.Kind // before which do is called, once
	do     func()
	called bool
}

// newBetween takes the place of an instance's socket.
func newBetween(t *testing.T, runtime, name string) *between {
	t.Helper()
	path := filepath.Join(runtime, name+".takeover")
	b := &between{path: path + ".real", stop: make(chan struct{})}
	err := os.Link(path, b.path)
	if err == nil {
		b.ln, err = handover.Listen(path + ".between")
	}
	if err == nil {
		// There is no moment without a socket, which the giver would make again.
		err = os.Rename(path+".between", path)
	}
	if err != nil {
		t.Fatal(err)
	}
	b.done.Go(b.accept)
	t.Cleanup(func() {
		close(b.stop)
		b.ln.Close()
		b.done.Wait()
	})
	return b
}

// before has do called before the next frame of a kind is passed on.
func (b *between) before(k handover.Kind, do func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.frame, b.do, b.called = k, do, false
}

func (b *between) happened() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.called
}

func (b *between) accept() {
	for {
		taker, err := handover.Accept(b.ln)
		if err != nil {
			return
		}
		giver, err := handover.Dial(context.Background(), b.path)
		if err != nil {
			taker.Close()
			continue
		}
		b.done.Go(func() { b.pass(taker, giver) })
		b.done.Go(func() { b.pass(giver, taker) })
	}
}

// pass passes frames on until one end is closed, and then closes the other.
func (b *between) pass(from, to *handover.Conn) {
	defer to.Close()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-b.stop:
			from.Interrupt()
		case <-stop:
		}
	}()
	for {
		f, err := from.Receive()
		if err != nil {
			return
		}
		b.mu.Lock()
		do := b.do
		if f.Kind != b.frame || b.called {
			do = nil
		} else {
			b.called = true
		}
		b.mu.Unlock()
		if do != nil {
			do()
		}
		err = to.Send(f.Kind, f.Data, f.FDs)
		f.Close()
		if err != nil {
			return
		}
	}
}

// small is a stage with few connections.
func small(t *testing.T, more string) (*stage, task) {
	t.Helper()
	q := task{Conns: 40, Come: 1}
	return newStage(t, service(ends...)+more, q), q
}

// wait returns how a process ended.
func wait(t *testing.T, cmd *exec.Cmd) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		return err
	case <-time.After(2 * rig.Limit):
		cmd.Process.Kill()
		<-done
		t.Fatal("the process does not end")
		return nil
	}
}

// TestTakerDies kills the process that takes over, or stops it, at each point until it
// has said that it has everything. The one that gives goes on, with every byte, and
// the next one takes over.
func TestTakerDies(t *testing.T) {
	s, q := small(t, "")
	b := newBetween(t, s.Runtime, s.Name)
	for _, stops := range []bool{false, true} {
		for _, at := range []handover.Kind{handover.KindHello, handover.KindWelcome, handover.KindFreeze, handover.KindState} {
			if stops && at != handover.KindState {
				continue // nobody waits for it
			}
			pid := make(chan int, 1)
			b.before(at, func() {
				p := <-pid
				if !stops {
					unix.Kill(p, unix.SIGKILL)
					return
				}
				unix.Kill(p, unix.SIGSTOP)
				for !all(p, "T") {
					time.Sleep(time.Millisecond)
				}
			})
			cmd := s.Successor(t, rig.Binary(t))
			t.Cleanup(func() { cmd.Process.Kill() }) // if the test ended before
			pid <- cmd.Process.Pid
			if stops {
				testutil.Eventually(t, rig.Limit, func() bool {
					return strings.Contains(s.Log(), "i/o timeout")
				}, "the process that gives has given up")
				// Connections end although the other process has copies of them.
				s.turn(t)
				unix.Kill(cmd.Process.Pid, unix.SIGCONT)
			}
			if err := wait(t, cmd); err == nil {
				t.Fatalf("frame %d, stopped %v: the process that takes over ended well", at, stops)
			}
			if !b.happened() {
				t.Fatalf("frame %d did not come", at)
			}
			if status, err := s.Status(context.Background()); err != nil || status.Pid != s.Cmd.Process.Pid || !status.Ready {
				t.Fatalf("frame %d: the process that gives: %+v, %v", at, status, err)
			}
			s.turn(t)
		}
	}
	b.before(0, nil)
	s.Replace(t, rig.Binary(t))
	s.finish(t, q)
}

// TestGiverDies kills the process that gives. From the moment in which the other one
// has the connections it goes on with them; before, with all else.
func TestGiverDies(t *testing.T) {
	for name, at := range map[string]handover.Kind{
		"before it stands still": handover.KindFreeze, "with all sent": handover.KindHave, "with its last word": handover.KindCommit,
	} {
		t.Run(name, func(t *testing.T) {
			q := task{Conns: 40}
			s := newStage(t, service(ends...), q)
			b := newBetween(t, s.Runtime, s.Name)
			if at == handover.KindFreeze {
				// The connections die with their process: none are to be there.
				s.far.Finish()
				s.end(t)
			}
			old := s.Cmd
			b.before(at, func() {
				old.Process.Kill()
				// Passed on only when it is gone.
				for !all(old.Process.Pid, "Z") {
					time.Sleep(time.Millisecond)
				}
			})
			s.Inherits(t, rig.Binary(t))
			if !b.happened() {
				t.Fatal("nobody was killed")
			}
			if at == handover.KindFreeze {
				newClient(t, s.Rig, task{Conns: 1}).end(t)
				return
			}
			s.finish(t, q)
		})
	}
}

// all tells whether every thread of a process is in a state, or there is none.
func all(pid int, state string) bool {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	return !slices.ContainsFunc(threads, func(path string) bool {
		b, err := os.ReadFile(path)
		return err == nil && !strings.Contains(string(b), ") "+state+" ")
	})
}

// TestRefusals has takers come that cannot be served: with another protocol, layout or
// encoding, of another instance, or saying nothing that is understood. Each is told why,
// and nothing changes.
func TestRefusals(t *testing.T) {
	s, q := small(t, "")
	path := filepath.Join(s.Runtime, s.Name+".takeover")
	welcome := s.ask(t, path, handover.Hello{Instance: "none"})
	if !strings.Contains(welcome, "protocol 0 is asked for") {
		t.Errorf("refused with %q", welcome)
	}
	good := handover.Hello{Protocol: handover.Protocol, ABI: bpf.ABI, Carry: l4.CarryVersion, Instance: s.Name, Build: "test", Pid: os.Getpid()}
	for want, change := range map[string]func(*handover.Hello){
		"protocol 99 is asked for": func(h *handover.Hello) { h.Protocol = 99 },
		`instance "other"`:         func(h *handover.Hello) { h.Instance = "other" },
		"maps have layout 9999":    func(h *handover.Hello) { h.ABI = 9999 },
		"connections of version":   func(h *handover.Hello) { h.Carry = 77 },
	} {
		h := good
		change(&h)
		if got := s.ask(t, path, h); !strings.Contains(got, want) {
			t.Errorf("refused with %q, want %q", got, want)
		}
	}
	conn, err := handover.Dial(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Within(rig.Limit)
	if err := conn.Send(handover.KindHello, []byte("{"), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Expect(handover.KindWelcome); !errors.Is(err, handover.ErrRefused) {
		t.Errorf("nonsense: %v", err)
	}
	conn.Close()
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", info, err)
	}
	if strings.Contains(s.Log(), `msg="handed over"`) {
		t.Error("something was handed over")
	}
	s.turn(t)
	s.finish(t, q)
}

// ask says hello and returns the words of the refusal.
func (s *stage) ask(t *testing.T, path string, h handover.Hello) string {
	t.Helper()
	conn, err := handover.Dial(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.Within(rig.Limit)
	if err := conn.SendJSON(handover.KindHello, h, nil); err != nil {
		t.Fatal(err)
	}
	f, err := conn.Expect(handover.KindWelcome)
	if err == nil {
		f.Close()
		t.Fatalf("%+v is welcome", h)
	}
	if !errors.Is(err, handover.ErrRefused) {
		t.Fatal(err)
	}
	return err.Error()
}
