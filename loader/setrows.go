package loader

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"time"
	"unsafe"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

// setRow is any of the rows that a set consists of: see struct set_tiers in
// bpf/include/abi.h, and on.
type setRow interface {
	bpf.SetTiers | bpf.SetConfig | bpf.SetState | bpf.SetEndpoint | bpf.SetTable
}

func toRow[R setRow](r R) bpf.SetRow { return *(*bpf.SetRow)(unsafe.Pointer(&r)) }

// Rows of a set's head.
const (
	rowTiers = iota
	rowConfig
	rowState
)

// setRows appends the rows of a set to b. ids are the indices of its endpoints,
// and turn is whose it is.
func setRows(b []bpf.SetRow, set *flow.Set, ids []uint32, turn [2]uint32) []bpf.SetRow {
	table := uint32(bpf.SetHead + len(set.Endpoints))
	var tiers bpf.SetTiers
	for i, t := range set.Tiers {
		to := &tiers.Tier[i]
		to.First, to.Count, to.Table, to.Entries = uint32(t.First), uint32(t.Count), table, uint32(len(t.Table))
		table += tableRows(len(t.Table))
	}
	b = append(b, toRow(tiers), toRow(setConfig(set, set.Spill)), toRow(bpf.SetState{Turn: turn}))
	for i, e := range set.Endpoints {
		b = append(b, toRow(bpf.SetEndpoint{
			Addr: bpf.FromAddr(e.Addr.Addr()), Port: e.Addr.Port(), Weight: e.Weight,
			Id: ids[i], Cut: e.Cut, Alias: e.Alias,
		}))
	}
	return appendTables(b, set.Tiers[0].Table, set.Tiers[1].Table)
}

// appendTables appends the rows of tables to b.
func appendTables(b []bpf.SetRow, tables ...[]uint32) []bpf.SetRow {
	for _, table := range tables {
		for part := range slices.Chunk(table, bpf.SetTableRow) {
			var row bpf.SetTable
			copy(row.Entry[:], part)
			b = append(b, toRow(row))
		}
	}
	return b
}

func tableRows(entries int) uint32 {
	return uint32((entries + bpf.SetTableRow - 1) / bpf.SetTableRow)
}

// inMillis rounds up: a wait of nothing, doubled, is none either.
func inMillis(d time.Duration) uint32 { return uint32((d + time.Millisecond - 1) / time.Millisecond) }

func setConfig(set *flow.Set, spill uint32) bpf.SetConfig {
	return bpf.SetConfig{
		Spill: spill, Base: inMillis(set.Base), Max: inMillis(set.Max),
		Failures: uint16(set.Failures), Policy: uint8(set.Policy), Hash: uint8(set.Hash), Panic: uint8(set.Panic),
	}
}

// checkSet tells whether the kernel side can go by a set of a service.
func checkSet(service netip.AddrPort, set *flow.Set) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("service %s: %w: %s", service, ErrBadSet, fmt.Sprintf(format, args...))
	}
	if n := len(set.Endpoints); n > bpf.SetEndpoints {
		return fmt.Errorf("service %s: %w: %d, want at most %d", service, ErrTooManyEndpoints, n, bpf.SetEndpoints)
	}
	const maxWait = math.MaxUint32 * time.Millisecond
	switch {
	case int(set.Policy) >= len(flow.Policies()), int(set.Hash) >= len(flow.HashOns()):
		return bad("policy %d, hash %d", set.Policy, set.Hash)
	case set.Failures < 0 || set.Failures > math.MaxUint16, set.Panic < 0 || set.Panic > 100:
		return bad("failures %d, panic %d", set.Failures, set.Panic)
	case set.Base < 0 || set.Base > maxWait, set.Max < set.Base || set.Max > maxWait:
		return bad("base %s, max %s", set.Base, set.Max)
	}
	next := 0
	for i, t := range set.Tiers {
		if t.Count < 0 || t.Count > 0 && t.First != next || next+t.Count > len(set.Endpoints) {
			return bad("tier %d: %d endpoints from %d on of %d", i, t.Count, t.First, len(set.Endpoints))
		}
		next += t.Count
		if len(t.Table) > bpf.SetTableMax {
			return bad("tier %d: a table of %d entries", i, len(t.Table))
		}
		if len(t.Table) > 0 && int(slices.Max(t.Table)) >= t.Count {
			return bad("tier %d: its table names endpoint %d of %d", i, slices.Max(t.Table), t.Count)
		}
		for _, e := range set.Endpoints[next-t.Count : next] {
			if int(e.Alias) >= t.Count {
				return bad("endpoint %s: its alias is %d of %d", e.Addr, e.Alias, t.Count)
			}
		}
	}
	if next != len(set.Endpoints) {
		return bad("the tiers have %d endpoints of %d", next, len(set.Endpoints))
	}
	v4 := service.Addr().Unmap().Is4()
	for _, e := range set.Endpoints {
		a := e.Addr.Addr()
		if a.Unmap().Is4() != v4 || a.IsUnspecified() || a.Zone() != "" || e.Addr.Port() == 0 || e.Weight == 0 {
			return bad("endpoint %s, weight %d", e.Addr, e.Weight)
		}
	}
	return nil
}

// sameRows tells whether two sets differ in nothing but what is written in place.
func sameRows(a, b *flow.Set) bool {
	if a == b {
		return true
	}
	if a == nil || b == nil || a.Policy != b.Policy || a.Hash != b.Hash || a.Failures != b.Failures ||
		a.Base != b.Base || a.Max != b.Max || a.Panic != b.Panic {
		return false
	}
	for i := range a.Tiers {
		x, y := &a.Tiers[i], &b.Tiers[i]
		if x.First != y.First || x.Count != y.Count || !slices.Equal(x.Table, y.Table) {
			return false
		}
	}
	return slices.EqualFunc(a.Endpoints, b.Endpoints, func(x, y flow.SetEndpoint) bool {
		x.Down = y.Down
		return x == y
	})
}
