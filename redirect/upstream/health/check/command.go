package check

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

const (
	// maxOutput is how much of what a command writes is kept for the error.
	maxOutput = 256
	// drain is how long a command's output may stay open when its process group
	// is gone: who left the group and holds it is not waited for.
	drain = time.Second
	// killLimit is how long what was killed may take to end. A busy machine needs a
	// moment for a large process; what takes longer waits for a disk or a file server
	// that does not answer, and may do so for ever.
	killLimit = 3 * time.Second
	// heldMax is how many commands may be held before none is started any more: each
	// is a process and a thread that waits for it.
	heldMax = 16

	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// commands runs commands. Its zero value is ready.
type commands struct {
	// finish waits for a command that was started; nil is the function of that name.
	// A test replaces it.
	finish func(ctx context.Context, cmd *exec.Cmd, out *output) error

	mu sync.Mutex
	// held is how many commands of a target were killed, and the kernel does not let
	// go of them: they are in a call that nothing interrupts.
	held map[held]int
}

// held is a command of a target: another one may be what mends it.
type held struct {
	id
	command string
}

// ask runs the command of a target, of which to is the address that is checked. When
// ctx is done it returns within killLimit: the goroutine that waits for a command
// that is held outlives it, and ends when the kernel lets go of that.
func (c *commands) ask(ctx context.Context, to netip.AddrPort, t Target) error {
	k := held{id{t.Cluster, t.Addr}, strings.Join(t.Spec.Command, "\x00")}
	if err := c.mayStart(k); err != nil {
		return err
	}
	out := &output{}
	cmd := newCommand(to, t, out)
	if err := cmd.Start(); err != nil {
		return own(fmt.Errorf("start command: %w", err))
	}
	ended, left := make(chan error), make(chan struct{})
	go func() {
		err := c.finishFunc()(ctx, cmd, out)
		select {
		case ended <- err:
		case <-left:
			c.count(k, -1)
		}
	}()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	timer := time.NewTimer(killLimit)
	defer timer.Stop()
	select {
	case err := <-ended:
		return err
	case <-timer.C:
		c.count(k, 1)
		close(left)
		return fmt.Errorf("command: %w, and it cannot be killed", errTimeout)
	}
}

func (c *commands) finishFunc() func(context.Context, *exec.Cmd, *output) error {
	if c.finish != nil {
		return c.finish
	}
	return finish
}

// mayStart says why no command of a target is started: its next one would be held as
// the last one is, and so processes would pile up, one with each interval.
func (c *commands) mayStart(k held) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.held[k] > 0:
		return fmt.Errorf("command: %w: the last one cannot be killed", errTimeout)
	case len(c.held) >= heldMax:
		return own(fmt.Errorf("start command: those of %d endpoints cannot be killed", len(c.held)))
	default:
		return nil
	}
}

// count counts what is held of a target.
func (c *commands) count(k held, more int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held == nil {
		c.held = make(map[held]int)
	}
	if c.held[k] += more; c.held[k] == 0 {
		delete(c.held, k)
	}
}

// newCommand makes a command that is in a process group of its own.
func newCommand(to netip.AddrPort, t Target, out *output) *exec.Cmd {
	cmd := exec.Command(t.Spec.Command[0], t.Spec.Command[1:]...)
	cmd.Env = environment(to, t.Cluster)
	cmd.Dir = "/" // not ours, which may be on what is to be unmounted
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = drain
	return cmd
}

// finish waits for a command that was started, and says what came of it. When ctx is
// done, and also when the command itself has ended, its whole group is killed.
func finish(ctx context.Context, cmd *exec.Cmd, out *output) error {
	g := group{pid: cmd.Process.Pid}
	killed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(killed)
		g.kill()
	})
	waitErr := g.wait()
	late := !stop()
	if late {
		<-killed
	}
	err := errors.Join(waitErr, ignoreDelay(cmd.Wait()))
	g.bury()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case late:
		return fmt.Errorf("command: %w%s", errTimeout, out.suffix())
	case errors.As(err, &exit):
		return fmt.Errorf("command: %w%s", exit, out.suffix())
	default:
		return own(fmt.Errorf("wait for command: %w", err))
	}
}

// ignoreDelay leaves out that the output was still open: the command has said
// what it had to say.
func ignoreDelay(err error) error {
	if errors.Is(err, exec.ErrWaitDelay) {
		return nil
	}
	return err
}

// environment is all that a command gets.
func environment(to netip.AddrPort, cluster string) []string {
	path := os.Getenv("PATH")
	if path == "" {
		path = defaultPath
	}
	return []string{
		"PATH=" + path,
		"PILLION_ENDPOINT_ADDRESS=" + to.Addr().String(),
		"PILLION_ENDPOINT_PORT=" + strconv.Itoa(int(to.Port())),
		"PILLION_ENDPOINT_CLUSTER=" + cluster,
	}
}

// group is a process group that this process made.
type group struct {
	pid int // of the first of it, which is the group's too
	// mu lets a kill be either before the first is reaped or not at all: later the
	// number may be somebody else's.
	mu   sync.Mutex
	over bool
}

// kill kills all of the group.
func (g *group) kill() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.over {
		_ = unix.Kill(-g.pid, unix.SIGKILL) // it fails only where nobody is left
	}
}

// wait waits until the first of the group has ended, and kills what that left
// behind. It does not reap it.
func (g *group) wait() error {
	var err error
	for {
		err = unix.Waitid(unix.P_PID, g.pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	g.kill()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.over = true
	if err != nil {
		return fmt.Errorf("wait for process %d: %w", g.pid, err)
	}
	return nil
}

// bury reaps what was killed in the group, where that has become ours: this
// process may be the first in its container.
func (g *group) bury() {
	for {
		_, err := unix.Wait4(-g.pid, nil, 0, nil)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return // ECHILD: there is none
		}
	}
}

// output keeps the beginning of what is written to it. Package exec writes from
// one goroutine, since standard output and error are the same writer.
type output struct{ kept []byte }

// Write takes all and keeps what there is room for.
func (o *output) Write(b []byte) (int, error) {
	o.kept = append(o.kept, b[:min(len(b), maxOutput-len(o.kept))]...)
	return len(b), nil
}

// suffix returns what was kept as the end of an error.
func (o *output) suffix() string {
	if text := printable(string(o.kept)); text != "" {
		return ": " + text
	}
	return ""
}

// printable makes one line of a text that may hold anything.
func printable(text string) string {
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "")))
}
