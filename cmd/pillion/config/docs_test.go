package config

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/tests/testutil"
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

// TestExamplesAreRight: every configuration that a document shows is one that a start
// takes.
func TestExamplesAreRight(t *testing.T) {
	block := regexp.MustCompile("(?ms)^```yaml\n(.*?)^```")
	// Manifests, files of endpoints, and parts of them.
	other := regexp.MustCompile(`(?m)\A(- |apiVersion:|env:)`)
	tried := 0
	for name, text := range testutil.Guides(t, "../../..") {
		for _, m := range block.FindAllStringSubmatch(text, -1) {
			if other.MatchString(m[1]) {
				continue
			}
			tried++
			if _, err := Parse(name, []byte(m[1])); err != nil {
				t.Errorf("%s shows a configuration that is refused: %v\n%s", name, err, m[1])
			}
		}
	}
	if tried < 8 {
		t.Errorf("only %d configurations were found", tried)
	}
}

// TestKeysInProse: what a document calls a key, as `health.failures` or as `path: auto`,
// is one.
func TestKeysInProse(t *testing.T) {
	known := make(map[string]bool)
	sections := make(map[string]bool)
	last := make(map[string]bool)
	for key := range offered(t) {
		known[strings.TrimPrefix(key, "services[].")], known[key] = true, true
		if section, _, ok := strings.Cut(strings.TrimPrefix(key, "services[]."), "."); ok {
			sections[section] = true
		}
		last[key[strings.LastIndex(key, ".")+1:]] = true
	}
	// Of Kubernetes' and of Prometheus' files.
	foreign := map[string]bool{"type": true, "runtime": true}
	span := regexp.MustCompile("`([^`\n]+)`")
	dotted := regexp.MustCompile(`^(services\[\]\.)?([a-z_]+)(\.[a-z_]+)+$`)
	said := regexp.MustCompile(`^([a-z_]+): `)
	// Words that are written like keys: files and names of hosts and packages.
	word := regexp.MustCompile(`\.(json|yaml|yml|conf|md|go|service|slice|internal|test|sock|h|c)$`)
	checked := 0
	for name, text := range testutil.Guides(t, "../../..") {
		for _, m := range span.FindAllStringSubmatch(text, -1) {
			if d := dotted.FindStringSubmatch(m[1]); d != nil && sections[d[2]] && !word.MatchString(m[1]) {
				checked++
				if !known[m[1]] {
					t.Errorf("%s: `%s` is no key", name, m[1])
				}
			}
			if s := said.FindStringSubmatch(m[1]); s != nil && !foreign[s[1]] {
				checked++
				if !last[s[1]] {
					t.Errorf("%s: `%s`: %s is no key", name, m[1], s[1])
				}
			}
		}
	}
	if checked < 50 {
		t.Errorf("only %d keys were found", checked)
	}
}

// TestRangesAreDocumented holds the ranges of numbers in docs/configuration.md to what
// the decoder says of a number that is too large.
func TestRangesAreDocumented(t *testing.T) {
	const large = "99999999999"
	row := regexp.MustCompile("(?m)^\\| `([a-z_.\\[\\]]+)` \\| (?:(percent)|[^|]*?(\\d+ to \\d+)) \\|")
	checked := 0
	for _, m := range row.FindAllStringSubmatch(testutil.Guides(t, "../../..")["configuration.md"], -1) {
		checked++
		want := m[3]
		if m[2] != "" {
			want = "0 to 100"
		}
		text := large
		keys := strings.Split(m[1], ".")
		for _, key := range slices.Backward(keys) {
			if name, list := strings.CutSuffix(key, "[]"); list {
				key, text = name, "["+text+"]"
			}
			text = "{" + key + ": " + text + "}"
		}
		path := strings.ReplaceAll(m[1], "[]", "[0]")
		_, err := Parse("x", []byte(text))
		said := regexp.MustCompile(regexp.QuoteMeta(path) + `: "` + large + `": want .*\b` + want + `\b`)
		if err == nil || !said.MatchString(err.Error()) {
			t.Errorf("%s is documented to be %s, and %s gets: %v", m[1], want, text, err)
		}
	}
	if checked < 15 {
		t.Errorf("only %d ranges were found", checked)
	}
}

// TestLimitsAreDocumented: how many of what a configuration may have is said there.
func TestLimitsAreDocumented(t *testing.T) {
	grouped := func(n int) string { return fmt.Sprintf("%d,%03d", n/1000, n%1000) }
	doc := testutil.Guides(t, "../../..")["configuration.md"]
	for key, limits := range map[string][]int{
		"services": {maxServices, maxSets, maxEndpoints, maxRelayAddrs}, "deny": {maxRules}, "exclude": {maxRules},
	} {
		_, row, found := strings.Cut(doc, "\n| `"+key+"` |")
		row, _, _ = strings.Cut(row, "\n")
		for _, n := range limits {
			if !found || !strings.Contains(row, grouped(n)) {
				t.Errorf("the row of %s does not say %s: %s", key, grouped(n), row)
			}
		}
	}
}

// TestExamplesShowDefaults: what the README and docs/health.md show of settings, where a
// reader takes it for the default, is that.
func TestExamplesShowDefaults(t *testing.T) {
	parse := func(name, after string) *Config {
		_, text, found := strings.Cut(testutil.Guides(t, "../../..")[name], after)
		_, text, begun := strings.Cut(text, "```yaml\n")
		text, _, ends := strings.Cut(text, "```")
		if !found || !begun || !ends {
			t.Fatalf("%s has no example after %q", name, after)
		}
		c, err := Parse(name, []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	want := Default()
	readme := parse("README.md", "\n## Configuration\n")
	for key, pair := range map[string][2]any{
		"relay": {want.Relay, readme.Relay}, "health": {want.Health, readme.Health}, "limits": {want.Limits, readme.Limits},
		"default": {want.Default, readme.Default}, "on_failure": {want.OnFailure, readme.OnFailure}, "connect": {want.Connect, readme.Connect},
		"no_endpoint": {want.NoEndpoint, readme.NoEndpoint}, "existing": {want.Existing, readme.Existing},
		"health, in health.md": {want.Health, parse("health.md", "\n## Ejection\n").Health},
	} {
		if diff := cmp.Diff(pair[0], pair[1]); diff != "" {
			t.Errorf("%s, default and example:\n%s", key, diff)
		}
	}
	shown := parse("health.md", "\n## Checks\n").Services[0].Check
	plain, err := Parse("x", []byte("services: [{address: 10.96.0.1:80, endpoints: [10.0.0.1:80], health_check: {tcp: {}}}]"))
	if err != nil {
		t.Fatal(err)
	}
	least := plain.Services[0].Check
	if shown.Interval != least.Interval || shown.Timeout != least.Timeout || shown.Jitter != least.Jitter ||
		shown.Healthy != least.Healthy || shown.Unhealthy != least.Unhealthy {
		t.Errorf("docs/health.md shows %+v, the defaults are %+v", shown, least)
	}
}
