package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/loader"
	"github.com/spf13/cobra"
)

func newInit(g *global) *cobra.Command {
	f := &runFlags{}
	c := &cobra.Command{
		Use:   "init [--cgroup PATH] [--config FILE]",
		Short: "Attach to the pod or a cgroup before its applications start, and exit",
		Long: `Does what run does before it listens: it finds the scope, loads and attaches the
programs, adds the routes, and exits. From then on no connection in the scope is
missed: until pillion run has taken over, on_failure decides on what should be
redirected. What was made stays until the run ends, or the cgroup is gone. Doing it
again changes nothing but the rules, and not even those while it is not known
which endpoints a service has.`,
		Example: `  pillion init --config /etc/pillion/pillion.yaml`,
		Args:    noArgs,
		RunE:    func(c *cobra.Command, _ []string) error { return prepare(c.Context(), g, f) },
	}
	f.add(c)
	return c
}

// prepare makes an instance that a run will take over.
func prepare(ctx context.Context, g *global, f *runFlags) error {
	started := time.Now()
	log, err := g.logger(slog.LevelInfo)
	if err != nil {
		return err
	}
	c, err := f.configuration()
	if err != nil {
		return err
	}
	i := &instance{plan: plan{kind: loader.KindInit, config: c, global: g, log: log, file: f.file, merge: config.ParsePartial}, started: started}
	if err := i.locate(ctx, f, true); err != nil {
		return err
	}
	i.control = newControl(i)
	if err := i.control.apply(c); err != nil {
		return usage(err)
	}
	err = i.load()
	if errors.Is(err, loader.ErrInUse) {
		log.Info("a pillion run is here already", "instance", i.name)
		return nil
	}
	if err != nil {
		return err
	}
	if err := i.attachOnly(); err != nil {
		if !i.datapath.Adopted() {
			return errors.Join(err, i.datapath.Unload())
		}
		return errors.Join(err, i.datapath.Close())
	}
	log.Info("attached", "instance", i.name, "scope", i.scope.Path, "on_failure", c.OnFailure, "took", time.Since(started).Round(time.Millisecond))
	return i.datapath.Close()
}

// attachOnly makes the rules hold and the programs live, with no handler.
func (i *instance) attachOnly() error {
	if _, err := i.datapath.Sync(); err != nil {
		return err
	}
	// What an earlier process knew of endpoints holds until there is one that
	// asks the sources.
	if !i.datapath.Adopted() || i.control.sources.told() {
		if err := i.datapath.SetRules(i.rules(i.plan.config, i.control.list())); err != nil {
			return err
		}
	}
	old, err := i.datapath.Attach()
	if err != nil {
		return err
	}
	return i.settle(old)
}
