package file

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
	"github.com/pillion-project/pillion/tests/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

var equal = cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })

func endpoint(addr string, weight uint32, zone string) discover.Endpoint {
	return discover.Endpoint{Addr: netip.MustParseAddrPort(addr), Weight: weight, Zone: zone}
}

// good are files and what stands in them.
var good = []struct {
	name, ext, text string
	want            []discover.Endpoint
}{
	{"the example of Prometheus's guide", "json", `[
  {
    "targets": [ "192.0.2.2:9100", "192.0.2.1:9100" ],
    "labels": { "env": "prod", "job": "node" }
  },
  { "targets": ["[2001:db8::1]:9090"] }
]`, []discover.Endpoint{
		endpoint("192.0.2.1:9100", 1, ""), endpoint("192.0.2.2:9100", 1, ""), endpoint("[2001:db8::1]:9090", 1, ""),
	}},
	{"file_sd in YAML", "yml", `
- targets: ['192.0.2.1:80', 192.0.2.2:80, "[2001:db8::1]:80"]
  labels:
    job: web
    weight: 3
    __zone__: a
- targets:
  - 192.0.2.3:80
  labels: {__weight__: "2", weight: heavy, zone: b}
`, []discover.Endpoint{
		endpoint("192.0.2.1:80", 3, "a"), endpoint("192.0.2.2:80", 3, "a"), endpoint("192.0.2.3:80", 2, "b"),
		endpoint("[2001:db8::1]:80", 3, "a"),
	}},
	{"endpoints of the configuration", "yaml", `
# ours
- 127.0.0.1:8081
- {address: 127.0.0.1:8082, weight: 3}
- address: "[fe80::1%eth0]:80"
  zone: rack-1
`, []discover.Endpoint{
		endpoint("127.0.0.1:8081", 1, ""), endpoint("127.0.0.1:8082", 3, ""), endpoint("[fe80::1%eth0]:80", 1, "rack-1"),
	}},
	{"the same in JSON", "json", `["127.0.0.1:8081", {"address": "127.0.0.1:8082", "weight": 3, "zone": "a"}, "[::ffff:192.0.2.1]:80"]`,
		[]discover.Endpoint{
			endpoint("127.0.0.1:8081", 1, ""), endpoint("127.0.0.1:8082", 3, "a"), endpoint("192.0.2.1:80", 1, ""),
		}},
	{"flow style", "yaml", `[127.0.0.1:8081, {address: 127.0.0.1:8082, weight: 3}]`, []discover.Endpoint{
		endpoint("127.0.0.1:8081", 1, ""), endpoint("127.0.0.1:8082", 3, ""),
	}},
	{"nobody", "json", `[]`, nil},
	{"nobody in YAML", "yaml", "# none today\n[]\n", nil},
	{"a group of nobody", "json", `[{"targets": [], "labels": {"a": "b"}}]`, nil},
	{"the same twice", "json", `[{"targets": ["192.0.2.1:80"]}, {"targets": ["192.0.2.1:80"], "labels": null}]`,
		[]discover.Endpoint{endpoint("192.0.2.1:80", 1, "")}},
	{"a byte order mark, and Windows", "yaml", "\ufeff- 192.0.2.1:80\r\n- 192.0.2.2:80\r\n", []discover.Endpoint{
		endpoint("192.0.2.1:80", 1, ""), endpoint("192.0.2.2:80", 1, ""),
	}},
	{"a byte order mark in JSON", "json", "\ufeff[\"192.0.2.1:80\"]\r\n", []discover.Endpoint{endpoint("192.0.2.1:80", 1, "")}},
	{"an upper-case extension", "JSON", `["192.0.2.1:80"]`, []discover.Endpoint{endpoint("192.0.2.1:80", 1, "")}},
}

func TestGood(t *testing.T) {
	for _, tt := range good {
		got, err := Parse("f."+tt.ext, []byte(tt.text))
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if diff := cmp.Diff(tt.want, got, equal); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.name, diff)
		}
	}
}

// bad are files and all that errors say of them.
var bad = []struct{ name, ext, text, want string }{
	{"an empty file", "json", "", `1:1: empty: want a list, and [] for no endpoints at all`},
	{"blanks", "json", " \n", `1:1: empty: want a list, and [] for no endpoints at all`},
	{"null", "json", "null", `1:1: empty: want a list, and [] for no endpoints at all`},
	{"all commented out", "yaml", "# - 192.0.2.1:80\n", `1:1: empty: want a list, and [] for no endpoints at all`},
	{"~", "yaml", "~\n", `1:1: empty: want a list, and [] for no endpoints at all`},
	{"a mapping", "yaml", "targets: [192.0.2.1:80]\n",
		`1:1: this is a mapping: want a list of endpoints, or of {targets: [...], labels: {...}}`},
	{"cut off", "json", "[\n  \"192.0.2.1:80\",\n", `3:1: not JSON: unexpected end of JSON input`},
	{"cut off in a word", "json", "[\n  \"192.0.2.1:8", `2:15: not JSON: unexpected end of JSON input`},
	{"a comma too many", "json", "[\n  \"192.0.2.1:80\",\n]", `3:1: not JSON: invalid character ']' looking for beginning of value`},
	{"two values", "json", "[]\n[]", `2:1: not JSON: invalid character '[' after top-level value`},
	{"a name", "json", "[{\"targets\":\n  [\"web.example:80\"]}]",
		`2:4: "web.example:80": "web.example" is a name, and names in a file are not resolved: want an IP address here, or a service whose endpoints come from dns`},
	{"a name without a port", "yaml", "- web",
		`1:3: "web": "web" is a name, and names in a file are not resolved: want an IP address here, or a service whose endpoints come from dns`},
	{"no port", "yaml", "- 192.0.2.1\n- ::1\n- '[::1]'\n", `1:3: "192.0.2.1": no port, want 192.0.2.1:PORT
2:3: "::1": no port, want [::1]:PORT
3:3: "[::1]": no port, want [::1]:PORT`},
	{"ports", "yaml", "- 192.0.2.1:0\n- 192.0.2.1:65536\n- 192.0.2.1:080\n- 192.0.2.1:http\n- :80\n",
		`1:3: "192.0.2.1:0": port "0": want 1 to 65535
2:3: "192.0.2.1:65536": port "65536": want 1 to 65535
3:3: "192.0.2.1:080": port "080": want 1 to 65535
4:3: "192.0.2.1:http": port "http": want 1 to 65535
5:3: ":80": no address, want ADDR:PORT such as 127.0.0.1:80`},
	{"not to be dialed", "yaml", "- 240.0.0.1:80\n- 0.0.0.0:80\n- 224.0.0.1:80\n- '[fe80::1]:80'\n",
		`1:3: "240.0.0.1:80": 240.0.0.1 is a slot address, where Pillion's own handler listens: a connection would go round for ever
2:3: "0.0.0.0:80": 0.0.0.0 is the unspecified address: want the one that the endpoint is reached at
3:3: "224.0.0.1:80": 224.0.0.1 is a multicast or broadcast address: TCP reaches none
4:3: "[fe80::1]:80": fe80::1 is a link-local address: want it with its zone, such as fe80::1%eth0`},
	{"IPv6 without brackets", "yaml", "- 2001:db8::1:2:3:4:5:80:1\n", `1:3: "2001:db8::1:2:3:4:5:80:1": "2001:db8::1:2:3:4:5:80" is not an IP address: want ADDR:PORT`},
	{"mapped without brackets", "yaml", "- \"::ffff:192.0.2.1:80\"\n", `1:3: "::ffff:192.0.2.1:80": brackets are for IPv6: want ADDR:PORT or [ADDR]:PORT`},
	{"a URL", "json", `["http://192.0.2.1:80"]`, `1:2: "http://192.0.2.1:80": this is a URL, want ADDR:PORT`},
	{"a metrics path", "json", `["192.0.2.1:80/metrics"]`, `1:2: "192.0.2.1:80/metrics": want one address and no path or range: ADDR:PORT`},
	{"weights", "yaml", `- {address: 192.0.2.1:80, weight: 0}
- {address: 192.0.2.2:80, weight: 65536}
- {address: 192.0.2.3:80, weight: "3"}
- {address: 192.0.2.4:80, weight: 1.5}
- {address: 192.0.2.5:80, weight: [1]}
`, `1:35: weight: 0: want 1 to 65535, and leave out an endpoint that is to get nothing
2:35: weight: "65536": want a number from 1 to 65535
3:35: weight: this is text: want a number from 1 to 65535, without quotes
4:35: weight: "1.5": want a number from 1 to 65535
5:35: weight: this is a list: want a number from 1 to 65535`},
	{"labels", "json", `[{"targets": ["192.0.2.1:80"], "labels": {"weight": "many",
"zone": true, "x": ["y"], "__zone__": "a\u0007"}}]`, `1:53: weight: "many": want a number from 1 to 65535
2:20: label "x": this is a list: want text
2:39: __zone__: "a\a": want at most 63 printable characters`},
	{"labels that are a list", "json", `[{"targets": [], "labels": ["a"]}]`, `1:28: labels: this is a list: want a mapping`},
	{"words", "yaml", "- adress: 192.0.2.1:80\n- target: [192.0.2.1:80]\n- targets: []\n  label: {}\n- {}\n",
		`1:3: unknown key "adress", did you mean address?
1:3: no address: want {address: ADDR:PORT}, or {targets: [...]}
2:3: unknown key "target", did you mean targets?
2:3: no address: want {address: ADDR:PORT}, or {targets: [...]}
4:3: unknown key "label", did you mean labels?
5:3: no address: want {address: ADDR:PORT}`},
	{"both", "json", `[{"targets": [], "address": "192.0.2.1:80"}]`,
		`1:2: both targets and address: want {targets, labels} or {address, weight, zone}`},
	{"labels alone", "json", `[{"labels": {}}]`, `1:2: labels without targets: want {targets: [ADDR:PORT], labels: {...}}`},
	{"targets that are text", "json", `[{"targets": "192.0.2.1:80"}]`, `1:14: targets: this is text: want a list of ADDR:PORT`},
	{"targets without content", "yaml", "- targets:\n", `1:3: targets: this is empty: want a list of ADDR:PORT`},
	{"twice", "yaml", "- 192.0.2.1:80\n- {address: 192.0.2.1:80, weight: 2}\n- {address: 192.0.2.2:80, address: 192.0.2.3:80}\n",
		`2:13: 192.0.2.1:80 is listed on line 1 with another weight or zone: want it once
3:27: "address" is given twice, first on line 3`},
	{"items", "json", `[null, true, 5, [], "192.0.2.1:80*3", ""]`, `1:2: empty: want ADDR:PORT
1:8: this is true or false: want ADDR:PORT
1:14: "5": "5" is not an IP address: want ADDR:PORT
1:17: this is a list: want ADDR:PORT (in quotes if it begins with [)
1:21: "192.0.2.1:80*3": want {address: 192.0.2.1:80, weight: 3}
1:39: "": empty, want ADDR:PORT`},
	{"an item that is empty", "yaml", "- 192.0.2.1:80\n-\n", `2:1: empty: want ADDR:PORT`},
	{"anchors", "yaml", "- &a 192.0.2.1:80\n- *a\n", `1:3: anchors are not taken: write the value out where it is meant
2:3: aliases are not taken: write the value out (and quote a text that begins with *)`},
	{"documents", "yaml", "- 192.0.2.1:80\n---\n- 192.0.2.1:80\n", `3:1: a second document: want one only, without --- in between`},
	{"brackets without quotes", "yaml", "- [::1]:80\n", `1:8: not YAML: value is not allowed in this context (quote an IPv6 address that is in brackets: "[::1]:80")`},
	{"broken YAML", "yaml", "- {address: 192.0.2.1:80\n", `1:3: not YAML: could not find flow mapping end token '}'`},
	{"binary", "yaml", "- \x00\n", `1:3: control character U+0000: want a text file`},
	{"Latin-1", "json", "[\"\xe4\"]", `1:3: not UTF-8: want a text file`},
	{"deep", "json", strings.Repeat("[", 100) + strings.Repeat("]", 100), `1:17: more than 16 levels deep: these are no endpoints`},
	{"deep YAML", "yaml", strings.Repeat("[", 100) + strings.Repeat("]", 100), `1:17: more than 16 levels deep: these are no endpoints`},
	{"columns are characters", "json", "[{\"targets\": [], \"labels\": {\"ä\": \"ö\", \"weight\": \"x\"}}]", `1:49: weight: "x": want a number from 1 to 65535`},
}

func TestBad(t *testing.T) {
	for _, tt := range bad {
		got, err := Parse("f."+tt.ext, []byte(tt.text))
		if err == nil {
			t.Errorf("%s: %v, want an error", tt.name, got)
			continue
		}
		want := "f." + tt.ext + ":" + strings.ReplaceAll(tt.want, "\n", "\nf."+tt.ext+":")
		if diff := cmp.Diff(want, err.Error()); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.name, diff)
		}
		if got != nil {
			t.Errorf("%s: an error, and endpoints", tt.name)
		}
	}
}

func TestNames(t *testing.T) {
	for _, name := range []string{"", "endpoints", "endpoints.txt", ".json/f"} {
		if _, err := New(name); err == nil {
			t.Errorf("New(%q) takes it", name)
		}
		if _, err := Parse(name, []byte("[]")); err == nil {
			t.Errorf("Parse(%q) takes it", name)
		}
	}
}

func TestTooLarge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f.json")
	if err := os.WriteFile(path, []byte("[]"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 1<<40); err != nil {
		t.Skipf("no sparse files: %v", err)
	}
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "more than 8388608 bytes") {
		t.Errorf("a file of 1 TiB: %v", err)
	}
}

// What is too much is refused before it costs anything.
func TestTooMuch(t *testing.T) {
	for name, text := range map[string]string{
		"f.yaml": "[" + strings.Repeat("[],", maxValues/3+1) + "]",
		"g.yaml": "- " + strings.Repeat("x", maxYAML),
		"f.json": "[" + strings.Repeat("[],", maxValues) + "[]]",
		"g.json": strings.Repeat(" ", maxSize+1),
	} {
		if _, err := Parse(name, []byte(text)); err == nil || !strings.Contains(err.Error(), "more than ") {
			t.Errorf("%s: %.200v", name, err)
		}
	}
}

// Ten thousand endpoints are no more than a moment, in either format.
func TestLarge(t *testing.T) {
	var lines, targets []string
	for i := range 10000 {
		a := fmt.Sprintf("10.1.%d.%d:80", i/250, i%250+1)
		lines = append(lines, "- {address: "+a+", weight: 2}\n")
		targets = append(targets, strconv.Quote(a))
	}
	for name, text := range map[string]string{
		"f.yaml": strings.Join(lines, ""),
		"f.json": `[{"targets": [` + strings.Join(targets, ",") + `], "labels": {"weight": "2"}}]`,
	} {
		got, err := Parse(name, []byte(text))
		if err != nil || len(got) != 10000 {
			t.Errorf("%s: %d endpoints: %v", name, len(got), err)
		}
	}
}

func TestManyProblems(t *testing.T) {
	_, err := Parse("f.yaml", []byte(strings.Repeat("- x\n", 600)))
	if err == nil {
		t.Fatal("no error")
	}
	lines := strings.Split(err.Error(), "\n")
	if len(lines) != maxProblems+1 || lines[maxProblems] != "and 550 more" {
		t.Errorf("%d lines, the last is %q", len(lines), lines[len(lines)-1])
	}
}

func fuzz(f *testing.F, ext string) {
	name := "f." + ext
	for _, tt := range good {
		f.Add([]byte(tt.text))
	}
	for _, tt := range bad {
		f.Add([]byte(tt.text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := Parse(name, data)
		if err != nil {
			if got != nil {
				t.Error("an error, and endpoints too")
			}
			for _, line := range strings.Split(err.Error(), "\n") {
				checkPlace(t, name, data, line)
			}
			return
		}
		for i, e := range got {
			if e.Addr.Port() == 0 || e.Addr.Addr().Is4In6() || e.Weight < 1 || e.Weight > discover.MaxWeight ||
				discover.CheckAddr(e.Addr.Addr()) != nil {
				t.Errorf("endpoint %+v", e)
			}
			if i > 0 && got[i-1].Addr.Compare(e.Addr) >= 0 {
				t.Errorf("%s after %s", e.Addr, got[i-1].Addr)
			}
			if again, err := parseAddrPort(e.Addr.String()); err != nil || again != e.Addr {
				t.Errorf("%s is read as %s, %v", e.Addr, again, err)
			}
		}
	})
}

// checkPlace checks that a line of an error names a place that is in the file, or
// just after the end of a line of it.
func checkPlace(t *testing.T, name string, data []byte, text string) {
	t.Helper()
	if strings.HasPrefix(text, "and ") && strings.HasSuffix(text, " more") {
		return
	}
	rest, ok := strings.CutPrefix(text, name+":")
	w := strings.SplitN(rest, ":", 3)
	if !ok || len(w) < 3 {
		t.Errorf("no place in %q", text)
		return
	}
	line, _ := strconv.Atoi(w[0])
	column, _ := strconv.Atoi(w[1])
	s := string(data)
	if strings.HasSuffix(name, "yaml") {
		s = strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(s)
	}
	lines := strings.Split(s, "\n")
	if line < 1 || line > len(lines) || column < 1 || column > utf8.RuneCountInString(lines[line-1])+1 {
		t.Errorf("the place is not in the file: %q", text)
	}
}

func FuzzYAML(f *testing.F) { fuzz(f, "yaml") }
func FuzzJSON(f *testing.F) { fuzz(f, "json") }

// The files that the documentation shows are files.
func TestDocs(t *testing.T) {
	b, err := os.ReadFile("../../../../docs/discovery.md")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for i, block := range strings.Split(string(b), "```") {
		kind, text, _ := strings.Cut(block, "\n")
		if i%2 == 0 || kind != "json" && (kind != "yaml" || strings.HasPrefix(text, "services:")) {
			continue
		}
		n++
		if got, err := Parse("discovery."+kind, []byte(text)); err != nil || len(got) == 0 {
			t.Errorf("%d endpoints, %v in\n%s", len(got), err, text)
		}
	}
	if n < 2 {
		t.Errorf("%d files in the documentation", n)
	}
}
