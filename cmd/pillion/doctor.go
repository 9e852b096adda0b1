package main

import (
	"fmt"
	"os"
	"strings"

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
			if cgroup != "" {
				if _, err := os.Stat(cgroup); err != nil {
					return usage(fmt.Errorf("--cgroup: %w", err))
				}
			}
			ctx, stop := heeding(c.Context()) // a probe may have a cgroup to remove
			defer stop()
			findings := probe.Run(ctx, probe.Options{Cgroup: cgroup, BPFFS: g.bpffs})
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
	c.Flags().StringVar(&cgroup, "cgroup", "", "directory of the cgroup v2 that is tried, and whose foreign programs are shown (default: the root)")
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
	for _, line := range cures(findings) {
		fmt.Printf("\n%s\n", line)
	}
	return nil
}

// cures say what to do, once where it helps against several findings.
func cures(findings []probe.Finding) []string {
	against := make(map[string][]string)
	var order []string
	for _, f := range findings {
		if f.Cure == "" {
			continue
		}
		if len(against[f.Cure]) == 0 {
			order = append(order, f.Cure)
		}
		against[f.Cure] = append(against[f.Cure], f.Name+": "+f.Detail)
	}
	var all []string
	for _, cure := range order {
		what := against[cure]
		text := strings.Join(what[:min(len(what), curesNamed)], "\n")
		if more := len(what) - curesNamed; more > 0 {
			text += "\nand " + count(more, "more line") + " above"
		}
		all = append(all, text+"\n  "+cure)
	}
	return all
}

// curesNamed is how many findings are named again above what helps against them.
const curesNamed = 3
