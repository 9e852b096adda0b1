package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/pillion-project/pillion/loader"
)

// hookProgram is that whose cost has a target: who connects waits for it.
const hookProgram = "pl_connect4"

// programs are the attached programs of a Pillion, by name.
type programs map[string]*ebpf.Program

// openPrograms finds what an instance has pinned. The links stay its own.
func openPrograms(instance string) (programs, error) {
	pins, err := filepath.Glob(filepath.Join(loader.BPFFS, "pillion", instance, "link_*"))
	if err != nil {
		return nil, err
	}
	all := programs{}
	for _, pin := range pins {
		p, err := programOf(pin)
		if err != nil {
			return nil, fmt.Errorf("open program of %s: %w", pin, err)
		}
		all[strings.TrimPrefix(filepath.Base(pin), "link_")] = p
	}
	if all[hookProgram] == nil || all["pl_sockops"] == nil {
		return nil, fmt.Errorf("instance %s has pinned no programs but %d", instance, len(all))
	}
	return all, nil
}

func programOf(pin string) (*ebpf.Program, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return nil, err
	}
	return ebpf.NewProgramFromID(info.Program)
}

func (all programs) close() {
	for _, p := range all {
		p.Close()
	}
}

// programCost is what one program cost, per connection.
type programCost struct {
	Runs  float64 `json:"runs"`
	Nanos float64 `json:"ns"`
}

// tally is what the kernel has counted of a program.
type tally struct {
	runs uint64
	time time.Duration
}

func (all programs) tallies() (map[string]tally, error) {
	now := map[string]tally{}
	for name, p := range all {
		s, err := p.Stats()
		if err != nil {
			return nil, fmt.Errorf("read what %s cost: %w", name, err)
		}
		now[name] = tally{s.RunCount, s.Runtime}
	}
	return now, nil
}

// runsLeast is how often, per connection, a program runs that has to do with them:
// Pillion's own test connections run some, ten times a second.
const runsLeast = 0.5

// costs is what was between two readings, for n connections.
func costs(before, after map[string]tally, n float64) (map[string]programCost, error) {
	all := map[string]programCost{}
	for name, b := range after {
		a := before[name]
		if c := (programCost{Runs: float64(b.runs-a.runs) / n, Nanos: float64(b.time-a.time) / n}); c.Runs >= runsLeast {
			all[name] = c
		}
	}
	_, pillion := after[hookProgram]
	if _, ran := all[hookProgram]; pillion && !ran {
		return nil, fmt.Errorf("%s ran %d times for %.0f connections", hookProgram, after[hookProgram].runs-before[hookProgram].runs, n)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no program ran for %.0f connections", n)
	}
	return all, nil
}
