package bpf

import (
	"testing"
	"unsafe"

	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
)

// layouts are the structures of the contract: their size in Go, and the size that
// is pinned. Who changes one changes what an older process left pinned, so
// PL_ABI goes up in the same commit.
var layouts = map[string]struct{ goSize, pinned uintptr }{
	"instance":     {unsafe.Sizeof(Instance{}), 64},
	"settings":     {unsafe.Sizeof(Settings{}), 56},
	"state":        {unsafe.Sizeof(State{}), 16},
	"beat":         {unsafe.Sizeof(Beat{}), 24},
	"live_key":     {unsafe.Sizeof(LiveKey{}), 36},
	"live":         {unsafe.Sizeof(Live{}), 120},
	"decision":     {unsafe.Sizeof(Decision{}), 168},
	"sent":         {unsafe.Sizeof(Sent{}), 64},
	"slot":         {unsafe.Sizeof(Slot{}), 40},
	"usage":        {unsafe.Sizeof(Usage{}), 24},
	"service":      {unsafe.Sizeof(Service{}), 16},
	"endpoint_key": {unsafe.Sizeof(EndpointKey{}), 20},
	"rule_key":     {unsafe.Sizeof(RuleKey{}), 24},
	"prefix_key":   {unsafe.Sizeof(PrefixKey{}), 20},
	"route":        {unsafe.Sizeof(Route{}), 20},
	"conn_event":   {unsafe.Sizeof(ConnEvent{}), 136},
	"held":         {unsafe.Sizeof(Held{}), 168},
	"ip_addr":      {unsafe.Sizeof(IPAddr{}), 16},
	// The rows of a set are of one size.
	"set_row":       {unsafe.Sizeof(SetRow{}), 32},
	"set_tiers":     {unsafe.Sizeof(SetTiers{}), 32},
	"set_tier":      {unsafe.Sizeof(SetTiers{}.Tier[0]), 16},
	"set_config":    {unsafe.Sizeof(SetConfig{}), 32},
	"set_state":     {unsafe.Sizeof(SetState{}), 32},
	"set_endpoint":  {unsafe.Sizeof(SetEndpoint{}), 32},
	"set_table":     {unsafe.Sizeof(SetTable{}), 32},
	"endpoint":      {unsafe.Sizeof(Endpoint{}), 40},
	"endpoint_name": {unsafe.Sizeof(EndpointName{}), 24},
	"dry_run":       {unsafe.Sizeof(DryRun{}), 88},
	"move":          {unsafe.Sizeof(Move{}), 96},
	"set_query":     {unsafe.Sizeof(SetQuery{}), 8},
}

func TestLayouts(t *testing.T) {
	spec, err := loadAbi()
	if err != nil {
		t.Fatal(err)
	}
	got, want := map[string]uintptr{}, map[string]uintptr{}
	for name, l := range layouts {
		want[name] = l.pinned
	}
	for typ, err := range spec.Types.All() {
		if err != nil {
			t.Fatal(err)
		}
		s, ok := typ.(*btf.Struct)
		if !ok {
			continue
		}
		if at, ok := hole(s); ok {
			t.Errorf("struct %s: padding that is not spelled out at byte %d", s.Name, at)
		}
		got[s.Name] = uintptr(s.Size)
		if s.Size != uint32(layouts[s.Name].goSize) {
			t.Errorf("struct %s: %d bytes in C, %d in Go", s.Name, s.Size, layouts[s.Name].goSize)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("include/abi.h has other structures or sizes (-want +got):\n%s", diff)
	}
}

// hole returns the first byte of s that belongs to no member.
func hole(s *btf.Struct) (at uint32, found bool) {
	for _, m := range s.Members {
		if m.Offset.Bytes() > at {
			return at, true
		}
		size, err := btf.Sizeof(m.Type)
		if err != nil {
			return at, true
		}
		at += uint32(size)
	}
	return at, at < s.Size
}
