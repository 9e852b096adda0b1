package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/spf13/cobra"
)

func newValidate() *cobra.Command {
	var o output
	c := &cobra.Command{
		Use:   "validate FILE",
		Short: "Tell whether a configuration is right, and everything that is wrong with it",
		Long: `Reads a configuration as run and exec do, and touches nothing. Its problems are
told at once, each with its line and column and what was meant: all of them
with -o json, else the first 50 and how many more there are. What is wrong with
the YAML is told alone. The exit code is then 64. Files that the configuration
names, such as those of discover, are not looked at.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(errors.New("validate: want one configuration file"))
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			if err := o.check(); err != nil {
				return err
			}
			return validate(c.OutOrStdout(), &o, args[0])
		},
	}
	o.add(c)
	return c
}

// validated is what validate says as JSON.
type validated struct {
	File     string           `json:"file"`
	OK       bool             `json:"ok"`
	Services int              `json:"services"`
	Problems []config.Problem `json:"problems"`
}

// validate returns an exitError if the configuration is not right.
func validate(w io.Writer, o *output, file string) error {
	c, err := config.Load(file)
	switch {
	case err == nil && o.json():
		return printJSON(w, validated{File: file, OK: true, Services: len(c.Services), Problems: []config.Problem{}})
	case err == nil:
		_, err := fmt.Fprintf(w, "%s: ok: %s\n", file, contents(c))
		return err
	case o.json():
		if err := printJSON(w, validated{File: file, Problems: config.Problems(err)}); err != nil {
			return err
		}
		return &exitError{code: exitUsage}
	default:
		return usage(err)
	}
}

// contents counts what is in a configuration, in words.
func contents(c *config.Config) string {
	paths := make(map[flow.Path]int)
	endpoints, sources := 0, 0
	for i := range c.Services {
		s := &c.Services[i]
		path, _ := c.PathOf(s)
		paths[path]++
		endpoints += len(s.Endpoints)
		if s.Discover != nil {
			sources++
		}
	}
	services := count(len(c.Services), "service")
	var on []string
	for _, p := range flow.Paths() {
		if paths[p] > 0 {
			on = append(on, fmt.Sprintf("%d on %s", paths[p], p))
		}
	}
	if len(on) > 0 {
		services += " (" + strings.Join(on, ", ") + ")"
	}
	all := []string{services, count(endpoints, "endpoint")}
	if sources > 0 {
		all = append(all, count(sources, "source"))
	}
	if n := len(c.Deny) + len(c.Exclude); n > 0 {
		all = append(all, count(n, "rule"))
	}
	return strings.Join(all, ", ")
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
