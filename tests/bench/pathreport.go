package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/jedib0t/go-pretty/v6/table"
)

// pathReport is what part direct measured.
type pathReport struct {
	Rounds int `json:"rounds"`
	// Busy is as in machine, Missing what is not measured, and why.
	Busy     float64  `json:"busy"`
	Missing  []string `json:"missing,omitempty"`
	Versions []string `json:"versions"`
	// Samples are by work and arm, one per round.
	Samples map[string]map[string][]sample `json:"samples"`
	Rows    []pathRow                      `json:"rows"`
	Hooks   []hookRow                      `json:"hooks"`
	Targets []target                       `json:"targets"`
	works   []work
	arms    []string
	// namespaces is as in pathWorld.
	namespaces int
}

// pathRow is one arm at one work: medians of the rounds, and what it is by the arm
// armNone: the median of the rounds' ratios, 0 for that arm itself.
type pathRow struct {
	Work string `json:"work"`
	Arm  string `json:"arm"`
	sample
	AllRatio     float64 `json:"all_ratio,omitempty"`
	MachineRatio float64 `json:"machine_ratio,omitempty"`
	WallRatio    float64 `json:"wall_ratio,omitempty"`
	P50Ratio     float64 `json:"p50_ratio,omitempty"`
}

// hookRow is what one program of Pillion's cost per connection of an arm.
type hookRow struct {
	Arm     string `json:"arm"`
	Program string `json:"program"`
	programCost
	// Of the rounds, per run.
	Least float64 `json:"least_ns"`
	Most  float64 `json:"most_ns"`
}

func newPathReport(o *options) *pathReport {
	r := &pathReport{Rounds: o.rounds, works: o.works(pathWorks()), Samples: map[string]map[string][]sample{},
		Versions: []string{versionOf("nft", "--version"), versionOf("iptables-legacy", "--version")}}
	if !o.quick {
		r.Rounds *= 2
	}
	for _, w := range r.works {
		r.Samples[w.Name] = map[string][]sample{}
	}
	return r
}

// of notes what a world has; each of a run has the same.
func (r *pathReport) of(w *pathWorld) {
	r.Missing, r.arms = w.missing, nil
	for _, a := range w.arms {
		r.arms = append(r.arms, a.name)
	}
}

func (r *pathReport) add(work, arm string, s sample) {
	r.Samples[work][arm] = append(r.Samples[work][arm], s)
}

// What is compared of samples.
func (s sample) allCPU() float64     { return s.All }
func (s sample) machineCPU() float64 { return s.Machine }
func (s sample) wall() float64       { return s.Wall }
func (s sample) p50() float64        { return s.P50 }

// value is the median of the rounds.
func (r *pathReport) value(work, arm string, of func(sample) float64) float64 {
	return median(values(r.Samples[work][arm], of))
}

// ratio is the median of the rounds' ratios of an arm to armNone; 0 if there is
// none.
func (r *pathReport) ratio(work, arm string, of func(sample) float64) float64 {
	return median(r.ratios(work, arm, of))
}

func (r *pathReport) ratios(work, arm string, of func(sample) float64) (ratios []float64) {
	base := r.Samples[work][armNone]
	for i, s := range r.Samples[work][arm] {
		if i < len(base) && of(base[i]) > 0 {
			ratios = append(ratios, of(s)/of(base[i]))
		}
	}
	return ratios
}

// cpu is what the targets are held against: what the machine spent, if that is
// known.
func (r *pathReport) cpu(work string) func(sample) float64 {
	if r.value(work, armNone, sample.machineCPU) > 0 {
		return sample.machineCPU
	}
	return sample.allCPU
}

// sum computes the rows and what became of the targets.
func (r *pathReport) sum() {
	r.Rows, r.Hooks, r.Targets = nil, nil, nil
	for _, w := range r.works {
		for _, arm := range r.arms {
			if len(r.Samples[w.Name][arm]) == 0 {
				continue
			}
			if w.Name == workHook {
				r.Hooks = append(r.Hooks, r.hooks(arm)...)
				continue
			}
			r.Rows = append(r.Rows, r.row(w.Name, arm))
		}
	}
	r.Targets = r.judge()
}

func (r *pathReport) row(work, arm string) pathRow {
	x := pathRow{Work: work, Arm: arm, sample: sample{
		Proxy:   r.value(work, arm, func(s sample) float64 { return s.Proxy }),
		All:     r.value(work, arm, sample.allCPU),
		Machine: r.value(work, arm, sample.machineCPU),
		Wall:    r.value(work, arm, sample.wall),
		P50:     r.value(work, arm, sample.p50),
	}}
	if arm != armNone {
		x.AllRatio = r.ratio(work, arm, sample.allCPU)
		x.MachineRatio = r.ratio(work, arm, sample.machineCPU)
		x.WallRatio = r.ratio(work, arm, sample.wall)
		x.P50Ratio = r.ratio(work, arm, sample.p50)
	}
	return x
}

// hooks are what the programs cost on an arm, by name.
func (r *pathReport) hooks(arm string) []hookRow {
	samples := r.Samples[workHook][arm]
	var names []string
	for _, s := range samples {
		for name := range s.Programs {
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	var all []hookRow
	for _, name := range names {
		var each []float64
		for _, s := range samples {
			if c := s.Programs[name]; c.Runs > 0 {
				each = append(each, c.Nanos/c.Runs)
			}
		}
		all = append(all, hookRow{Arm: arm, Program: name, Least: slices.Min(each), Most: slices.Max(each), programCost: programCost{
			Runs:  median(values(samples, func(s sample) float64 { return s.Programs[name].Runs })),
			Nanos: median(values(samples, func(s sample) float64 { return s.Programs[name].Nanos })),
		}})
	}
	return all
}

// pathAim is a target for arms: what of a work is at most, by what it is with
// nothing.
type pathAim struct {
	work, name string
	of         func(sample) float64 // nil: what the processors spent
	most       float64
	// rate is set where the target is one of work per time: at least.
	rate bool
}

func pathAims() []pathAim {
	return []pathAim{
		{workLatency, "round trip (p50, one connection)", sample.p50, 1.03, false},
		{workRoundTrip, "round trip (wall, 32 connections)", sample.wall, 1.03, false},
		{workRoundTrip, "CPU per round trip", nil, 1.02, false},
		{workCRR, "connection rate, one at a time", sample.wall, 0.95, true},
		{workConnection, "connection rate, eight at a time", sample.wall, 0.95, true},
		{workConnection, "CPU per connection", nil, 1.06, false},
		{workDownload, "throughput", sample.wall, 0.98, true},
	}
}

// hookMost is the cost of the connect hook in ns.
const hookMost = 400

// aimed are the arms that have targets.
var aimed = []string{armPass, armPathDirect, armDirectMany}

// held holds what was measured against an aim; false: it was not asked for.
func (r *pathReport) held(a pathAim, arm string) (target, bool) {
	if len(r.Samples[a.work][arm]) == 0 {
		return target{}, false
	}
	of := a.of
	if of == nil {
		of = r.cpu(a.work)
	}
	name, ratios := fmt.Sprintf("%s: %s : nothing", arm, a.name), r.ratios(a.work, arm, of)
	t := newTarget(name, a.most, median(ratios))
	if a.rate {
		for i := range ratios {
			ratios[i] = 1 / ratios[i]
		}
		t = newRate(name, a.most, median(ratios))
	}
	t.Error = medianError(ratios)
	return t, true
}

// isUnclear tells whether a target of a work is as near as chance goes: within twice the
// error of what was measured.
func (r *pathReport) isUnclear(w work) bool {
	for _, arm := range aimed {
		for _, a := range pathAims() {
			if a.work != w.Name {
				continue
			}
			if t, ok := r.held(a, arm); ok && math.Abs(t.Measured-a.most) < 2*t.Error {
				return true
			}
		}
	}
	return false
}

// judge holds what was measured against the targets.
func (r *pathReport) judge() []target {
	var all []target
	for _, arm := range aimed {
		for _, a := range pathAims() {
			if t, ok := r.held(a, arm); ok {
				all = append(all, t)
			}
		}
	}
	for _, h := range r.Hooks {
		if h.Program == hookProgram {
			all = append(all, newTarget(h.Arm+": ns in the connect hook", hookMost, h.Nanos/h.Runs))
		}
	}
	return all
}

// rounds says how many there were.
func (r *pathReport) rounds() string {
	all := fmt.Sprintf("%d rounds", r.Rounds)
	for _, w := range r.works {
		if n := len(r.Samples[w.Name][armNone]); n > r.Rounds {
			all += fmt.Sprintf(", %s %d", w.Name, n)
		}
	}
	return all
}

// write prints the report.
func (r *pathReport) write(w io.Writer) error {
	fmt.Fprintf(w, "part %s: %d endpoints; %s; medians of %s\n", partDirect, len(endpoints), strings.Join(r.Versions, "; "), r.rounds())
	if r.Busy > busyMost {
		fmt.Fprintf(w, "others kept %.0f%% of the processors busy: the figures are rough\n", 100*r.Busy)
	}
	for _, m := range r.Missing {
		fmt.Fprintf(w, "not beside them: %s\n", m)
	}
	fmt.Fprintln(w)
	return render(w, r.rows2table(), r.hooks2table(), targets2table(r.Targets))
}

func (r *pathReport) rows2table() table.Writer {
	t := newTable("work", "arm", "pillion cpu", "all cpu", ": nothing", "machine cpu", ": nothing", "wall", ": nothing", "p50", ": nothing", "per")
	ratio := func(v float64) string {
		if v == 0 {
			return ""
		}
		return fmt.Sprintf("%.3f", v)
	}
	for _, w := range r.works {
		for _, x := range r.Rows {
			if x.Work == w.Name {
				t.AppendRow(table.Row{x.Work, x.Arm, span(x.Proxy), span(x.All), ratio(x.AllRatio), span(x.Machine), ratio(x.MachineRatio),
					span(x.Wall), ratio(x.WallRatio), span(x.P50), ratio(x.P50Ratio), w.Unit})
			}
		}
	}
	return t
}

func (r *pathReport) hooks2table() table.Writer {
	t := newTable("arm", "program", "runs per connection", "ns per run", "least", "most", "ns per connection")
	for _, h := range r.Hooks {
		t.AppendRow(table.Row{h.Arm, h.Program, fmt.Sprintf("%.2f", h.Runs), fmt.Sprintf("%.0f", h.Nanos/h.Runs),
			fmt.Sprintf("%.0f", h.Least), fmt.Sprintf("%.0f", h.Most), fmt.Sprintf("%.0f", h.Nanos)})
	}
	return t
}
