package loader

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
)

// copyCounts copies counters, and notes what they were.
func (m *move) copyCounts(name string, to *ebpf.Map) error {
	n := min(m.from.Maps[name].MaxEntries, m.to.Maps[name].MaxEntries)
	for key := range n {
		var perCPU []uint64
		if err := m.old[name].Lookup(key, &perCPU); err != nil {
			return err
		}
		if err := to.Put(key, perCPU); err != nil {
			return err
		}
		sum := uint64(0)
		for _, v := range perCPU {
			sum += v
		}
		if seen := m.seen.counts[name]; seen != nil {
			seen[key] = sum
		}
	}
	return nil
}

// addAllCounts adds what was counted since the counters were looked at.
func (d *Datapath) addAllCounts(m *move) error {
	for name := range m.seen.counts {
		if err := d.addCounts(m, name); err != nil {
			return fmt.Errorf("move map %s: %w", name, err)
		}
	}
	return nil
}

func (d *Datapath) addCounts(m *move, name string) error {
	seen := m.seen.counts[name]
	for key := range min(m.from.Maps[name].MaxEntries, m.to.Maps[name].MaxEntries) {
		now, err := sum(m.old[name], key)
		if err != nil {
			return err
		}
		if now == seen[key] {
			continue
		}
		q := bpf.Move{Counter: key, Add: now - seen[key]}
		if name == "tallies" {
			q.Tally = 1
		}
		if _, err := d.askMove(bpf.ProgAdd, q, 0); err != nil {
			return err
		}
		seen[key] = now
	}
	return nil
}
