package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/pillion-project/pillion/cmd/pillion/config"
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
are taken. The exit code is 64 when anything was refused.`,
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
	if _, err := fmt.Fprintf(w, "configuration %d holds\n", r.Generation); err != nil {
		return err
	}
	for _, f := range r.Refused {
		if _, err := fmt.Fprintf(w, "  ! %s\n", refusalText(&f, "    ")); err != nil {
			return err
		}
	}
	var c config.Changes
	if len(r.Changes) > 0 {
		if err := json.Unmarshal(r.Changes, &c); err != nil {
			return fmt.Errorf("read what changed: %w", err)
		}
	}
	return printChanges(w, &output{}, &changes{Changes: c})
}

// reloadResult is what the admin socket tells of a reload: d is from the
// configuration before to the one that holds now, refused and err are those of
// [config.LoadPartial].
func reloadResult(generation uint64, d config.Changes, refused []config.Refused, err error) (admin.ReloadResult, error) {
	text, failed := json.Marshal(d)
	if failed != nil {
		return admin.ReloadResult{}, fmt.Errorf("tell what changed: %w", failed)
	}
	return admin.ReloadResult{Generation: generation, Changes: text, Refused: refusals(refused, err)}, nil
}

// refusals tells in the admin socket's words what was not taken. It is never nil.
func refusals(refused []config.Refused, err error) []admin.Refusal {
	all := []admin.Refusal{}
	if err != nil {
		all = append(all, admin.Refusal{Text: err.Error()})
	}
	for _, r := range refused {
		all = append(all, admin.Refusal(r))
	}
	return all
}
