package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/loader"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

type runFlags struct {
	cgroup string
	file   string
	name   string
	drain  time.Duration
	// withScope ends the run when the applications have ended.
	withScope bool
	// keep has systemd keep what is open while it restarts the unit.
	keep bool
	// takeOver takes the instance over from the process that runs it.
	takeOver bool
}

// add adds the flags that run and init have in common.
func (f *runFlags) add(c *cobra.Command) {
	flags := c.Flags()
	flags.StringVar(&f.cgroup, "cgroup", scopeAuto, "directory of the cgroup v2 whose connections are captured, or auto: the pod that this process is in")
	flags.StringVar(&f.file, "config", "", "configuration file")
	flags.StringVar(&f.name, "name", "", "name of the instance (default: made of the pod's uid, or of the cgroup's path)")
}

// configuration reads the file, if there is one.
func (f *runFlags) configuration() (*config.Config, error) {
	c, _, err := f.read()
	return c, err
}

// read is configuration, with the text of the file.
func (f *runFlags) read() (*config.Config, []byte, error) {
	if f.file == "" {
		c := config.Default()
		return &c, nil, nil
	}
	text, err := config.Read(f.file)
	if err != nil {
		return nil, nil, usage(err)
	}
	c, err := config.Parse(f.file, text)
	return c, text, usage(err)
}

func newRun(g *global) *cobra.Command {
	f := &runFlags{}
	c := &cobra.Command{
		Use:   "run [--cgroup PATH] [--config FILE]",
		Short: "Redirect the connections of the pod or a cgroup until told to stop",
		Long: `Redirects the TCP connections of every process in a cgroup and below, in this
network namespace. Without --cgroup, that is the pod that it is a container of: all
other containers, also those that start later. SIGTERM drains: new connections go by on_failure, open ones
may end, then everything is taken away; the exit code is 75 where some had to be
ended. What a killed run leaves is taken over
by the next one of the same name; until then on_failure decides. A change of the
configuration file is taken over while it runs, as by SIGHUP or pillion reload.

With --take-over a process that runs the instance hands it over, with its open
connections and all that is on its way in them, and ends with exit code 0: so an
upgrade, or a downgrade, loses no connection. Where nobody is, it starts as
usual. Until it has everything, the other one goes on if this one fails.`,
		Example: `  pillion run --config /etc/pillion/pillion.yaml
  pillion run --cgroup /sys/fs/cgroup/system.slice/shop.service --config /etc/pillion.yaml
  pillion run --take-over --config /etc/pillion/pillion.yaml`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error { return daemon(g, f) },
	}
	f.add(c)
	flags := c.Flags()
	durationVar(flags, &f.drain, "drain-timeout", 30*time.Second, "how long open connections may go on after SIGTERM")
	flags.BoolVar(&f.keep, "keep-on-restart", false, "have systemd keep what is open while it restarts the unit, which needs FileDescriptorStoreMax=1")
	flags.BoolVar(&f.takeOver, "take-over", false, "take over from the process that runs the instance, with its connections; without one, start as usual")
	flags.BoolVar(&f.withScope, "exit-with-scope", false, "end when the applications in scope have ended, as a Job's sidecar has to")
	return c
}

// daemon runs until SIGTERM or SIGINT; a second one ends at once.
func daemon(g *global, f *runFlags) error {
	frugal()
	log, err := g.logger(slog.LevelInfo)
	if err != nil {
		return err
	}
	defer outliveLog()()
	// One that comes before the file is read is as good as done. A signal to end ends
	// this process until there is something to undo.
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, unix.SIGHUP)
	defer signal.Stop(hangups)
	c, text, err := f.read()
	if err != nil {
		why := err
		if c, err = g.survival.configuration(f.file, err); err != nil {
			return err
		}
		log.Error("the configuration is refused, the last one stays", "error", why)
	} else if err := g.survival.keepConfiguration(f.file, text); err != nil {
		log.Warn("the configuration is not kept for the next worker", "error", err)
	}
	if g.survival.gaveAway(log) {
		return nil
	}
	if err := g.startKeeper(c); err != nil {
		return err
	}
	told, deaf := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer deaf()
	stop, end := context.WithCancel(context.Background())
	defer end()
	p := plan{kind: loader.KindRun, config: c, global: g, log: log, file: f.file, merge: config.ParsePartial, hangups: hangups}
	if err := p.locate(told, f, false); err != nil {
		return err
	}
	if f.withScope {
		defer p.listen()()
	}
	g.survival.took(&p)
	p.taking = takeStored(&p)
	if f.takeOver && p.taking == nil && !g.survival.inCharge() {
		if p.taking, err = takeFrom(told, &p); err != nil {
			return err
		}
	}
	i, err := open(p)
	if err != nil {
		p.taking.close()
		if errors.Is(err, loader.ErrInUse) {
			return fmt.Errorf("instance %s: %w (see pillion status; --take-over takes over from it)", p.name, loader.ErrInUse)
		}
		return err
	}
	if f.withScope {
		if err := i.canOutlive(); err != nil {
			return errors.Join(err, i.abandon())
		}
	}
	force, kill := context.WithCancel(context.Background())
	defer kill()
	var watch sync.WaitGroup
	defer watch.Wait()
	defer end()
	if f.withScope {
		watch.Go(func() { i.endWithScope(stop, end) })
	}
	watched, unwatch := context.WithCancel(context.Background())
	defer unwatch()
	watch.Go(func() { i.beWatched(watched) })
	var cut atomic.Int64
	heard := make(chan struct{})
	unhear := context.AfterFunc(told, func() {
		defer close(heard)
		if f.keep && stop.Err() == nil {
			i.keepForRestart(watched, f)
		}
		end()
	})
	defer func() {
		if !unhear() {
			<-heard
		}
	}()
	unarm := context.AfterFunc(stop, func() {
		// The second signal is the default's: it ends the process.
		g.survival.onceMore(deaf)
		notify("STOPPING=1")
		if i.gone.Load() {
			return
		}
		log.Info("draining", "timeout", f.drain)
		time.AfterFunc(f.drain, func() {
			cut.Store(int64(i.handler.Stats().Live))
			kill()
		})
	})
	defer unarm()
	err = i.serve(stop, force, func() error {
		log.Info("ready", "instance", i.name, "scope", i.scope.Path, "services", len(c.Services), "on_failure", c.OnFailure)
		if err := notify(fmt.Sprintf("MAINPID=%d\nREADY=1", g.survival.mainPID())); err != nil {
			log.Error("the service manager is not told", "error", err) // connections matter more
		}
		return nil
	})
	if errors.Is(err, errHandedOver) {
		err = nil
	}
	err = errors.Join(err, i.end())
	if n := cut.Load(); n > 0 && err == nil {
		return &exitError{code: exitCut, err: fmt.Errorf("%s open still after %v, and ended", count(int(n), "connection"), f.drain)}
	}
	return err
}

// nameOf makes a name for a scope out of its path.
func nameOf(root, cgroup string) string {
	rel := strings.Trim(strings.TrimPrefix(cgroup, root), "/")
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '.', r == '_', r == '-':
			return r
		default:
			return '-'
		}
	}, strings.TrimPrefix(rel, "."))
	if name == "" {
		return "root"
	}
	// The end of a path tells more than its beginning.
	return name[max(0, len(name)-64):]
}
