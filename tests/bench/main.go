package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The roles that the binary starts itself in. Without one it is what the user
// started.
const (
	roleInside = "inside-the-namespace"
	roleServer = "server"
	roleClient = "client"
	roleSpin   = "spinner"
)

// The parts, by name.
const (
	partRelay  = "relay"
	partDirect = "direct"
)

func partNames() []string { return []string{partRelay, partDirect} }

// options are the flags.
type options struct {
	rounds int
	quick  bool
	spin   bool
	// Of each start, for workHook.
	scatter bool
	parts   []string
	only    []string // names of works; none: all
	output  string
}

func main() {
	// Processes are started from this thread and end with it.
	runtime.LockOSThread()
	var err error
	role, args := "", os.Args[1:]
	if len(args) > 0 {
		role = args[0]
	}
	if role == roleServer || role == roleClient || role == roleSpin {
		// One processor is a plain event loop. With more, the Go runtime's
		// search for work would run beside the proxy that is measured.
		runtime.GOMAXPROCS(1)
	}
	switch role {
	case roleServer:
		err = serve(args[1:])
	case roleClient:
		err = client(args[1:], os.Stdin, os.Stdout)
	case roleSpin:
		err = spin(args[1:])
	case roleInside:
		err = inside(args[1:])
	default:
		err = outside(args)
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit) && exit.ExitCode() > 0 && role == "":
		os.Exit(exit.ExitCode())
	case errors.Is(err, flag.ErrHelp):
	default:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parse(args []string) (*options, error) {
	o := &options{}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.IntVar(&o.rounds, "rounds", 9, "how often each arm does each work")
	f.BoolVar(&o.quick, "quick", false, "three rounds of an eighth of the work, to see it run: no target is enforced")
	f.BoolVar(&o.scatter, "scatter", true, "load the programs of each start somewhere else, for the work \"hook\"")
	f.BoolVar(&o.spin, "spin", true, "keep each processor awake by a spinner of lowest priority")
	only := f.String("only", "", "comma-separated works: "+strings.Join(workNames(), ", "))
	part := f.String("part", strings.Join(partNames(), ","), "comma-separated parts: "+partRelay+" (a hop, beside proxies), "+
		partDirect+" (no hop, beside nothing at all and address translation)")
	f.StringVar(&o.output, "o", "table", "form of the output: table or json")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("no argument is taken, got %q", f.Args())
	}
	if *only != "" {
		o.only = strings.Split(*only, ",")
	}
	for _, name := range o.only {
		if !slices.Contains(workNames(), name) {
			return nil, fmt.Errorf("--only %s: there are %s", name, strings.Join(workNames(), ", "))
		}
	}
	o.parts = strings.Split(*part, ",")
	for _, name := range o.parts {
		if !slices.Contains(partNames(), name) {
			return nil, fmt.Errorf("--part %s: there are %s", name, strings.Join(partNames(), ", "))
		}
	}
	if o.output != "table" && o.output != "json" {
		return nil, fmt.Errorf("-o %s: want table or json", o.output)
	}
	if o.rounds < 1 {
		return nil, fmt.Errorf("--rounds %d: want at least 1", o.rounds)
	}
	if o.quick {
		o.rounds = min(o.rounds, 3)
	}
	return o, nil
}

// outside runs the benchmark in a network namespace of its own, which is gone
// with its last process. Entering one afterwards would take this thread alone.
func outside(args []string) error {
	if _, err := parse(args); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root: it makes a network namespace and runs pillion")
	}
	cmd := exec.Command("/proc/self/exe", append([]string{roleInside}, args...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET,
		// Of a Ctrl-C it gets what is passed on below, once.
		Setpgid:   true,
		Pdeathsig: syscall.SIGTERM,
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start in a network namespace: %w", err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for {
		select {
		case <-signals:
			// It has ended, or it will.
			_ = cmd.Process.Signal(unix.SIGTERM)
		case err := <-done:
			return err
		}
	}
}

// inside measures, and returns an error when a target is missed.
func inside(args []string) (err error) {
	o, err := parse(args)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	r, err := measure(ctx, o)
	if err != nil {
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
		return err
	}
	if err := r.write(os.Stdout, o.output); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return r.verdict(o.quick)
}

// measure runs the parts that are asked for, one after the other.
func measure(ctx context.Context, o *options) (r *report, err error) {
	r = newReport(o)
	if slices.Contains(o.parts, partRelay) {
		if err := r.measure(ctx, o); err != nil {
			return nil, err
		}
	}
	if slices.Contains(o.parts, partDirect) {
		if r.Paths, err = measurePaths(ctx, o); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// measure makes the world, runs everything in it, and takes it away.
func (r *report) measure(ctx context.Context, o *options) (err error) {
	w, err := newWorld()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := w.furnish(); err != nil {
		return err
	}
	arms, err := w.arms(ctx)
	if err != nil {
		return err
	}
	if err := r.rest(ctx, arms); err != nil {
		return err
	}
	if o.spin {
		if err := w.startSpinners(); err != nil {
			return err
		}
	}
	say := progress(os.Stderr)
	for round := range o.rounds {
		for _, work := range r.works {
			// Nobody always comes after the same one.
			for i := range arms {
				a := arms[(round+i)%len(arms)]
				if !a.does(work) {
					continue
				}
				say("round %d of %d: %s, %s", round+1, o.rounds, work.Name, a.name)
				s, err := w.run(ctx, a, work)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", work.Name, a.name, err)
				}
				r.add(work.Name, a.name, s)
			}
		}
	}
	say("")
	if err := w.relayed(ctx); err != nil {
		return err
	}
	return r.restAgain(arms)
}

// progress returns a printf of one line that it writes over, on a terminal;
// nothing is said elsewhere.
func progress(f *os.File) func(format string, args ...any) {
	if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err != nil {
		return func(string, ...any) {}
	}
	return func(format string, args ...any) {
		_, _ = io.WriteString(f, "\r\x1b[K"+fmt.Sprintf(format, args...))
	}
}

// pause waits for d or the end.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
