package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// running lists the names of the instances that have an admin socket.
func (g *global) running() ([]string, error) {
	entries, err := os.ReadDir(g.runtime)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list instances: %w", err)
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".sock"); ok && g.answers(name) {
			names = append(names, name)
		}
	}
	return names, nil
}

func (g *global) socket(name string) string { return filepath.Join(g.runtime, name+".sock") }

// answers tells whether anybody listens on an admin socket: a killed process
// leaves its own behind.
func (g *global) answers(name string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, err := admin.Dial(g.socket(name)).Status(ctx)
	return !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT)
}

// client connects to the instance of that name, or to the only one.
func (g *global) client(name string) (*admin.Client, error) {
	names, err := g.running()
	if err != nil {
		return nil, err
	}
	switch {
	case name != "" && !slices.Contains(names, name):
		return nil, fmt.Errorf("%w by the name of %q", errNoInstance, name)
	case name == "" && len(names) == 0:
		return nil, errNoInstance
	case name == "" && len(names) > 1:
		return nil, usage(fmt.Errorf("several instances are running: choose with --instance %s", strings.Join(names, ", ")))
	case name == "":
		name = names[0]
	}
	return admin.Dial(g.socket(name)), nil
}

func newStatus(g *global) *cobra.Command {
	var o output
	c := &cobra.Command{
		Use:   "status [NAME...]",
		Short: "Show the running instances: state, services, endpoints, counters",
		RunE: func(c *cobra.Command, names []string) error {
			if err := o.check(); err != nil {
				return err
			}
			return showStatus(c.Context(), c.OutOrStdout(), g, &o, names)
		},
	}
	o.add(c)
	return c
}

func showStatus(ctx context.Context, w io.Writer, g *global, o *output, names []string) error {
	running, err := g.running()
	if err != nil {
		return err
	}
	if len(names) == 0 {
		names = running
	}
	all := []admin.Status{}
	for _, name := range names {
		client, err := g.client(name)
		if err != nil {
			return err
		}
		s, err := client.Status(ctx)
		if err != nil {
			return fmt.Errorf("ask %s: %w", name, err)
		}
		all = append(all, s)
	}
	if o.json() {
		return printJSON(w, all)
	}
	if len(all) == 0 {
		return errNoInstance
	}
	for _, s := range all {
		if err := printStatus(w, &s); err != nil {
			return err
		}
	}
	return nil
}

func printStatus(w io.Writer, s *admin.Status) error {
	_, err := fmt.Fprintf(w, "%s (%s, pid %d, %s): %s, on_failure %s, connect %s, up %s\n  scope %s\n  slots %s %s\n  open connections %d, unaccounted %d\n",
		s.Instance, s.Kind, s.Pid, s.Version, s.State, s.OnFailure, s.Connect, time.Since(s.Started).Round(time.Second),
		s.Scope, s.Slots4, s.Slots6, s.Live, s.Unaccounted)
	if err != nil {
		return err
	}
	for _, p := range s.Problems {
		fmt.Fprintf(w, "  ! %s\n", p)
	}
	if len(s.Services) > 0 {
		t := newTable("service", "address", "policy", "endpoint", "weight", "state", "open", "connects", "failures", "last failure")
		for _, service := range s.Services {
			for _, e := range service.Endpoints {
				state := "available"
				if e.Ejected {
					state = "ejected"
				}
				t.AppendRow([]any{service.Name, service.Address, service.Policy, e.Address, e.Weight, state, e.Live, e.Connects, e.Failures, e.LastReason.String()})
			}
		}
		fmt.Fprintln(w)
		if err := printTable(w, t); err != nil {
			return err
		}
	}
	t := newTable("reason", "connections")
	for _, name := range slices.Sorted(maps.Keys(s.Counters)) {
		t.AppendRow([]any{name, s.Counters[name]})
	}
	fmt.Fprintln(w)
	return printTable(w, t)
}

func newResolve(g *global) *cobra.Command {
	var instance string
	var o output
	c := &cobra.Command{
		Use:   "resolve SLOT",
		Short: "Tell which address a slot stands for, as ss and tcpdump show slots",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(errors.New("resolve: want one slot address"))
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			slot, err := netip.ParseAddr(args[0])
			if err != nil {
				return usage(fmt.Errorf("slot %q is no address", args[0]))
			}
			if err := o.check(); err != nil {
				return err
			}
			client, err := g.client(instance)
			if err != nil {
				return err
			}
			addr, err := client.Resolve(c.Context(), slot)
			if err != nil {
				return err
			}
			if o.json() {
				return printJSON(c.OutOrStdout(), map[string]netip.Addr{"slot": slot, "address": addr})
			}
			_, err = fmt.Fprintln(c.OutOrStdout(), addr)
			return err
		},
	}
	c.Flags().StringVar(&instance, "instance", "", "name of the instance (default: the one that runs)")
	o.add(c)
	return c
}
