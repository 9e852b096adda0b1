package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// Exit codes of a shell for a command that could not be started.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
	exitSignal        = 128 // plus its number
)

// child is the command of exec.
type child struct {
	cmd     *exec.Cmd
	signals chan os.Signal
	// terminal is true when the command shares our process group, and so gets
	// what the terminal sends by itself.
	terminal bool
}

// newChild prepares a command that is born in the cgroup, as the user. From here
// on signals are kept for it.
func newChild(args []string, cgroup *commandCgroup, who *syscall.Credential) *child {
	c := &child{
		cmd:      exec.Command(args[0], args[1:]...),
		signals:  make(chan os.Signal, 16),
		terminal: term.IsTerminal(int(os.Stdin.Fd())) || foreground(),
	}
	c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.cmd.SysProcAttr = &syscall.SysProcAttr{
		UseCgroupFD: true,
		CgroupFD:    int(cgroup.dir.Fd()),
		Credential:  who,
		// On a terminal the command stays in our group: job control then
		// stops and continues both, and one that asks there for a password,
		// whatever its input is, may. Elsewhere it has its own, so that a
		// signal to the group comes once.
		Setpgid: !c.terminal,
	}
	signal.Notify(c.signals, minded(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2,
		unix.SIGALRM, unix.SIGCONT, unix.SIGWINCH)...)
	return c
}

// foreground tells whether what is typed at the terminal that controls this process
// comes to its group.
func foreground() bool {
	fd, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	group, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// run starts the command and waits for it. It returns what the command returned,
// or what a shell would.
func (c *child) run() (code int, err error) {
	defer signal.Stop(c.signals)
	if s := c.endedBefore(); s != 0 {
		return exitSignal + int(s), nil
	}
	if err := c.cmd.Start(); err != nil {
		code := exitNotExecutable
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
			code = exitNotFound
		}
		return code, fmt.Errorf("start the command: %w", err)
	}
	done := make(chan error, 1)
	go c.wait(done)
	for {
		select {
		case s := <-c.signals:
			c.pass(s)
		case err := <-done:
			return exitCode(c.cmd.ProcessState), ignoreExit(err)
		}
	}
}

// endedBefore returns the signal that came before there was a command, and would have
// ended it; 0: none did. That of a terminal would not come a second time.
func (c *child) endedBefore() syscall.Signal {
	for {
		select {
		case s := <-c.signals:
			if s != unix.SIGCONT && s != unix.SIGWINCH {
				return s.(syscall.Signal)
			}
		default:
			return 0
		}
	}
}

// wait is the goroutine that waits for the command.
func (c *child) wait(done chan<- error) { done <- c.cmd.Wait() }

// pass hands a signal on, unless the terminal has given it to both.
func (c *child) pass(s os.Signal) {
	typed := s == unix.SIGINT || s == unix.SIGQUIT || s == unix.SIGWINCH || s == unix.SIGCONT
	if c.terminal && typed && foreground() {
		return
	}
	// It may have ended just now.
	_ = c.cmd.Process.Signal(s)
}

func ignoreExit(err error) error {
	if _, ok := errors.AsType[*exec.ExitError](err); ok {
		return nil
	}
	return err
}

func exitCode(state *os.ProcessState) int {
	status, ok := state.Sys().(syscall.WaitStatus)
	if ok && status.Signaled() {
		return exitSignal + int(status.Signal())
	}
	return state.ExitCode()
}

// credential returns as whom a command runs: name, or if it is empty who called
// sudo, or nil for who we are.
func credential(name string) (*syscall.Credential, error) {
	if name == "" {
		uid := os.Getenv("SUDO_UID")
		if os.Geteuid() != 0 || uid == "" || uid == "0" {
			return nil, nil
		}
		name = uid
	}
	u, err := user.Lookup(name)
	if err != nil {
		if u, err = user.LookupId(name); err != nil {
			return nil, fmt.Errorf("--user %q: no such user", name)
		}
	}
	c := &syscall.Credential{}
	ids, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("find the groups of %s: %w", u.Username, err)
	}
	for _, id := range append([]string{u.Uid, u.Gid}, ids...) {
		n, err := strconv.ParseUint(id, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("id %q of user %s: %w", id, u.Username, err)
		}
		c.Groups = append(c.Groups, uint32(n))
	}
	c.Uid, c.Gid, c.Groups = c.Groups[0], c.Groups[1], c.Groups[2:]
	if int(c.Uid) == os.Geteuid() {
		return nil, nil
	}
	return c, nil
}
