package admin

import (
	"bytes"
	"encoding/json"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

// TestGolden holds the JSON that scripts read: a field that changes its name or
// its form is seen.
func TestGolden(t *testing.T) {
	t.Parallel()
	result, err := testAPI().Reload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]any{
		"status":      status(),
		"explanation": explanation(ExplainQuery{Destination: "web", Source: netip.MustParseAddr("192.0.2.1")}),
		"reload":      result,
		"zero":        []any{Status{}, Explanation{}, ReloadResult{}, Refusal{}},
	} {
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetIndent("", "  ")
		if err := e.Encode(v); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join("testdata", name+".json")
		if *update {
			if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), b.String()); diff != "" {
			t.Errorf("%s (go test -update): want -, got +:\n%s", file, diff)
		}
	}
}
