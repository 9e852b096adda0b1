package config

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

var anyIndex = regexp.MustCompile(`\[\d+\]`)

// offered returns every key that the decoder knows, as services[].name, and
// whether a good file has it.
func offered(t *testing.T) map[string]bool {
	t.Helper()
	all := make(map[string]bool)
	for _, file := range glob(t, "*.good.yaml") {
		w := &places{file: file, byPath: make(map[string]position)}
		body, err := parseYAML(w, read(t, file), maxSize)
		if err != nil {
			t.Fatal(err)
		}
		if body == nil {
			continue
		}
		d := &decoder{places: w, bad: make(map[string]bool), offered: func(path string, said bool) {
			key := anyIndex.ReplaceAllString(path, "[]")
			all[key] = all[key] || said
		}}
		c := Default()
		d.config(&c, body)
	}
	return all
}

// Every key is in a good file. So every mapping was looked into, and there are no
// keys but those offered.
func TestEveryKeyIsTried(t *testing.T) {
	for key, said := range offered(t) {
		if !said {
			t.Errorf("%s is in no good file", key)
		}
	}
}

// TestKeysAreDocumented holds docs/configuration.md to the decoder, both ways,
// and what it says of defaults to them.
func TestKeysAreDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	known := offered(t)
	if len(known) < 50 {
		t.Fatalf("only %d keys are known", len(known))
	}
	documented := make(map[string]string) // with the default
	starts := make(map[string]bool)
	row := regexp.MustCompile("^\\| `([a-z_.\\[\\]]+)` \\| [^|]+ \\|([^|]*)\\|(.*)\\|$")
	for _, line := range strings.Split(string(doc), "\n") {
		m := row.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		if _, twice := documented[m[1]]; twice {
			t.Errorf("%s is documented twice", m[1])
		}
		documented[m[1]] = strings.TrimSpace(m[2])
		starts[m[1]] = strings.Contains(m[3], "*Restart*")
	}
	for key := range known {
		if _, ok := documented[key]; !ok {
			t.Errorf("%s is not documented", key)
		}
	}
	for key := range documented {
		if _, ok := known[key]; !ok {
			t.Errorf("%s is documented, and no key", key)
		}
	}
	c := Default()
	for _, v := range flatten(c.settings()) {
		if want := "`" + v.text + "`"; documented[v.key] != want {
			t.Errorf("the default of %s is documented as %s, want %s", v.key, documented[v.key], want)
		}
	}
	for key, restart := range starts {
		if restart != NeedsRestart(key) {
			t.Errorf("%s is documented to take a restart: %v, want %v", key, restart, !restart)
		}
	}
}
