package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"

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
becomes of connections, what takes a restart, and what would be refused. It
changes nothing. The exit code is 0 whether or not anything differs, and 64 if
a file is not right; -o json then has what is wrong as refused.`,
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
	// Refused is what a reload would not take.
	Refused []admin.Refusal `json:"refused,omitempty"`

	whole error // why nothing of the file would be taken
}

// refusedWhole is of a file of which a reload would take nothing.
func refusedWhole(err error) *changes { return &changes{Refused: refusalsOf(err), whole: err} }

func diff(ctx context.Context, w io.Writer, g *global, o *output, instance string, files []string) error {
	if len(files) == 2 {
		return diffFiles(w, o, files[0], files[1])
	}
	text, err := config.Read(files[0])
	if err != nil {
		return printChanges(w, o, refusedWhole(err))
	}
	client, err := g.client(instance)
	if err != nil {
		// What is wrong with the file can be told all the same.
		if _, wrong := config.Parse(files[0], text); wrong != nil {
			return printChanges(w, o, refusedWhole(wrong))
		}
		return err
	}
	c, err := diffRunning(ctx, client, files[0], text)
	if err != nil {
		return err
	}
	if c.whole != nil {
		return printChanges(w, o, c)
	}
	status, err := client.Status(ctx)
	if err != nil {
		return fmt.Errorf("ask for the connections: %w", err)
	}
	findRemoved(&c.Changes, &status)
	c.Open = openTo(c.Changes, &status)
	return printChanges(w, o, c)
}

// diffFiles tells all that is wrong with both at once.
func diffFiles(w io.Writer, o *output, old, new string) error {
	from, err := config.Load(old)
	to, err2 := config.Load(new)
	if err := errors.Join(err, err2); err != nil {
		return printChanges(w, o, refusedWhole(err))
	}
	d := to.Diff(from)
	return printChanges(w, o, &changes{Changes: d, Restart: d.Restart()})
}

// diffRunning has the instance say what a reload would do, which knows best.
func diffRunning(ctx context.Context, client *admin.Client, file string, text []byte) (*changes, error) {
	r, err := client.Diff(ctx, file, text)
	switch e, ok := errors.AsType[*admin.Error](err); {
	case ok && e.Code == http.StatusNotFound:
		return diffHere(ctx, client, file, text)
	case err != nil:
		return nil, fmt.Errorf("ask what would change: %w", err)
	case r.Changes == nil:
		return &changes{Refused: r.Refused, whole: joinRefusals(r.Refused)}, nil
	default:
	}
	c := &changes{Refused: r.Refused}
	if err := json.Unmarshal(r.Changes, &c.Changes); err != nil {
		return nil, fmt.Errorf("read what would change: %w", err)
	}
	c.Restart = c.Changes.Restart()
	return c, nil
}

// joinRefusals makes an error of what an instance says of a whole file.
func joinRefusals(refused []admin.Refusal) error {
	var errs []error
	for _, r := range refused {
		text := r.Text
		if r.Where != "" {
			text = r.Where + ": " + text
		}
		errs = append(errs, errors.New(text))
	}
	return errors.Join(errs...)
}

// diffHere is for an instance of an earlier version, which tells only what it goes
// by.
func diffHere(ctx context.Context, client *admin.Client, file string, text []byte) (*changes, error) {
	to, err := config.Parse(file, text)
	if err != nil {
		return refusedWhole(err), nil
	}
	data, err := client.Config(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask for the configuration: %w", err)
	}
	from := new(config.Config)
	if err := json.Unmarshal(data, from); err != nil {
		return nil, fmt.Errorf("the instance, of another version perhaps, has a configuration that cannot be read here: %w", err)
	}
	d := to.Diff(from)
	return &changes{Changes: d, Restart: d.Restart()}, nil
}

// findRemoved has what a source found be told like what was listed, since it is known of an
// instance.
func findRemoved(d *config.Changes, s *admin.Status) {
	for i := range d.Services {
		change := &d.Services[i]
		n := slices.IndexFunc(s.Services, func(s admin.ServiceStatus) bool { return s.Name == formerName(change) })
		if !change.SourceRemoved || n < 0 {
			continue
		}
		change.SourceRemoved = false
		for _, e := range s.Services[n].Endpoints {
			a, err := netip.ParseAddrPort(e.Address)
			if err != nil || e.State == admin.EndpointRemoved {
				continue // what was to become of that was decided before
			}
			if at := slices.Index(change.Added, a); at >= 0 {
				change.Added = slices.Delete(change.Added, at, at+1) // it goes on
			} else {
				change.Removed = append(change.Removed, a)
			}
		}
	}
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

// printChanges returns an exitError if something would be refused.
func printChanges(w io.Writer, o *output, c *changes) error {
	var err error
	switch {
	case o.json():
		err = printJSON(w, c)
	case c.whole != nil:
		return usage(c.whole)
	case c.Empty():
		_, err = fmt.Fprintln(w, "no change")
	default:
		err = printChanged(w, c)
	}
	if err != nil || len(c.Refused) == 0 {
		return err
	}
	if !o.json() {
		for _, text := range refusalTexts(c.Refused) {
			if _, err := fmt.Fprintf(w, "! %s\n", text); err != nil {
				return err
			}
		}
	}
	return &exitError{code: exitUsage}
}

func printChanged(w io.Writer, c *changes) error {
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
		if s.SourceRemoved {
			row(s.Name, "endpoint removed", sourceRemovedText(&s), "", "", "connections "+s.Fate())
		}
	}
	if err := printTable(w, t); err != nil {
		return err
	}
	return printOpen(w, c)
}

// sourceRemovedText stands for endpoints that only the source knew.
func sourceRemovedText(s *config.ServiceChange) string {
	if len(s.Added) > 0 {
		return "those of its source, but for those added"
	}
	return "those of its source"
}

// printOpen says how many connections the change would end.
func printOpen(w io.Writer, c *changes) error {
	goes := func(s config.ServiceChange) bool { return len(s.Removed) > 0 }
	if c.Open == nil || !slices.ContainsFunc(c.Services, goes) {
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
