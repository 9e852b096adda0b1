package tests

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
)

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestReasonsAreDocumented holds docs/reasons.md to the enum, both ways.
func TestReasonsAreDocumented(t *testing.T) {
	doc := read(t, "docs/reasons.md")
	known := map[string]bool{}
	for _, r := range flow.Reasons() {
		known[r.String()] = true
		if !strings.Contains(doc, "`"+r.String()+"`") {
			t.Errorf("reason %s is not documented", r)
		}
	}
	for _, line := range strings.Split(doc, "\n") {
		cells := strings.SplitN(line, "|", 3)
		if len(cells) < 3 {
			continue
		}
		for _, m := range regexp.MustCompile("`([a-z_]+)`").FindAllStringSubmatch(cells[1], -1) {
			if !known[m[1]] {
				t.Errorf("%s is documented, and no reason", m[1])
			}
		}
	}
}

// documents returns the documents that git knows, by name.
func documents(t *testing.T) map[string]string {
	t.Helper()
	out, err := exec.Command("git", "-C", root, "ls-files", "*.md").Output()
	if err != nil {
		t.Skipf("needs a git checkout: %v", err)
	}
	all := make(map[string]string)
	for _, name := range strings.Fields(string(out)) {
		all[name] = read(t, name)
	}
	return all
}

// TestMetricsAreNamedRight: a metric that a document names is one. docs/metrics.md
// lists all, which telemetry/metrics holds to the code, both ways.
func TestMetricsAreNamedRight(t *testing.T) {
	known := make(map[string]bool)
	for _, m := range regexp.MustCompile("(?m)^\\| `(pillion_[a-z_]+)` \\| ([a-z]+) ").FindAllStringSubmatch(read(t, "docs/metrics.md"), -1) {
		known[m[1]] = true
		if m[2] == "histogram" {
			known[m[1]+"_bucket"], known[m[1]+"_sum"], known[m[1]+"_count"] = true, true, true
		}
	}
	if len(known) < 50 {
		t.Fatalf("docs/metrics.md lists only %d metrics", len(known))
	}
	named := 0
	for name, text := range documents(t) {
		for _, m := range regexp.MustCompile(`\bpillion_[a-z0-9_]*[a-z0-9]`).FindAllString(text, -1) {
			named++
			if !known[m] {
				t.Errorf("%s: there is no metric %s", name, m)
			}
		}
	}
	if named < len(known) {
		t.Errorf("only %d metrics were found", named)
	}
}

// TestFlowFieldsAreDocumented holds docs/flows.md to the record, both ways, and its
// examples to what the flow log writes.
func TestFlowFieldsAreDocumented(t *testing.T) {
	doc := read(t, "docs/flows.md")
	documented := make(map[string]bool)
	for line := range strings.Lines(doc) {
		cells := strings.SplitN(line, "|", 3)
		if len(cells) < 3 {
			continue
		}
		for _, m := range regexp.MustCompile("`([a-z_]+)`").FindAllStringSubmatch(cells[1], -1) {
			documented[m[1]] = true
		}
	}
	record := reflect.TypeFor[flow.Record]()
	for i := range record.NumField() {
		name, _, _ := strings.Cut(record.Field(i).Tag.Get("json"), ",")
		if !documented[name] {
			t.Errorf("the field %s is not documented", name)
		}
		delete(documented, name)
	}
	for name := range documented {
		t.Errorf("%s is documented, and no field", name)
	}
	_, examples, _ := strings.Cut(doc, "```json\n")
	examples, _, closed := strings.Cut(examples, "```")
	if !closed {
		t.Fatal("docs/flows.md has no example")
	}
	for line := range strings.Lines(examples) {
		var r flow.Record
		d := json.NewDecoder(strings.NewReader(line))
		d.DisallowUnknownFields()
		if err := d.Decode(&r); err != nil {
			t.Errorf("%v: %s", err, line)
		}
		again, err := json.Marshal(&r)
		if err != nil || string(again)+"\n" != line {
			t.Errorf("%v\ndocumented %swritten    %s", err, line, again)
		}
	}
}

// TestLinks follows the relative links of the documents.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:]+)[^)]*\)`)
	for name, text := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if strings.Contains(m[0], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(root, filepath.Dir(name), m[1])); err != nil {
				t.Errorf("%s: link to %s leads nowhere", name, m[1])
			}
		}
	}
}
