package rig

import (
	"bufio"
	"context"
	"strconv"
	"strings"
	"testing"
)

// Counters returns all that the metrics count, by name and labels as they are in the
// text.
func (i *Instance) Counters(t testing.TB) map[string]float64 {
	t.Helper()
	body, err := i.Metrics(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	all := map[string]float64{}
	lines := bufio.NewScanner(body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		bare, _, _ := strings.Cut(name, "{")
		if !strings.HasPrefix(bare, "pillion_") || !strings.HasSuffix(bare, "_total") && !strings.HasSuffix(bare, "_count") && !strings.HasSuffix(bare, "_bucket") {
			continue
		}
		if all[name], err = strconv.ParseFloat(value, 64); err != nil {
			t.Fatalf("%q: %v", lines.Text(), err)
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}
