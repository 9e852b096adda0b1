package main

import (
	"fmt"
	"os"

	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/pillion-project/pillion/loader/probe"
	"github.com/spf13/cobra"
)

func newDoctor(g *global) *cobra.Command {
	var o output
	var cgroup string
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Look whether this machine can run Pillion, and say what to do if not",
		Long: `Looks at the kernel, its features (each by loading a program), the capabilities
of this process, the mounts, the sysctls, the firewall and the programs of
others. Nothing is changed. The exit code is 69 when the main job cannot work.`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
				return err
			}
			findings := probe.Run(c.Context(), probe.Options{Cgroup: cgroup, BPFFS: g.bpffs})
			var err error
			if o.json() {
				err = printJSON(c.OutOrStdout(), findings)
			} else {
				err = printFindings(findings)
			}
			if err != nil {
				return err
			}
			for _, f := range findings {
				if f.Level == probe.Fail {
					return &exitError{code: exitUnsupported}
				}
			}
			return nil
		},
	}
	c.Flags().StringVar(&cgroup, "cgroup", "", "cgroup whose foreign programs are shown (default: the root)")
	o.add(c)
	return c
}

func printFindings(findings []probe.Finding) error {
	colours := map[probe.Level]text.Color{probe.OK: text.FgGreen, probe.Warn: text.FgYellow, probe.Fail: text.FgRed}
	t := newTable("", "check", "found")
	for _, f := range findings {
		level := f.Level.String()
		if coloured(os.Stdout) {
			level = text.Colors{colours[f.Level]}.Sprint(level)
		}
		t.AppendRow([]any{level, f.Name, f.Detail})
	}
	if err := printTable(os.Stdout, t); err != nil {
		return err
	}
	for _, f := range findings {
		if f.Cure != "" {
			fmt.Printf("\n%s: %s\n  %s\n", f.Name, f.Detail, f.Cure)
		}
	}
	return nil
}
