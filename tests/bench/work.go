package main

import "slices"

// The works, by name.
const (
	workRoundTrip  = "roundtrip"
	workConnection = "connection"
	// workCRR is connections one at a time, as netperf's TCP_CRR counts them.
	workCRR      = "crr"
	workDownload = "download"
	workUpload   = "upload"
	workLatency  = "latency"
	// workHook is connections while the kernel times Pillion's programs.
	workHook = "hook"
)

// work is what a client does, the same amount for every arm.
type work struct {
	Name string `json:"name"`
	// Unit is what costs are per.
	Unit string `json:"unit"`
	// Conns is how many connections there are at a time.
	Conns int `json:"connections"`
	// Ops is how many units the client does.
	Ops int `json:"ops"`
}

// messageSize is that of a request and of its answer.
const messageSize = 64

// gib is what a unit of the transfers is, in bytes.
const gib = 1 << 30

// quickPart is what --quick does of the work.
const quickPart = 8

func allWorks() []work {
	return []work{
		{Name: workRoundTrip, Unit: "round trip", Conns: 32, Ops: 64_000},
		{Name: workConnection, Unit: "connection", Conns: 8, Ops: 4_000},
		{Name: workDownload, Unit: "GiB", Conns: 1, Ops: 3},
		{Name: workUpload, Unit: "GiB", Conns: 1, Ops: 3},
		{Name: workLatency, Unit: "round trip", Conns: 1, Ops: 8_000},
	}
}

// pathWorks are those of part direct: there are twice the rounds, each of half the
// work, since what is to be seen is a hundredth of it.
func pathWorks() []work {
	return []work{
		{Name: workRoundTrip, Unit: "round trip", Conns: 32, Ops: 32_000},
		{Name: workConnection, Unit: "connection", Conns: 8, Ops: 4_000},
		{Name: workCRR, Unit: "connection", Conns: 1, Ops: 3_000},
		{Name: workDownload, Unit: "GiB", Conns: 1, Ops: 1},
		{Name: workLatency, Unit: "round trip", Conns: 1, Ops: 8_000},
		{Name: workHook, Unit: "connection", Conns: 8, Ops: 2_000},
	}
}

// workNames are those of both parts.
func workNames() []string {
	var names []string
	for _, w := range slices.Concat(allWorks(), pathWorks()) {
		if !slices.Contains(names, w.Name) {
			names = append(names, w.Name)
		}
	}
	return names
}

// connects tells whether the work is to open connections.
func (w work) connects() bool {
	return w.Name == workConnection || w.Name == workCRR || w.Name == workHook
}

// transfer tells whether the work's unit is a GiB.
func (w work) transfer() bool { return w.Unit == "GiB" }

// works are those of some that the flags ask for.
func (o *options) works(some []work) []work {
	var all []work
	for _, w := range some {
		if len(o.only) > 0 && !slices.Contains(o.only, w.Name) {
			continue
		}
		if o.quick {
			w.Ops = max(w.Ops/quickPart, 1)
		}
		all = append(all, w)
	}
	return all
}
