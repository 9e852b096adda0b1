package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/pillion-project/pillion/tests/peers"
	"golang.org/x/sys/unix"
)

// report is everything that was measured.
type report struct {
	Machine machine `json:"machine"`
	Rounds  int     `json:"rounds"`
	Idle    []idle  `json:"idle"`
	// Samples are by work and arm, one per round.
	Samples map[string]map[string][]sample `json:"samples"`
	Rows    []row                          `json:"rows"`
	Targets []target                       `json:"targets"`
	// Paths is part direct; nil: it was not asked for.
	Paths *pathReport `json:"paths,omitempty"`
	works []work
}

// machine is where it was measured.
type machine struct {
	Date       string            `json:"date"`
	Kernel     string            `json:"kernel"`
	Processors int               `json:"processors"`
	Go         string            `json:"go"`
	Versions   map[string]string `json:"versions"`
	// Busy is the share of the processors that others used before the work.
	Busy float64 `json:"busy"`
}

// idle is a proxy that was started a while ago and does nothing.
type idle struct {
	Arm string `json:"arm"`
	// Memory is resident, in bytes.
	Memory int64 `json:"memory_bytes"`
	// CPU is in ns per second.
	CPU float64 `json:"cpu_ns_per_second"`
	// After is what is resident when all the work is done.
	After int64 `json:"memory_after_bytes"`
}

// busyMost is how much of the machine others may use before the report warns.
const busyMost = 0.05

// idleTime is how long a proxy is watched doing nothing, after as long a rest.
const idleTime = 3 * time.Second

func newReport(o *options) *report {
	r := &report{Rounds: o.rounds, works: o.works(allWorks()), Samples: map[string]map[string][]sample{}, Machine: thisMachine()}
	for _, w := range r.works {
		r.Samples[w.Name] = map[string][]sample{}
	}
	return r
}

func thisMachine() machine {
	m := machine{Date: time.Now().UTC().Format(time.DateOnly), Processors: runtime.NumCPU(), Go: runtime.Version(),
		Versions: map[string]string{
			armHAProxy: firstLine(armHAProxy, "-v"),
			armNginx:   firstLine(armNginx, "-v"),
		}}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	return m
}

// firstLine returns what a program says of itself, or nothing.
func firstLine(name, arg string) string {
	path, err := peers.Find(name)
	if err != nil {
		return ""
	}
	out, err := exec.Command(path, arg).CombinedOutput()
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line
}

// rest looks at proxies that have nothing to do.
func (r *report) rest(ctx context.Context, arms []*arm) error {
	if err := pause(ctx, idleTime); err != nil {
		return err
	}
	before, busy := map[string]int64{}, machineClock()
	for _, a := range arms {
		if a.process == nil || len(a.only) > 0 {
			continue
		}
		var err error
		if before[a.name], err = cpuOf(a.process.pid()); err != nil {
			return err
		}
	}
	if err := pause(ctx, idleTime); err != nil {
		return err
	}
	r.Machine.Busy = busy.since()
	for _, a := range arms {
		if a.process == nil || len(a.only) > 0 {
			continue
		}
		cpu, err := cpuOf(a.process.pid())
		if err != nil {
			return err
		}
		i := idle{Arm: a.name, CPU: float64(cpu-before[a.name]) / idleTime.Seconds()}
		if i.Memory, err = rssOf(a.process.pid()); err != nil {
			return err
		}
		r.Idle = append(r.Idle, i)
	}
	return nil
}

// restAgain looks at what the proxies keep after the work.
func (r *report) restAgain(arms []*arm) error {
	for i := range r.Idle {
		for _, a := range arms {
			if a.name != r.Idle[i].Arm {
				continue
			}
			var err error
			if r.Idle[i].After, err = rssOf(a.process.pid()); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *report) add(work, arm string, s sample) {
	r.Samples[work][arm] = append(r.Samples[work][arm], s)
}

// row is one arm at one work: medians of the rounds.
type row struct {
	Work string `json:"work"`
	Arm  string `json:"arm"`
	sample
	// Ratio is the median of the rounds' ratios of relay's proxy time to this
	// arm's; 0 for relay itself and for no proxy.
	Ratio float64 `json:"relay_to_this,omitempty"`
}

// sum computes the rows and what became of the targets.
func (r *report) sum() {
	r.Rows, r.Targets = nil, nil
	for _, w := range r.works {
		for _, name := range []string{armDirect, armRelay, armMirror, armHAProxy, armNginx} {
			if len(r.Samples[w.Name][name]) == 0 {
				continue
			}
			r.Rows = append(r.Rows, r.row(w.Name, name))
		}
	}
	r.Targets = r.judge()
}

func (r *report) row(work, arm string) row {
	all := r.Samples[work][arm]
	of := func(f func(sample) float64) float64 { return median(values(all, f)) }
	out := row{Work: work, Arm: arm, sample: sample{
		Proxy: of(func(s sample) float64 { return s.Proxy }),
		All:   of(func(s sample) float64 { return s.All }),
		Wall:  of(func(s sample) float64 { return s.Wall }),
		P50:   of(func(s sample) float64 { return s.P50 }),
	}}
	if arm != armDirect && arm != armRelay {
		out.Ratio = r.ratio(work, arm)
	}
	return out
}

func values(all []sample, f func(sample) float64) []float64 {
	var v []float64
	for _, s := range all {
		v = append(v, f(s))
	}
	return v
}

// ratio is the median over the rounds of relay's proxy time by that of the best
// of the arms in the same round.
func (r *report) ratio(work string, arms ...string) float64 {
	var ratios []float64
	for i, s := range r.Samples[work][armRelay] {
		best := r.Samples[work][arms[0]][i].Proxy
		for _, a := range arms[1:] {
			best = min(best, r.Samples[work][a][i].Proxy)
		}
		ratios = append(ratios, s.Proxy/best)
	}
	return median(ratios)
}

// write prints the report.
func (r *report) write(w io.Writer, format string) error {
	r.sum()
	if r.Paths != nil {
		r.Paths.sum()
	}
	if format == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	m := r.Machine
	fmt.Fprintf(w, "%s: Linux %s, %d processors, %s; %s; %s; medians of %d rounds\n",
		m.Date, m.Kernel, m.Processors, m.Go, m.Versions[armHAProxy], m.Versions[armNginx], r.Rounds)
	if m.Busy > busyMost {
		fmt.Fprintf(w, "others kept %.0f%% of the processors busy: the figures are rough\n", 100*m.Busy)
	}
	fmt.Fprintln(w)
	if len(r.Rows) > 0 {
		if err := render(w, r.works2table(), r.idle2table(), targets2table(r.Targets)); err != nil {
			return err
		}
	}
	if r.Paths != nil {
		return r.Paths.write(w)
	}
	return nil
}

func render(w io.Writer, tables ...table.Writer) error {
	for _, t := range tables {
		t.SuppressTrailingSpaces()
		if _, err := fmt.Fprintf(w, "%s\n\n", t.Render()); err != nil {
			return err
		}
	}
	return nil
}

func (r *report) works2table() table.Writer {
	t := newTable("work", "arm", "proxy cpu", "all cpu", "wall", "p50", "relay : this", "per")
	for _, w := range r.works {
		for _, x := range r.Rows {
			if x.Work != w.Name {
				continue
			}
			ratio := ""
			if x.Ratio != 0 {
				ratio = fmt.Sprintf("%.2f", x.Ratio)
			}
			t.AppendRow(table.Row{x.Work, x.Arm, span(x.Proxy), span(x.All), span(x.Wall), span(x.P50), ratio, w.Unit})
		}
	}
	return t
}

func (r *report) idle2table() table.Writer {
	t := newTable("idle", "resident", "cpu per second", "resident after the work")
	for _, i := range r.Idle {
		t.AppendRow(table.Row{i.Arm, megabytes(i.Memory), span(i.CPU), megabytes(i.After)})
	}
	return t
}

func targets2table(all []target) table.Writer {
	t := newTable("target", "want", "measured", "met")
	for _, x := range all {
		met := "yes"
		if !x.Met {
			met = "NO"
		}
		t.AppendRow(table.Row{x.Name, x.want(), x.said(), met})
	}
	return t
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

func newTable(header ...any) table.Writer {
	t := table.NewWriter()
	style := table.StyleDefault
	style.Options = table.OptionsNoBordersAndSeparators
	style.Box.PaddingLeft, style.Box.PaddingRight = "", "  "
	style.Format.Header = text.FormatUpper
	t.SetStyle(style)
	t.AppendHeader(header)
	return t
}

// span prints ns with three digits or so.
func span(ns float64) string {
	switch {
	case ns == 0:
		return ""
	case ns < 1e6:
		return fmt.Sprintf("%.1f us", ns/1e3)
	default:
		return fmt.Sprintf("%.1f ms", ns/1e6)
	}
}

// verdict is an error that names every missed target.
func (r *report) verdict(quick bool) error {
	var errs []error
	all := r.Targets
	if r.Paths != nil {
		all = slices.Concat(all, r.Paths.Targets)
	}
	for _, t := range all {
		if !t.Met && !quick {
			errs = append(errs, fmt.Errorf("target missed: %s is %.*f, want %s", t.Name, t.digits(), t.Measured, t.want()))
		}
	}
	return errors.Join(errs...)
}
