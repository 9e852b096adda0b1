package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/loader/probe"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newUnload(g *global) *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use:   "unload [NAME...]",
		Short: "Remove what instances that no longer run left, and nothing else",
		Long: `Removes programs, pins, routes and cgroups of Pillion's instances in whatever
state they are: of the named ones, or of all that do not run. One that runs is
refused, or with --force ended first. Without names, what is kept of the flows of
ended commands goes too, if nothing runs.`,
		RunE: func(c *cobra.Command, names []string) error {
			return unload(c.Context(), c.OutOrStdout(), g, names, force)
		},
	}
	c.Flags().BoolVar(&force, "force", false, "end running instances: those named, or all")
	return c
}

func unload(ctx context.Context, w io.Writer, g *global, names []string, force bool) error {
	root, err := probe.CgroupRoot()
	if err != nil {
		return &exitError{code: exitUnsupported, err: err}
	}
	found, err := loader.List(g.bpffs, root)
	if err != nil {
		return unprivileged(err)
	}
	for _, name := range names {
		if !slices.ContainsFunc(found, func(f loader.Found) bool { return f.Name == name }) {
			return usage(fmt.Errorf("instance %q: %w", name, loader.ErrNotFound))
		}
	}
	var errs []error
	removed := false
	for _, f := range found {
		named := slices.Contains(names, f.Name)
		if len(names) > 0 && !named {
			continue
		}
		if f.Running && !force {
			if named {
				errs = append(errs, fmt.Errorf("instance %s: %w (--force ends it)", f.Name, loader.ErrInUse))
			}
			continue
		}
		if err := g.unloadOne(ctx, root, f); err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintf(w, "removed %s\n", f.Name)
		removed = true
	}
	if !removed && errors.Join(errs...) == nil {
		fmt.Fprintln(w, "nothing to remove")
	}
	if len(names) == 0 {
		errs = append(errs, g.clearRuntime())
	}
	return errors.Join(errs...)
}

func (g *global) unloadOne(ctx context.Context, root string, f loader.Found) error {
	if f.Running {
		if err := g.stop(ctx, f.Name); err != nil {
			return err
		}
	}
	err := loader.Remove(g.bpffs, root, f.Name)
	if errors.Is(err, loader.ErrNotFound) && f.Running {
		err = nil // it took itself away
	}
	if err != nil {
		return err
	}
	for _, file := range []string{g.socket(f.Name), g.takeoverPath(f.Name)} {
		if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove its socket: %w", err)
		}
	}
	return nil
}

// How long a process may take to end by itself, and to die.
const (
	stopLimit = 10 * time.Second
	killLimit = 5 * time.Second
)

// stop ends the process that runs an instance: kindly, then not.
func (g *global) stop(ctx context.Context, name string) error {
	pid, err := listenerOf(ctx, g.socket(name))
	if err != nil {
		return fmt.Errorf("find the process of %s: %w", name, err)
	}
	// A descriptor names this process for good, whoever gets its number.
	p, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil // gone
	}
	if err != nil {
		return fmt.Errorf("find the process of %s: %w", name, err)
	}
	defer unix.Close(p)
	for _, step := range []struct {
		signal unix.Signal
		limit  time.Duration
	}{{unix.SIGTERM, stopLimit}, {unix.SIGKILL, killLimit}} {
		err := unix.PidfdSendSignal(p, step.signal, nil, 0)
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("end process %d of %s: %w", pid, name, err)
		}
		if ended(p, step.limit) {
			return nil
		}
	}
	return fmt.Errorf("process %d of %s does not end", pid, name)
}

// ended waits until a process is gone, and tells whether it is.
func ended(pidfd int, limit time.Duration) bool {
	for end := time.Now().Add(limit); ; {
		ready := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		n, err := unix.Poll(ready, int(max(time.Until(end), 0)/time.Millisecond))
		if !errors.Is(err, unix.EINTR) {
			return n > 0
		}
	}
}

// listenerOf returns the process that listens at a socket. The kernel says so;
// a process that hangs would not.
func listenerOf(ctx context.Context, path string) (pid int, err error) {
	d := net.Dialer{Timeout: killLimit}
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var peer *unix.Ucred
	control := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(control, err); err != nil {
		return 0, fmt.Errorf("ask who listens at %s: %w", path, err)
	}
	return int(peer.Pid), nil
}

// clearRuntime removes what is left in the runtime directory when nothing runs.
func (g *global) clearRuntime() error {
	running, err := g.running()
	if err != nil || len(running) > 0 {
		return err
	}
	files, err := g.savedFiles()
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range files {
		errs = append(errs, os.Remove(f))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("forget ended commands: %w", err)
	}
	// Empty or not there is both fine; somebody else's files stay.
	_ = os.Remove(g.savedDir())
	_ = os.Remove(g.runtime)
	return nil
}
