package rig

import (
	"bufio"
	"context"
	"encoding/json"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
)

// Series returns the metrics of the instance, by name and labels as written.
func (i *Instance) Series(t testing.TB) map[string]float64 {
	t.Helper()
	body, err := i.Metrics(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	all := map[string]float64{}
	lines := bufio.NewScanner(body)
	for lines.Scan() {
		text := lines.Text()
		if strings.HasPrefix(text, "#") {
			continue
		}
		// A label may have spaces in it.
		at := strings.LastIndexByte(text, ' ')
		if at < 0 {
			t.Fatalf("a metric: %q", text)
		}
		if all[text[:at]], err = strconv.ParseFloat(text[at+1:], 64); err != nil {
			t.Fatalf("a metric: %q: %v", text, err)
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}

// ReadFlows returns the records of a flow log, but for one that is half written.
func ReadFlows(t testing.TB, path string) []flow.Record {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var all []flow.Record
	for d := json.NewDecoder(f); ; {
		var r flow.Record
		if err := d.Decode(&r); err != nil {
			return all
		}
		all = append(all, r)
	}
}
