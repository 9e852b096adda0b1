package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/pillion-project/pillion/redirect/l4"
	"golang.org/x/sys/unix"
)

// TestLastGood has a file change after it was taken, to what cannot be: the next worker
// goes by what was taken.
func TestLastGood(t *testing.T) {
	memory, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(memory)
	registry, err := l4.OpenRegistry(memory, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := &survival{registry: registry}
	file := filepath.Join(t.TempDir(), "pillion.yaml")
	for _, zone := range []string{"first", "second"} {
		text := []byte("zone: " + zone)
		if err := os.WriteFile(file, []byte("zone: [\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := s.keepConfiguration(file, text); err != nil {
			t.Fatal(err)
		}
		defer s.text.Close()
		if c, err := s.configuration(file, errors.New("it is no YAML")); err != nil || c.Zone != zone {
			t.Errorf("%+v, %v: want zone %s", c, err, zone)
		}
	}
}
