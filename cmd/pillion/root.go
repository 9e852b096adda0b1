package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

// version is set by the linker for a release.
var version = ""

// buildVersion says which build this is: a release, or a commit.
func buildVersion() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	revision, dirty := "", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "+changes"
		}
	}
	if revision == "" {
		return "devel"
	}
	return "devel-" + revision[:min(12, len(revision))] + dirty
}

// global are the flags that every command has, and what an earlier process left.
type global struct {
	logLevel  string
	logFormat string
	runtime   string
	bpffs     string

	survival *survival // nil: nobody keeps this process's descriptors
}

func newRoot(left *survival) *cobra.Command {
	g := &global{survival: left}
	root := &cobra.Command{
		Use:   "pillion",
		Short: "Redirect an application's connections, balance them, and record every one",
		Long: `Pillion stands beside an application that knows nothing of it. eBPF programs
redirect the application's connections to a handler, which balances them over
endpoints and records every one. Nothing else on the machine changes.`,
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		Args:              cobra.ArbitraryArgs, // else cobra refuses them, with another exit code
		RunE:              noCommand,
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usage(fmt.Errorf("%w (see %s --help)", flagError(err), c.CommandPath()))
	})
	f := root.PersistentFlags()
	f.StringVar(&g.logLevel, "log-level", "", "least level to log: debug, info, warn, error (default info for run, else warn)")
	f.StringVar(&g.logFormat, "log-format", "text", "form of log lines: text or json")
	f.StringVar(&g.runtime, "runtime-dir", "/run/pillion", "directory of the admin sockets and of the flows of ended commands")
	f.StringVar(&g.bpffs, "bpffs", "/sys/fs/bpf", "bpf file system to pin in; mounted if it is not")
	root.AddCommand(
		newExec(g), newRun(g), newInit(g), newReady(g), newLive(g), newStatus(g), newFlows(g), newDoctor(g),
		newResolve(g), newExplain(g), newReload(g), newUnload(g), newVersion(),
		newValidate(), newDiff(g), newInject(), newWebhook(g),
	)
	// As well known as the command.
	root.Version = buildVersion()
	root.SetVersionTemplate("pillion {{.Version}}\n")
	root.InitDefaultHelpCmd()
	for _, c := range root.Commands() {
		if c.Name() == "help" {
			c.Args = helpArgs
		}
	}
	return root
}

// flagError says what a flag wants, where the flag package shows what a parser of Go's
// library said.
func flagError(err error) error {
	invalid, ok := errors.AsType[*pflag.InvalidValueError](err)
	if ok && invalid.GetFlag().Value.Type() == "int" {
		return fmt.Errorf("invalid argument %q for \"--%s\" flag: want a number", invalid.GetValue(), invalid.GetFlag().Name)
	}
	return err
}

// helpArgs refuses a command that there is not: cobra would show what all are about,
// as if that had been asked.
func helpArgs(c *cobra.Command, args []string) error {
	if found, _, err := c.Root().Find(args); len(args) > 0 && (err != nil || found == c.Root()) {
		return noCommand(c.Root(), args)
	}
	return nil
}

// logger returns the process's log, to stderr.
func (g *global) logger(otherwise slog.Level) (*slog.Logger, error) {
	level := otherwise
	if g.logLevel != "" {
		if err := level.UnmarshalText([]byte(g.logLevel)); err != nil {
			return nil, usage(fmt.Errorf("--log-level %q: want debug, info, warn or error", g.logLevel))
		}
	}
	o := &slog.HandlerOptions{Level: level}
	var form func(io.Writer) slog.Handler
	switch g.logFormat {
	case "text":
		form = func(w io.Writer) slog.Handler { return slog.NewTextHandler(w, o) }
	case "json":
		form = func(w io.Writer) slog.Handler { return slog.NewJSONHandler(w, o) }
	default:
		return nil, usage(fmt.Errorf("--log-format %q: want text or json", g.logFormat))
	}
	log := slog.New(form(newLogFile(unix.Stderr, form)))
	slog.SetDefault(log) // for what is given no logger
	return log, nil
}

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(c.OutOrStdout(), "pillion %s\n", buildVersion())
			return err
		},
	}
}

// noCommand is what pillion does without a command, or with one that it has not.
func noCommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return c.Help()
	}
	hint := ""
	if like := c.SuggestionsFor(args[0]); len(like) > 0 {
		hint = fmt.Sprintf(", did you mean %s?", strings.Join(like, " or "))
	}
	return usage(fmt.Errorf("unknown command %q%s (see %s --help)", args[0], hint, c.CommandPath()))
}

// noArgs is cobra's, with our exit code.
func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage(fmt.Errorf("%s takes no argument, got %q", c.CommandPath(), strings.Join(args, " ")))
	}
	return nil
}
