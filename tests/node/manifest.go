package node

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

// Object is one of a manifest's.
type Object map[string]any

// Shipped reads a manifest of this tree: its objects, in their order.
func Shipped(t testing.TB, path string) []Object {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return Parse(t, string(b))
}

// Parse reads a manifest.
func Parse(t testing.TB, text string) []Object {
	t.Helper()
	var all []Object
	for _, doc := range strings.Split(text, "\n---\n") {
		var o Object
		if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
			t.Fatalf("read a manifest: %v\n%s", err, doc)
		}
		if len(o) > 0 {
			all = append(all, o)
		}
	}
	return all
}

// Find returns the object of a kind, of which there is one.
func Find(t testing.TB, all []Object, kind string) Object {
	t.Helper()
	for _, o := range all {
		if o["kind"] == kind {
			return o
		}
	}
	t.Fatalf("no %s among %d objects", kind, len(all))
	return nil
}

// At returns what is at a path of keys. Of a list, the element of that name.
func (o Object) At(t testing.TB, keys ...string) Object {
	t.Helper()
	var v any = map[string]any(o)
	for _, k := range keys {
		switch w := v.(type) {
		case map[string]any:
			v = w[k]
		case []any:
			v = nil
			for _, e := range w {
				if m, ok := e.(map[string]any); ok && m["name"] == k {
					v = m
				}
			}
		}
	}
	m, ok := v.(map[string]any)
	if !ok {
		t.Fatalf("no mapping at %v of %s", keys, o.JSON(t))
	}
	return m
}

// JSON is the object as it is sent.
func (o Object) JSON(t testing.TB) string {
	t.Helper()
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
