package spelling

import (
	"strings"
	"testing"
)

func TestMeant(t *testing.T) {
	known := []string{"services", "on_failure", "relay", "max"}
	for word, want := range map[string]string{
		"servces":    "did you mean services?",
		"sevrices":   "did you mean services?",
		"Services":   "did you mean services?",
		"onFailure":  "did you mean on_failure?",
		"on-failure": "did you mean on_failure?",
		"rely":       "did you mean relay?",
		"x":          "want services, on_failure, relay or max",
		"":           "want services, on_failure, relay or max",
		"elsewhere":  "want services, on_failure, relay or max",
	} {
		if got := Meant(word, known); got != want {
			t.Errorf("%q: %s, want %s", word, got, want)
		}
	}
}

func TestEdits(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{
		{"", "", 0},
		{"", "abc", 3},
		{"abc", "", 3},
		{"abc", "abc", 0},
		{"abc", "abd", 1},
		{"abc", "acb", 1},
		{"abc", "ab", 1},
		{"ab", "abc", 1},
		{"kitten", "sitting", 3},
		{strings.Repeat("x", 100), "abc", 100},
	} {
		if got := edits(c.a, c.b); got != c.want {
			t.Errorf("%q to %q: %d, want %d", c.a, c.b, got, c.want)
		}
	}
}
