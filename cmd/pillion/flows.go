package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/spf13/cobra"
)

type flowsFlags struct {
	output   output
	instance string
	live     bool
	limit    int
	path     string
	end      string
}

func newFlows(g *global) *cobra.Command {
	f := &flowsFlags{}
	c := &cobra.Command{
		Use:   "flows",
		Short: "List connections: what was asked for, what it got, on which path and why",
		Long: `Lists the connections of the running instance that have ended, oldest first, or
with --live those that are open, on every path: those that the handler carries,
and those that the kernel does. When none runs, those of the command that ended
last.`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return listFlows(c.Context(), c.OutOrStdout(), g, f)
		},
	}
	f.output.add(c)
	flags := c.Flags()
	flags.StringVar(&f.instance, "instance", "", "name of the instance (default: the one that runs, or ended last)")
	flags.BoolVar(&f.live, "live", false, "list the open connections")
	flags.IntVar(&f.limit, "limit", 0, "list only this many, the newest (0: all that are kept, 4096 at most)")
	flags.StringVar(&f.path, "path", "", "list only those on this path: relay, direct, pass, deny, ...")
	flags.StringVar(&f.end, "end", "", "list only those that ended so: closed, dial_refused, upstream_reset, ...")
	return c
}

func (f *flowsFlags) query() (admin.FlowQuery, error) {
	q := admin.FlowQuery{Live: f.live, Limit: f.limit}
	var errs []error
	if f.limit < 0 {
		errs = append(errs, fmt.Errorf("--limit %d: want a number from 0", f.limit))
	}
	if f.path != "" {
		if err := q.Path.UnmarshalText([]byte(f.path)); err != nil {
			errs = append(errs, fmt.Errorf("--path: %w", err))
		}
	}
	if f.end != "" {
		if err := q.End.UnmarshalText([]byte(f.end)); err != nil {
			errs = append(errs, fmt.Errorf("--end: %w", err))
		}
	}
	return q, errors.Join(errs...)
}

func listFlows(ctx context.Context, w io.Writer, g *global, f *flowsFlags) error {
	if err := f.output.check(); err != nil {
		return err
	}
	q, err := f.query()
	if err != nil {
		return usage(err)
	}
	records, err := findFlows(ctx, g, f.instance, q)
	if err != nil {
		return err
	}
	if f.output.json() {
		if records == nil {
			records = []flow.Record{}
		}
		return printJSON(w, records)
	}
	return printFlows(w, records)
}

// findFlows asks the instance, or reads what an ended command left.
func findFlows(ctx context.Context, g *global, name string, q admin.FlowQuery) ([]flow.Record, error) {
	client, err := g.client(name)
	if err == nil {
		return client.Flows(ctx, q)
	}
	if !errors.Is(err, errNoInstance) {
		return nil, err
	}
	saved, loadErr := g.loadSaved(name)
	if loadErr != nil {
		return nil, errors.Join(err, loadErr)
	}
	fmt.Fprintf(os.Stderr, "%s ended %s ago (%s):\n", saved.Status.Instance,
		time.Since(saved.Ended).Round(time.Second), saved.command())
	if q.Live {
		return nil, nil
	}
	return q.Apply(saved.Flows), nil
}

// printFlows prints one line per connection.
func printFlows(w io.Writer, records []flow.Record) error {
	t := newTable("asked for", "endpoint", "path", "reason", "sent", "received", "rtt", "connect", "duration", "end", "service", "source")
	for _, r := range records {
		end := r.End.String()
		if r.Open {
			end = "open"
		}
		if r.Attempts > 1 {
			end += fmt.Sprintf(" (%d attempts)", r.Attempts)
		}
		t.AppendRow([]any{
			address(r.OrigDst), address(r.Endpoint), r.Path.String(), r.Reason.String(), size(r.Sent), size(r.Received),
			span(r.RTT), span(r.Connect), span(r.Duration), end, dash(r.Service), address(r.Source),
		})
	}
	return printTable(w, t)
}

func address(a netip.AddrPort) string {
	if !a.IsValid() {
		return "-"
	}
	return a.String()
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
