package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/spf13/cobra"
)

func newReload(g *global) *cobra.Command {
	var instance string
	var o output
	c := &cobra.Command{
		Use:   "reload",
		Short: "Have a running instance read its configuration again",
		Long: `Has the running instance read its configuration again, as SIGHUP does, and says
what changed. A service that is refused keeps its last good state; the others
are taken. The exit code is 64 when anything of the file is refused.

An instance reads a file that changes by itself, too. What it has taken so is told
with the time at which it was.`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
				return err
			}
			client, err := g.client(instance)
			if err != nil {
				return err
			}
			return reload(c.Context(), c.OutOrStdout(), client, &o)
		},
	}
	c.Flags().StringVar(&instance, "instance", "", "name of the instance (default: the one that runs)")
	// What exec and run call it.
	c.Flags().StringVar(&instance, "name", "", "the same as --instance")
	o.add(c)
	return c
}

// reload asks for a reload and prints what became of it.
func reload(ctx context.Context, w io.Writer, client *admin.Client, o *output) error {
	r, err := client.Reload(ctx)
	if err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	if o.json() {
		err = printJSON(w, r)
	} else {
		err = printReload(w, &r)
	}
	if err == nil && len(r.Refused) > 0 {
		return &exitError{code: exitUsage}
	}
	return err
}

func printReload(w io.Writer, r *admin.ReloadResult) error {
	var b strings.Builder
	fmt.Fprintf(&b, "configuration %d holds%s\n", r.Generation, earlierText(r))
	changes := r.Changes
	if len(r.Changed) > 0 {
		changes = r.Changed // with all that a reload cannot change
	}
	if len(changes) == 0 {
		fmt.Fprintln(&b, "  nothing changed")
	}
	for _, c := range changes {
		fmt.Fprintf(&b, "  %s\n", c)
	}
	for _, text := range refusalTexts(r.Refused) {
		fmt.Fprintf(&b, "  ! %s\n", text)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// earlierText says when and by whom that was taken which a reload found in force.
func earlierText(r *admin.ReloadResult) string {
	if !r.Earlier {
		return ""
	}
	text := ", taken at " + r.Loaded.Local().Format(time.DateTime)
	switch r.By {
	case admin.TakenAtStart:
		text += " by the start"
	case admin.TakenByWatch:
		text += " by the watch on " + r.File
	case admin.TakenBySignal:
		text += " by a signal"
	case admin.TakenByReload:
		text += " by a reload"
	}
	return text
}
