package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/spf13/cobra"
)

func newDiff(g *global) *cobra.Command {
	var o output
	var instance string
	c := &cobra.Command{
		Use:   "diff [OLD] FILE",
		Short: "Tell what a reload with a configuration would do",
		Long: `Compares FILE with the configuration that a running instance goes by, or with
another file, and tells what a reload would change: services, endpoints, what
becomes of connections, and what takes a restart. It changes nothing. The exit
code is 0 whether or not anything differs, and 64 if a file is not right.`,
		Example: `  pillion diff /etc/pillion.yaml
  pillion diff /etc/pillion.yaml /tmp/new.yaml -o json`,
		Args: func(c *cobra.Command, args []string) error {
			switch {
			case len(args) < 1 || len(args) > 2:
				return usage(errors.New("diff: want a configuration file, or two"))
			case len(args) == 2 && instance != "":
				return usage(errors.New("diff: --instance and two files: want one of them to compare with"))
			default:
				return nil
			}
		},
		RunE: func(c *cobra.Command, args []string) error {
			if err := o.check(); err != nil {
				return err
			}
			return diff(c.Context(), c.OutOrStdout(), g, &o, instance, args)
		},
	}
	c.Flags().StringVar(&instance, "instance", "", "name of the instance to compare with (default: the one that runs)")
	// What exec and run call it.
	c.Flags().StringVar(&instance, "name", "", "the same as --instance")
	o.add(c)
	return c
}

// changes is what diff says.
type changes struct {
	config.Changes
	// Restart is true if a part of it takes a restart.
	Restart bool `json:"restart"`
	// Open counts the connections to endpoints that go, by service; nil if no
	// instance was asked.
	Open map[string]int64 `json:"open_connections,omitempty"`
}

func diff(ctx context.Context, w io.Writer, g *global, o *output, instance string, files []string) error {
	// All that is wrong with both at once.
	var all []*config.Config
	var errs []error
	for _, file := range files {
		c, err := config.Load(file)
		all, errs = append(all, c), append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return usage(err)
	}
	to := all[len(all)-1]
	if len(all) == 2 {
		d := to.Diff(all[0])
		return printChanges(w, o, &changes{Changes: d, Restart: d.Restart()})
	}
	client, err := g.client(instance)
	if err != nil {
		return err
	}
	from, err := runningConfig(ctx, client)
	if err != nil {
		return err
	}
	status, err := client.Status(ctx)
	if err != nil {
		return fmt.Errorf("ask for the connections: %w", err)
	}
	d := to.Diff(from)
	return printChanges(w, o, &changes{Changes: d, Restart: d.Restart(), Open: openTo(d, &status)})
}

// runningConfig asks an instance what it goes by.
func runningConfig(ctx context.Context, client *admin.Client) (*config.Config, error) {
	data, err := client.Config(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask for the configuration: %w", err)
	}
	c := new(config.Config)
	if err := json.Unmarshal(data, c); err != nil {
		return nil, fmt.Errorf("the instance, of another version perhaps, has a configuration that cannot be read here: %w", err)
	}
	return c, nil
}

// openTo counts the connections to the endpoints that go.
func openTo(d config.Changes, s *admin.Status) map[string]int64 {
	live := make(map[string]map[string]int64, len(s.Services))
	for _, service := range s.Services {
		at := make(map[string]int64, len(service.Endpoints))
		for _, e := range service.Endpoints {
			at[e.Address] += e.Live
		}
		live[service.Name] = at
	}
	open := make(map[string]int64)
	for _, service := range d.Services {
		for _, a := range service.Removed {
			open[service.Name] += live[formerName(&service)][a.String()]
		}
	}
	return open
}

// formerName is the name that a service had.
func formerName(s *config.ServiceChange) string {
	for _, f := range s.Fields {
		if f.Key == "name" {
			return f.Old
		}
	}
	return s.Name
}

func printChanges(w io.Writer, o *output, c *changes) error {
	if o.json() {
		return printJSON(w, c)
	}
	if c.Empty() {
		_, err := fmt.Fprintln(w, "no change")
		return err
	}
	t := newTable("service", "change", "what", "from", "to", "effect")
	row := func(service, change, what, from, to, effect string) {
		t.AppendRow([]any{cmp.Or(service, "-"), change, cmp.Or(what, "-"), cmp.Or(from, "-"), cmp.Or(to, "-"), cmp.Or(effect, "-")})
	}
	for _, s := range c.Settings {
		effect := ""
		if s.Restart {
			effect = "takes a restart"
		}
		row("", "setting", s.Key, s.Old, s.New, effect)
	}
	for _, s := range c.Services {
		if s.Kind != config.ServiceChanged {
			row(s.Name, string(s.Kind), "", "", "", "")
		}
		for _, f := range s.Fields {
			row(s.Name, string(s.Kind), f.Key, f.Old, f.New, "")
		}
		endpoints := func(change string, all []netip.AddrPort, effect string) {
			for _, a := range all {
				row(s.Name, change, a.String(), "", "", effect)
			}
		}
		endpoints("endpoint added", s.Added, "")
		endpoints("endpoint removed", s.Removed, "connections "+s.Fate())
	}
	if err := printTable(w, t); err != nil {
		return err
	}
	return printOpen(w, c)
}

// printOpen says how many connections the change would end.
func printOpen(w io.Writer, c *changes) error {
	if c.Open == nil {
		return nil
	}
	kept, ended := int64(0), int64(0)
	for _, s := range c.Services {
		if s.OnRemove == config.OnRemoveClose || s.OnRemove == config.OnRemoveReset {
			ended += c.Open[s.Name]
		} else {
			kept += c.Open[s.Name]
		}
	}
	_, err := fmt.Fprintf(w, "\nopen connections to endpoints that go: %d, of which %d would be ended\n", kept+ended, ended)
	return err
}
