package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/loader/probe"
	"github.com/spf13/cobra"
)

// execFlags are those of exec.
type execFlags struct {
	services  []string
	deny      []string
	exclude   []string
	file      string
	onFailure string
	path      string
	connect   string
	existing  string
	user      string
	name      string
	drain     time.Duration
	summary   bool
}

func newExec(g *global) *cobra.Command {
	f := &execFlags{}
	c := &cobra.Command{
		Use:   "exec [flags] -- CMD [ARG...]",
		Short: "Run one command with its connections redirected",
		Long: `Runs CMD in a cgroup of its own, redirects the TCP connections of all of its
processes, and takes everything away when it ends. The exit code is that of
CMD, or 128 and the number of the signal that ended it; 127 if there is no such
command, 126 if it cannot be run.`,
		Example: `  pillion exec --service 10.96.0.12:80=127.0.0.1:8081,127.0.0.1:8082 -- curl -s http://10.96.0.12/
  pillion exec --deny 0.0.0.0/0:25 --summary -- make deploy`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage(errors.New("exec: which command? Write it after --"))
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error { return execute(c.Context(), g, f, args) },
	}
	c.Flags().SetInterspersed(false)
	flags := c.Flags()
	flags.StringArrayVar(&f.services, "service", nil, "ADDR:PORT=ENDPOINT[,ENDPOINT...]: serve an address from endpoints; ENDPOINT is ADDR:PORT or ADDR:PORT*WEIGHT (repeatable)")
	flags.StringArrayVar(&f.deny, "deny", nil, "CIDR[:PORT]: refuse connections there at once (repeatable)")
	flags.StringArrayVar(&f.exclude, "exclude", nil, "CIDR[:PORT]: leave connections there alone (repeatable)")
	flags.StringVar(&f.file, "config", "", "configuration to start from; flags come on top")
	flags.StringVar(&f.path, "path", "", "relay, direct, pass or auto: which way connections to services go that do not say (default relay)")
	flags.StringVar(&f.onFailure, "on-failure", "", "open or closed: what becomes of a connection that cannot be redirected (default open)")
	flags.StringVar(&f.connect, "connect", "", "adaptive, mirror or early: when a redirected connect ends (default adaptive)")
	flags.StringVar(&f.existing, "existing", "", "report or reset: what becomes of connections older than the capture (default report)")
	flags.StringVar(&f.user, "user", "", "run CMD as this user (default: who called sudo)")
	flags.StringVar(&f.name, "name", "", "name of the instance (default: made of the process number)")
	durationVar(flags, &f.drain, "drain-timeout", 3*time.Second, "how long connections may go on after CMD has ended")
	flags.BoolVar(&f.summary, "summary", false, "print the flows when CMD has ended, to stderr")
	return c
}

// configuration reads the file, if there is one, with the flags on top.
func (f *execFlags) configuration(flags config.Flags) (*config.Config, error) {
	if f.file == "" {
		return flags.Parse("", nil)
	}
	text, err := config.Read(f.file)
	if err != nil {
		return nil, err
	}
	return flags.Parse(f.file, text)
}

// overlay is what the flags say, on top of any file.
func (f *execFlags) overlay() (config.Flags, error) {
	services, err := f.servicesSaid()
	deny, err2 := rulesSaid("--deny", f.deny)
	exclude, err3 := rulesSaid("--exclude", f.exclude)
	if err := errors.Join(err, err2, err3); err != nil {
		return nil, err
	}
	return func(c *config.Config) {
		for _, s := range services {
			c.Services = append(c.Services, s)
			c.Said(fmt.Sprintf("services[%d]", len(c.Services)-1), "--service")
		}
		for _, r := range deny {
			c.Deny = append(c.Deny, r)
			c.Said(fmt.Sprintf("deny[%d]", len(c.Deny)-1), "--deny")
		}
		for _, r := range exclude {
			c.Exclude = append(c.Exclude, r)
			c.Said(fmt.Sprintf("exclude[%d]", len(c.Exclude)-1), "--exclude")
		}
		say(c, &c.Path, f.path, "path", "--path")
		say(c, &c.OnFailure, f.onFailure, "on_failure", "--on-failure")
		say(c, &c.Connect, f.connect, "connect", "--connect")
		say(c, &c.Existing, f.existing, "existing", "--existing")
	}, nil
}

// say sets a setting to what a flag says, if that says anything.
func say[T ~string](c *config.Config, setting *T, said, path, flag string) {
	if said != "" {
		*setting = T(said)
		c.Said(path, flag)
	}
}

func (f *execFlags) servicesSaid() ([]config.Service, error) {
	var all []config.Service
	var errs []error
	for _, s := range f.services {
		service, err := config.ParseService(s)
		if err != nil {
			for line := range strings.Lines(err.Error()) {
				errs = append(errs, fmt.Errorf("--service %q: %s", s, strings.TrimSpace(line)))
			}
		}
		all = append(all, service)
	}
	return all, errors.Join(errs...)
}

func rulesSaid(flag string, said []string) ([]config.Rule, error) {
	var all []config.Rule
	var errs []error
	for _, s := range said {
		rule, err := config.ParseRule(s)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", flag, err))
		}
		all = append(all, rule)
	}
	return all, errors.Join(errs...)
}

// execute returns an exitError with the command's code.
func execute(ctx context.Context, g *global, f *execFlags, args []string) error {
	log, err := g.logger(slog.LevelWarn)
	if err != nil {
		return err
	}
	defer outliveLog()()
	flags, err := f.overlay()
	if err != nil {
		return usage(err)
	}
	c, err := f.configuration(flags)
	if err != nil {
		return usage(err)
	}
	who, err := credential(f.user)
	if err != nil {
		return usage(err)
	}
	name := f.name
	if name == "" {
		name = "exec-" + strconv.Itoa(os.Getpid()) + "-" + strconv.FormatInt(time.Now().Unix(), 36)
	}
	if err := loader.CheckName(name); err != nil {
		return usage(fmt.Errorf("--name: %w", err))
	}
	if err := probe.Required(ctx); err != nil {
		return &exitError{code: exitUnsupported, err: err}
	}
	root, err := probe.CgroupRoot()
	if err != nil {
		return &exitError{code: exitUnsupported, err: err}
	}
	cgroup, err := newCommandCgroup(root, name)
	if err != nil {
		return err
	}
	p := plan{name: name, kind: loader.KindExec, cgroups: root, config: c, global: g, log: log, file: f.file, merge: flags.ParsePartial}
	if p.scope, err = loader.FindScope(root, cgroup.path); err != nil {
		return errors.Join(err, cgroup.remove())
	}
	code, err := p.around(ctx, f, newChild(args, cgroup, who), cgroup)
	if err != nil || code != 0 {
		if exit, ok := errors.AsType[*exitError](err); ok && code == 0 {
			return exit
		}
		if code == 0 {
			code = exitFailed
		}
		return &exitError{code: code, err: err}
	}
	return nil
}

// around runs the command inside an instance.
func (p plan) around(ctx context.Context, f *execFlags, child *child, cgroup *commandCgroup) (code int, err error) {
	// Signals are the command's: it ends, and then we do.
	ctx = context.WithoutCancel(ctx)
	i, err := open(p)
	if err != nil {
		return 0, errors.Join(err, cgroup.remove())
	}
	stop, end := context.WithCancel(ctx)
	force, kill := context.WithCancel(ctx)
	defer kill()
	defer end()
	var timer *time.Timer
	served := i.serve(stop, force, func() error {
		var err error
		code, err = child.run()
		p.reportLeft(cgroup)
		timer = time.AfterFunc(f.drain, kill)
		end()
		return err
	})
	if timer != nil {
		timer.Stop()
	}
	saved := i.save(child.cmd.Args)
	if f.summary {
		saved = errors.Join(saved, i.printSummary())
	}
	if saved != nil {
		p.log.Warn("the flows of the command are not kept", "error", saved) // it has done what it was to
	}
	return code, errors.Join(served, i.end(), cgroup.remove())
}

// reportLeft moves what the command left running out of the scope.
func (p plan) reportLeft(cgroup *commandCgroup) {
	left, err := cgroup.leave()
	if len(left) > 0 {
		p.log.Warn("the command left processes running; from now on their connections are not redirected", "pids", left)
	}
	if err != nil {
		p.log.Error("cannot move what the command left running", "error", err)
	}
}
