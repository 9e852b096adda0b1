package bpf

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// Names of the programs, as pins and the kernel show them.
const (
	ProgConnect4     = "pl_connect4"
	ProgConnect6     = "pl_connect6"
	ProgGetpeername4 = "pl_getpeername4"
	ProgGetpeername6 = "pl_getpeername6"
	ProgGetsockname4 = "pl_getsockname4"
	ProgGetsockname6 = "pl_getsockname6"
	ProgBind4        = "pl_bind4"
	ProgBind6        = "pl_bind6"
	ProgRelease      = "pl_release"
	ProgSockops      = "pl_sockops"
	ProgLookup       = "pl_lookup"
	ProgHold         = "pl_hold"
	ProgInject       = "pl_inject"
	ProgExplain      = "pl_explain"
	ProgMove         = "pl_move"
	ProgMoveLive     = "pl_move_live"
	ProgAdd          = "pl_add"
	ProgAddUsage     = "pl_add_usage"
)

// Names of the programs of [Former].
const (
	ProgRows = "pl_rows"
	ProgTell = "pl_tell"
)

// Names of its maps, beside events.
const (
	FormerSets = "former_sets"
	FormerRows = "former_rows"
)

// Maps are the maps that all programs share. Whoever loaded them closes them.
type Maps = connectMaps

// Specs parses the objects. Their maps have the same names and layout, so
// that one set serves all (MapReplacements); the knobs of include/config.h are
// each object's own.
func Specs() ([]*ebpf.CollectionSpec, error) {
	var all []*ebpf.CollectionSpec
	for _, load := range []func() (*ebpf.CollectionSpec, error){loadConnect, loadNames, loadLookup, loadSockops, loadMirror, loadExplain, loadMove} {
		spec, err := load()
		if err != nil {
			return nil, fmt.Errorf("parse a built-in BPF object: %w", err)
		}
		inPlace(spec)
		all = append(all, spec)
	}
	return all, nil
}

// Former parses the object that is loaded only while an instance of another layout is
// moved: see former.bpf.c. It has no knobs.
func Former() (*ebpf.CollectionSpec, error) {
	spec, err := loadFormer()
	if err != nil {
		return nil, fmt.Errorf("parse a built-in BPF object: %w", err)
	}
	return spec, nil
}

// Types parses the contract of include/abi.h, as a compiler saw it.
func Types() (*btf.Spec, error) {
	spec, err := loadAbi()
	if err != nil {
		return nil, fmt.Errorf("parse the built-in types: %w", err)
	}
	return spec.Types, nil
}
