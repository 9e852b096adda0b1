package main

import "fmt"

// target is what Pillion must reach (docs/design.md, section 11).
type target struct {
	Name string `json:"name"`
	// One of the two is 0.
	Most     float64 `json:"at_most,omitempty"`
	Least    float64 `json:"at_least,omitempty"`
	Measured float64 `json:"measured"`
	// Error is the standard error of a ratio's median, 0 where it is not known.
	Error float64 `json:"error,omitempty"`
	Met   bool    `json:"met"`
}

func (t *target) want() string {
	if t.Least != 0 {
		return fmt.Sprintf("at least %.*f", t.digits(), t.Least)
	}
	return fmt.Sprintf("at most %.*f", t.digits(), t.Most)
}

// said is what was measured.
func (t *target) said() string {
	if t.Error == 0 {
		return fmt.Sprintf("%.*f", t.digits(), t.Measured)
	}
	return fmt.Sprintf("%.*f ±%.*f", t.digits(), t.Measured, t.digits(), t.Error)
}

// digits are those behind the point that say something.
func (t *target) digits() int {
	if t.Most >= 100 {
		return 0
	}
	if t.Most == idleMost {
		return 2
	}
	return 3
}

// aim is a target for a work: relay's proxy time by the best one's of some arms.
type aim struct {
	work, name string
	than       []string
	most       float64
}

var aims = []aim{
	{workRoundTrip, "CPU per round trip : nginx", []string{armNginx}, 1},
	{workConnection, "CPU per connection : nginx", []string{armNginx}, 1},
	{workDownload, "CPU per GiB down : best peer", rivals, 0.6},
	{workUpload, "CPU per GiB up : best peer", rivals, 0.6},
}

// idleMost is the resident memory of an idle Pillion, in MB.
const idleMost = 15

// judge holds what was measured against the targets.
func (r *report) judge() []target {
	var all []target
	for _, a := range aims {
		if len(r.Samples[a.work][armRelay]) == 0 {
			continue // not asked for
		}
		all = append(all, newTarget(a.name, a.most, r.ratio(a.work, a.than...)))
	}
	for _, i := range r.Idle {
		if i.Arm == armRelay {
			all = append(all, newTarget("MB resident when idle", idleMost, float64(i.Memory)/1e6))
		}
	}
	return all
}

func newTarget(name string, most, measured float64) target {
	return target{Name: name, Most: most, Measured: measured, Met: measured <= most}
}

// newRate is a target for what is to be high.
func newRate(name string, least, measured float64) target {
	return target{Name: name, Least: least, Measured: measured, Met: measured >= least}
}
