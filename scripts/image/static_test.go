package main

import (
	"bytes"
	"debug/elf"
	"testing"
)

// checkStatic wants a binary that needs no loader and no library, of the right
// machine.
func checkStatic(t *testing.T, u unpacked) {
	t.Helper()
	f, err := elf.NewFile(bytes.NewReader(u.binary))
	if err != nil {
		t.Errorf("%s: %v", u.arch, err)
		return
	}
	want := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[u.arch]
	if f.Machine != want {
		t.Errorf("%s: the binary is for %v", u.arch, f.Machine)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("%s: the binary is not static: it has %v", u.arch, p.Type)
		}
	}
}
