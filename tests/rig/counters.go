package rig

import (
	"maps"
	"strings"
	"testing"
)

// Counters are what of the metrics only ever grows, by name and labels as they are in
// the text.
func (i *Instance) Counters(t testing.TB) map[string]float64 {
	t.Helper()
	all := i.Series(t)
	maps.DeleteFunc(all, func(name string, _ float64) bool {
		bare, _, _ := strings.Cut(name, "{")
		return !strings.HasPrefix(bare, "pillion_") || !strings.HasSuffix(bare, "_total") && !strings.HasSuffix(bare, "_count") && !strings.HasSuffix(bare, "_bucket")
	})
	return all
}
