package tests

import (
	"os"
	"os/exec"
	"path/filepath"
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

// TestLinks follows the relative links of the documents.
func TestLinks(t *testing.T) {
	out, err := exec.Command("git", "-C", root, "ls-files", "*.md").Output()
	if err != nil {
		t.Skipf("needs a git checkout: %v", err)
	}
	link := regexp.MustCompile(`\]\(([^)#:]+)[^)]*\)`)
	for _, name := range strings.Fields(string(out)) {
		for _, m := range link.FindAllStringSubmatch(read(t, name), -1) {
			if strings.Contains(m[0], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(root, filepath.Dir(name), m[1])); err != nil {
				t.Errorf("%s: link to %s leads nowhere", name, m[1])
			}
		}
	}
}
