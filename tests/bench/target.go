package main

// target is what relay must reach (docs/design.md, section 11).
type target struct {
	Name     string  `json:"name"`
	Most     float64 `json:"at_most"`
	Measured float64 `json:"measured"`
	Met      bool    `json:"met"`
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
