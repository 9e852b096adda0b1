package testutil

import (
	"os"
	"path/filepath"
	"testing"
)

// Guides are the documents that a user reads, the text of each by its name. root is the
// project's folder.
func Guides(t testing.TB, root string) map[string]string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	names = append(names, filepath.Join(root, "README.md"))
	if len(names) < 10 {
		t.Fatalf("only %d documents", len(names))
	}
	all := make(map[string]string, len(names))
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		all[filepath.Base(name)] = string(text)
	}
	return all
}
