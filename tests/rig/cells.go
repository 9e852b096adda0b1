package rig

import (
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/loader"
)

// OccupyCells has somebody else in every so many cells, or in all: then decisions on
// sockets are in socket storage.
func (i *Instance) OccupyCells(t testing.TB, every int) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(loader.BPFFS, "pillion", i.Name, "cells"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	const nobodys = 1 << 62 // no socket's cookie is so high
	for n := 0; n < bpf.Cells; n += every {
		if err := m.Put(uint32(n), bpf.Decision{Owner: nobodys + uint64(n)}); err != nil {
			t.Fatal(err)
		}
	}
}
