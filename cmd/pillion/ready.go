package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/spf13/cobra"
)

// missing says why the instance is not ready: applications are not captured, or
// the endpoints of services not known.
func (i *instance) missing() error {
	switch {
	case i.draining.Load():
		return errors.New("it ends")
	case !i.ready.Load():
		return errors.New("it starts: connections are not captured yet")
	case i.datapath.Detached():
		return errors.New("programs are not attached, and cannot be attached again")
	case !i.discovered():
		return errors.New("not every source has told its endpoints yet")
	}
	return nil
}

// discovered tells whether every source has told its endpoints. What held once
// does for good: a service that is added later makes nobody unready.
func (i *instance) discovered() bool {
	if i.answered.Load() {
		return true
	}
	if !i.control.sources.told() {
		return false
	}
	i.answered.Store(true)
	return true
}

// stuck says why only a new process helps. What a new one would find as this one
// does, such as a firewall on the slots, is no reason.
func (i *instance) stuck() error {
	if i.beat.Hangs() {
		return errors.New("a worker of the handler hangs")
	}
	return nil
}

// newProbe makes the commands for probes: they say nothing unless something is
// wrong.
func newProbe(g *global, use, short, long string, ask func(*admin.Client, context.Context) error) *cobra.Command {
	var name string
	var limit time.Duration
	c := &cobra.Command{
		Use:   use + " [--instance NAME]",
		Short: short,
		Long:  long,
		Args:  noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(c.Context(), limit)
			defer cancel()
			client, err := g.probed(name)
			if err != nil {
				return err
			}
			if err := ask(client, ctx); err != nil {
				return fmt.Errorf("not %s: %w", use, err)
			}
			return nil
		},
	}
	c.Flags().StringVar(&name, "instance", "", "which instance (default: the only one)")
	durationVar(c.Flags(), &limit, "timeout", time.Second, "how long it may take to answer")
	return c
}

// probed connects to the instance of that name, or to the only one, and asks it
// nothing more than the probe does.
func (g *global) probed(name string) (*admin.Client, error) {
	if name == "" {
		sockets, err := filepath.Glob(filepath.Join(g.runtime, "*.sock"))
		if err != nil || len(sockets) != 1 {
			return g.client("") // which knows those that nobody listens at
		}
		return admin.Dial(sockets[0]), nil
	}
	return admin.Dial(g.socket(name)), nil
}

func newReady(g *global) *cobra.Command {
	return newProbe(g, "ready", "Tell by the exit code whether an instance captures, and knows its endpoints",
		`Ends with 0 when connections are captured, and every source has told its endpoints
once since the start. Else the exit code is 1, and a line says what is missing.`, (*admin.Client).Ready)
}

func newLive(g *global) *cobra.Command {
	return newProbe(g, "live", "Tell by the exit code whether an instance works, or hangs",
		`Ends with 0 unless the instance does not answer, or a worker of its handler hangs: a
new process is what helps then. Else the exit code is 1, and a line says why.`, (*admin.Client).Live)
}
