package loader

import (
	"fmt"
	"maps"
	"slices"

	"github.com/cilium/ebpf"
)

// consts are the knobs of bpf/include/config.h.
type consts struct {
	netns      uint64
	slot4      uint32
	slot6      uint32
	scope      uint64
	scopeLevel uint32
	frameTag   uint64
	moves      uint32
}

// set gives every knob of an object its value. A knob that only one side knows
// is an error: the object was built from other sources.
func (c consts) set(spec *ebpf.CollectionSpec) error {
	values := map[string]any{
		"cfg_netns":       c.netns,
		"cfg_slot4":       c.slot4,
		"cfg_slot6":       c.slot6,
		"cfg_scope":       c.scope,
		"cfg_scope_level": c.scopeLevel,
		"cfg_frame_tag":   c.frameTag,
		"cfg_moves":       c.moves,
	}
	for name, v := range spec.Variables {
		value, known := values[name]
		if !known {
			return fmt.Errorf("knob %s of the BPF object is not known here", name)
		}
		if err := v.Set(value); err != nil {
			return fmt.Errorf("set knob %s: %w", name, err)
		}
		delete(values, name)
	}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		return fmt.Errorf("the BPF object has no knob %s", name)
	}
	return nil
}
