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

	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/loader/probe"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/spf13/cobra"
)

// running lists the names of the instances that have an admin socket.
func (g *global) running() ([]string, error) {
	entries, err := os.ReadDir(g.runtime)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, unprivileged(fmt.Errorf("list instances: %w", err))
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
	return !errors.Is(err, admin.ErrNotRunning)
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
		return nil, usage(fmt.Errorf("several instances are running, choose one with --instance: %s", strings.Join(names, ", ")))
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
		Long: `Shows the running instances, or the named ones, and which others were left by a
process that was killed. The exit code is 1 where none runs; with -o json that is
an empty list, and 0. Open connections on direct and pass are the kernel's alone:
pillion flows --live lists them too.`,
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
	asked := len(names) > 0
	if !asked {
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
	for n, s := range all {
		if n > 0 {
			fmt.Fprintln(w)
		}
		if err := printStatus(w, &s, time.Now()); err != nil {
			return err
		}
	}
	if asked {
		return nil
	}
	left := g.left()
	if len(left) > 0 && len(all) > 0 {
		fmt.Fprintln(w)
	}
	for _, f := range left {
		fmt.Fprintln(w, leftText(&f))
	}
	if len(all) == 0 {
		return errNoInstance
	}
	return nil
}

// left lists the instances that are attached, and that no process runs: it was killed,
// or only pillion init was here. What cannot be looked at is not told.
func (g *global) left() []loader.Found {
	root, err := probe.CgroupRoot()
	if err != nil {
		return nil
	}
	found, err := loader.List(g.bpffs, root)
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(found, func(f loader.Found) bool { return f.Running })
}

func leftText(f *loader.Found) string {
	if f.Cgroup == "" || f.Problem != "" {
		return fmt.Sprintf("%s: no process runs it, and its scope is gone: pillion unload %s removes what it left", f.Name, f.Name)
	}
	return fmt.Sprintf("%s: no process runs it, and on_failure decides on what it would redirect; pillion run goes on with it, pillion unload %s removes it\n  scope %s",
		f.Name, f.Name, f.Cgroup)
}

func printStatus(w io.Writer, s *admin.Status, now time.Time) error {
	_, err := fmt.Fprintf(w, "%s (%s, pid %d, %s): %s, on_failure %s, connect %s, up %s\n  scope %s\n  slots %s %s\n  open on relay %d, unaccounted %d\n  configuration %s\n",
		s.Instance, s.Kind, s.Pid, s.Version, s.State, s.OnFailure, s.Connect, now.Sub(s.Started).Round(time.Second),
		s.Scope, s.Slots4, s.Slots6, s.Live, s.Unaccounted, configurationText(&s.Configuration, now))
	if err != nil {
		return err
	}
	if o := s.TakenOver; o != nil {
		fmt.Fprintf(w, "  taken over %s ago from pid %d (%s), with %d open on relay, which paused for %s\n",
			now.Sub(o.At).Round(time.Second), o.Pid, o.Version, o.Connections, o.Pause.Round(100*time.Microsecond))
	}
	for _, p := range s.Problems {
		fmt.Fprintf(w, "  ! %s\n", p)
	}
	for _, text := range refusalTexts(s.Configuration.Refused) {
		fmt.Fprintf(w, "  ! %s\n", text)
	}
	for _, text := range silentTexts(s.Services) {
		fmt.Fprintf(w, "  ! %s\n", text)
	}
	if len(s.Services) > 0 {
		fmt.Fprintln(w)
		if err := printServices(w, s.Services, now); err != nil {
			return err
		}
	}
	t := newTable("reason", "count")
	for _, name := range slices.Sorted(maps.Keys(s.Counters)) {
		t.AppendRow([]any{name, s.Counters[name]})
	}
	fmt.Fprintln(w)
	return printTable(w, t)
}

// configurationText says which configuration holds and since when.
func configurationText(c *admin.ConfigurationStatus, now time.Time) string {
	text := fmt.Sprint(c.Generation)
	if c.File != "" {
		text += " of " + c.File
	}
	if !c.Loaded.IsZero() {
		text += fmt.Sprintf(", for %s", now.Sub(c.Loaded).Round(time.Second))
	}
	return text
}

// refusalTexts say what was refused and why, in several lines each. All that is
// wrong with the configuration as a whole is one text.
func refusalTexts(refused []admin.Refusal) []string {
	var texts []string
	whole := false
	for i := range refused {
		r := &refused[i]
		text := strings.TrimSpace(r.Text)
		if r.Where != "" && !strings.Contains(text, r.Where) {
			text = r.Where + ": " + text
		}
		text = "\n    " + strings.ReplaceAll(text, "\n", "\n    ")
		if r.Name == "" && whole {
			texts[len(texts)-1] += text
			continue
		}
		whole = r.Name == ""
		texts = append(texts, refusedText(r)+text)
	}
	return texts
}

// refusedText says what was refused, and what holds instead.
func refusedText(r *admin.Refusal) string {
	what, kept := r.Name, "there is no earlier state"
	if r.Source {
		what = "the source of " + what
	}
	switch {
	case r.Name == "":
		what, kept = "the configuration", "the earlier one stays"
	case len(r.Kept) == 1 && r.Kept[0] == r.Name:
		kept = "the earlier state stays"
	case len(r.Kept) > 0:
		kept = "the earlier state stays of " + strings.Join(r.Kept, ", ")
	}
	return fmt.Sprintf("%s is refused, %s:", what, kept)
}

// silentMost is how many sources are told of that cannot tell: if it is the server, it
// is all of them.
const silentMost = 10

// silentTexts say which sources cannot tell endpoints, and why.
func silentTexts(services []admin.ServiceStatus) []string {
	var texts []string
	more := 0
	for i := range services {
		s := &services[i]
		switch {
		case s.Source.Error == "":
		case len(texts) == silentMost:
			more++
		default:
			text := strings.ReplaceAll(strings.TrimSpace(s.Source.Error), "\n", "\n    ")
			texts = append(texts, fmt.Sprintf("the source of %s cannot tell its endpoints:\n    %s", s.Name, text))
		}
	}
	if more > 0 {
		texts = append(texts, fmt.Sprintf("nor can the sources of %d others", more))
	}
	return texts
}

// printServices prints one line per endpoint. Columns in which nothing stands
// are left out.
func printServices(w io.Writer, services []admin.ServiceStatus, now time.Time) error {
	t := newTable("service", "address", "path", "policy", "source", "endpoint", "zone", "weight", "state", "checks", "open", "connects", "failures", "last failure")
	t.SuppressEmptyColumns()
	for _, s := range services {
		policy := s.Policy
		if s.Path == flow.PathPass {
			policy = "-" // nothing is picked
		}
		row := []any{s.Name, s.Address, pathText(&s), policy, sourceText(&s.Source, now)}
		for _, e := range s.Endpoints {
			t.AppendRow(append(slices.Clone(row), e.Address, zoneText(&e), e.Weight, stateText(&e), checksText(&e), e.Live, e.Connects, e.Failures, e.LastReason.String()))
		}
		if len(s.Endpoints) == 0 {
			t.AppendRow(append(row, "-", "", "-", "-", "", "-", "-", "-", "-"))
		}
	}
	return printTable(w, t)
}

// pathText is a service's path, and that it was asked for by another name.
func pathText(s *admin.ServiceStatus) string {
	path := s.Path.String()
	if s.PathAsked != "" && s.PathAsked != path {
		path += " (" + s.PathAsked + ")"
	}
	return path
}

// sourceText says where endpoints come from, and that they are old. Nothing
// stands for a static list.
func sourceText(s *admin.SourceStatus, now time.Time) string {
	if s.Kind == "" || s.Kind == admin.SourceStatic {
		return ""
	}
	text := strings.TrimSpace(s.Kind + " " + s.Name)
	switch {
	case s.Stale && s.Updated.IsZero():
		text += " (has not told yet)"
	case s.Stale:
		text += fmt.Sprintf(" (stale for %s)", now.Sub(s.Updated).Round(time.Second))
	}
	return text
}

// zoneText is an endpoint's zone, and that it is this one.
func zoneText(e *admin.EndpointStatus) string {
	if e.Local {
		return e.Zone + " (local)"
	}
	return e.Zone
}

// stateText is an endpoint's state, and what its health check says.
func stateText(e *admin.EndpointStatus) string {
	state := e.State
	if state == "" {
		// An instance of an earlier version.
		state = admin.StateOf(e.Ejected, e.Down)
	}
	if state == admin.EndpointLeftOut {
		return "left out (needs path: relay)"
	}
	if e.Down && e.Ejected {
		state += ", ejected"
	}
	if e.CheckError != "" {
		state += " (" + e.CheckError + ")"
	}
	return state
}

// checksText counts the health checks of an endpoint; there are none where it has none.
func checksText(e *admin.EndpointStatus) string {
	if e.ChecksPassed+e.ChecksFailed == 0 {
		return ""
	}
	return fmt.Sprintf("%d passed, %d failed", e.ChecksPassed, e.ChecksFailed)
}

func newResolve(g *global) *cobra.Command {
	var instance string
	var o output
	c := &cobra.Command{
		Use:   "resolve SLOT",
		Short: "Tell which address a slot stands for, as ss and tcpdump show slots",
		Long: `Tells which address a slot of the running instance stands for: what ss and tcpdump show
on the loopback interface in its place (240.x.y.z, or an address of fd70:696c:6c69::/48).
The ports are the same. The exit code is 1 where the slot stands for none now.`,
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
