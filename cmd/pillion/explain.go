package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/spf13/cobra"
)

type explainFlags struct {
	output   output
	instance string
	source   string
}

func newExplain(g *global) *cobra.Command {
	f := &explainFlags{}
	c := &cobra.Command{
		Use:   "explain DESTINATION",
		Short: "Tell what happens to connections to a destination, and why",
		Long: `Tells what the running instance does with connections to an address, to a
service by its name, or to a host name: which rule decides and where it stands,
which path they take and why not a cheaper one, and which endpoints there are.
The kernel's own code is asked, by a connect that is only tried out, so the
answer is what would happen now.

Of an address without a port, every port is told that a rule or a service names,
and, as port 0, all others.`,
		Example: `  pillion explain 10.96.0.12:80
  pillion explain web --source 10.1.0.7
  pillion explain shop.example:443 -o json`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 || args[0] == "" {
				return usage(errors.New("explain: want one destination: an address, a service or a host name"))
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			return explainTo(c.Context(), c.OutOrStdout(), g, f, args[0])
		},
	}
	f.output.add(c)
	flags := c.Flags()
	flags.StringVar(&f.instance, "instance", "", "name of the instance (default: the one that runs)")
	flags.StringVar(&f.source, "source", "", "address that the application's socket is bound to (default: none)")
	return c
}

func explainTo(ctx context.Context, w io.Writer, g *global, f *explainFlags, dst string) error {
	if err := f.output.check(); err != nil {
		return err
	}
	q := admin.ExplainQuery{Destination: dst}
	if f.source != "" {
		a, err := netip.ParseAddr(f.source)
		if err != nil {
			return usage(fmt.Errorf("--source %q is no address", f.source))
		}
		q.Source = a.Unmap()
	}
	client, err := g.client(f.instance)
	if err != nil {
		return err
	}
	all, err := client.Explain(ctx, q)
	if err != nil {
		err = fmt.Errorf("explain %s: %w", dst, err)
		if e, ok := errors.AsType[*admin.Error](err); ok && e.Code == http.StatusBadRequest {
			return usage(err)
		}
		return err
	}
	if f.output.json() {
		return printJSON(w, all)
	}
	for n, x := range all {
		if n > 0 {
			fmt.Fprintln(w)
		}
		if err := printExplanation(w, &x, time.Now()); err != nil {
			return err
		}
	}
	return nil
}

// printExplanation prints what is decided and why, and then the endpoints.
func printExplanation(w io.Writer, x *admin.Explanation, now time.Time) error {
	if _, err := fmt.Fprintln(w, destinationText(x)); err != nil {
		return err
	}
	t := newTable()
	row := func(name, value string) {
		if value != "" {
			t.AppendRow([]any{"  " + name, value})
		}
	}
	row("path", decisionText(x))
	row("rule", place(x.Rule.Text, x.Rule.Where))
	if s := x.Service; s != nil {
		if x.Rule.Kind != admin.RuleService {
			row("service", place(s.Name+", which the rule goes before", s.Where))
		}
		row("configured", configuredText(s))
	}
	for _, why := range x.Why {
		row("not", why)
	}
	row("on failure", x.OnFailure)
	if s := x.Service; s != nil {
		if s.Path != flow.PathPass {
			row("cluster", clusterText(s, now))
		}
		row("pick", pickText(x))
	}
	if err := printTable(w, t); err != nil || x.Service == nil || len(x.Service.Endpoints) == 0 {
		return err
	}
	fmt.Fprintln(w)
	return printEndpoints(w, x)
}

// destinationText is the heading.
func destinationText(x *admin.Explanation) string {
	text := x.Destination.String()
	if x.Destination.Port() == 0 {
		text = x.Destination.Addr().String() + ", any other port"
	}
	if !strings.Contains(x.Asked, x.Destination.Addr().String()) {
		// A name.
		text = x.Asked + ": " + text
	}
	if x.Source.IsValid() {
		text += " from " + x.Source.String()
	}
	return text
}

// decisionText is the path and the reason.
func decisionText(x *admin.Explanation) string {
	text := x.Path.String()
	if x.Errno != "" {
		text += " with " + x.Errno
	}
	return fmt.Sprintf("%s: %s (%s)", text, x.Meaning, x.Reason)
}

// configuredText is the path that the configuration gives a service.
func configuredText(s *admin.ServiceStatus) string {
	if s.PathAsked == s.Path.String() || s.PathAsked == "" {
		return "path: " + s.Path.String()
	}
	return fmt.Sprintf("path: %s, which is %s", s.PathAsked, s.Path)
}

// clusterText is where the endpoints come from and how they are picked.
func clusterText(s *admin.ServiceStatus, now time.Time) string {
	name := s.Cluster
	if name == "" {
		name = s.Name
	}
	n := 0
	for _, e := range s.Endpoints {
		if e.State != admin.EndpointRemoved {
			n++
		}
	}
	text := fmt.Sprintf("%s, %d endpoints by %s", name, n, s.Policy)
	if n == 1 {
		text = fmt.Sprintf("%s, 1 endpoint", name)
	}
	if source := sourceText(&s.Source, now); source != "" {
		text += ", from " + source
	}
	if s.Source.Error != "" {
		text += ": " + s.Source.Error
	}
	return text
}

// pickText is what a dry pick gave.
func pickText(x *admin.Explanation) string {
	// An instance of an earlier version tells also what nobody gets.
	if !x.Pick.IsValid() || !picks(x) {
		return ""
	}
	text := x.Pick.String() + ", this time"
	if x.Path != flow.PathDirect {
		text = x.Pick.String() + ", if the connect hook picked"
	}
	for _, e := range x.Service.Endpoints {
		// On relay it is the handler that has ejected it, and not the one that picked.
		if x.Service.Path == flow.PathDirect && e.Address == x.Pick.String() && e.Ejected {
			text += "; it is ejected, but too few others are left"
		}
	}
	return text
}

// printEndpoints prints one line per endpoint, with a sign at the one that was
// picked.
func printEndpoints(w io.Writer, x *admin.Explanation) error {
	t := newTable("endpoint", "pick", "zone", "weight", "state", "open", "connects", "failures", "last failure")
	t.SuppressEmptyColumns()
	for _, e := range x.Service.Endpoints {
		pick := ""
		if pickText(x) != "" && e.Address == x.Pick.String() {
			pick = "*"
		}
		t.AppendRow([]any{e.Address, pick, zoneText(&e), e.Weight, stateText(&e), e.Live, e.Connects, e.Failures, e.LastReason.String()})
	}
	return printTable(w, t)
}
