package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// call runs a command line and returns what it says and its exit code's error.
func call(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	cmd := newRoot(nil)
	cmd.SetOut(&out)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func write(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func isUsage(err error) bool {
	exit, ok := errors.AsType[*exitError](err)
	return ok && exit.code == exitUsage
}

const oldConfig = `
services:
  - {name: web, address: 10.96.0.1:80, endpoints: [10.0.0.1:80, 10.0.0.2:80], on_remove: reset}
  - {name: db, address: 10.96.0.2:80, path: direct, endpoints: [10.0.0.3:80]}
`

const newConfig = `
relay: {workers: 2}
services:
  - {name: web, address: 10.96.0.1:80, endpoints: [10.0.0.1:80], policy: random, on_remove: reset}
  - {name: new, address: 10.96.0.3:80, discover: {file: /a.json}}
  - {name: passed, address: 10.96.0.4:80, path: pass}
deny: [10.0.0.0/8:25]
`

func TestValidate(t *testing.T) {
	dir := t.TempDir()
	good, bad := write(t, dir, "good.yaml", newConfig), write(t, dir, "bad.yaml", "servces: []\npath: rely\n")

	out, err := call(t, "validate", good)
	want := good + ": ok: 3 services (1 on pass, 2 on relay), 1 endpoint, 1 source, 1 rule\n"
	if err != nil || out != want {
		t.Errorf("%q, %v, want %q", out, err, want)
	}
	out, err = call(t, "validate", "-o", "json", good)
	var v validated
	if err != nil || json.Unmarshal([]byte(out), &v) != nil || !v.OK || v.Services != 3 || v.Problems == nil {
		t.Errorf("%q, %v", out, err)
	}

	out, err = call(t, "validate", bad)
	want = bad + ":1:1: servces: unknown key, did you mean services?\n" + bad + `:2:7: path: "rely": did you mean relay?`
	if !isUsage(err) || out != "" || err.Error() != want {
		t.Errorf("%q, %v, want %s", out, err, want)
	}
	out, err = call(t, "validate", "-o", "json", bad)
	v = validated{}
	if !isUsage(err) || json.Unmarshal([]byte(out), &v) != nil || v.OK {
		t.Errorf("%q, %v", out, err)
	}
	problems := []config.Problem{
		{File: bad, Line: 1, Column: 1, Path: "servces", Text: "unknown key, did you mean services?"},
		{File: bad, Line: 2, Column: 7, Path: "path", Text: `"rely": did you mean relay?`},
	}
	if diff := cmp.Diff(problems, v.Problems); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	out, err = call(t, "validate", "-o", "json", filepath.Join(dir, "absent"))
	if !isUsage(err) || !strings.Contains(out, "no such file") {
		t.Errorf("%q, %v", out, err)
	}
}

func TestDiff(t *testing.T) {
	dir := t.TempDir()
	old, new := write(t, dir, "old.yaml", oldConfig), write(t, dir, "new.yaml", newConfig)
	out, err := call(t, "diff", old, new)
	want := []string{
		"SERVICE  CHANGE            WHAT           FROM               TO                 EFFECT",
		`-        setting           deny           -                  ["10.0.0.0/8:25"]  -`,
		"-        setting           relay.workers  0                  2                  takes a restart",
		"web      changed           policy         least_connections  random             -",
		"web      endpoint removed  10.0.0.2:80    -                  -                  connections are reset",
		"new      added             -              -                  -                  -",
		"passed   added             -              -                  -                  -",
		"db       removed           -              -                  -                  -",
		"db       endpoint removed  10.0.0.3:80    -                  -                  connections live on",
	}
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, strings.Split(strings.TrimRight(out, "\n"), "\n")); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if out, err := call(t, "diff", new, new); err != nil || out != "no change\n" {
		t.Errorf("%q, %v", out, err)
	}
	bad := write(t, dir, "bad.yaml", "a: 1\n")
	if _, err := call(t, "diff", bad, bad); !isUsage(err) || strings.Count(err.Error(), bad) != 2 {
		t.Errorf("%v, want the problems of both", err)
	}
	checkWhole(t, bad, 2, "diff", "-o", "json", bad, bad)
	checkWhole(t, bad, 1, "diff", "-o", "json", new, bad)
	checkWhole(t, bad, 1, "--runtime-dir", dir, "diff", "-o", "json", bad)
	if _, err := call(t, "--runtime-dir", dir, "diff", new); !errors.Is(err, errNoInstance) {
		t.Errorf("%v, want that there is none", err)
	}
}

// checkWhole wants problems of a file that is refused as a whole, with their places, also
// where JSON is asked for.
func checkWhole(t *testing.T, file string, problems int, args ...string) {
	t.Helper()
	out, err := call(t, args...)
	var got changes
	if jsonErr := json.Unmarshal([]byte(out), &got); !isUsage(err) || jsonErr != nil {
		t.Fatalf("%v, %v\n%s", err, jsonErr, out)
	}
	want := slices.Repeat([]admin.Refusal{{Where: file + ":1:1", Text: "a: unknown key"}}, problems)
	for i := range got.Refused {
		got.Refused[i].Text, _, _ = strings.Cut(got.Refused[i].Text, ",")
	}
	if diff := cmp.Diff(want, got.Refused); diff != "" || !got.Empty() {
		t.Errorf("-want +got:\n%s\n%s", diff, out)
	}
}

// foundConfig has sources, and listedConfig none of them.
const (
	foundConfig = `
services:
  - {name: gone, address: 10.96.0.1:80, discover: {file: /a.json}, on_remove: reset}
  - {name: listed, address: 10.96.0.2:80, discover: {file: /b.json}, on_remove: close}
  - {name: bare, address: 10.96.0.3:80, discover: {file: /c.json}}
`
	listedConfig = `
services:
  - {name: listed, address: 10.96.0.2:80, endpoints: [10.0.0.2:80, 10.0.0.9:80], on_remove: close}
  - {name: bare, address: 10.96.0.3:80, path: pass}
`
)

// TestDiffOfSource: what a source found goes with it.
func TestDiffOfSource(t *testing.T) {
	dir := t.TempDir()
	out, err := call(t, "diff", write(t, dir, "old.yaml", foundConfig), write(t, dir, "new.yaml", listedConfig))
	if err != nil {
		t.Fatal(err)
	}
	checkLines(t, out, []string{
		"listed endpoint added 10.0.0.2:80 - - -",
		"listed endpoint added 10.0.0.9:80 - - -",
		"listed endpoint removed those of its source, but for those added - - connections are closed after 30s",
		"bare endpoint removed those of its source - - connections live on",
		"gone removed - - - -",
		"gone endpoint removed those of its source - - connections are reset",
	})

	from, err := config.Parse("old.yaml", []byte(foundConfig))
	if err != nil {
		t.Fatal(err)
	}
	to, err := config.Parse("new.yaml", []byte(listedConfig))
	if err != nil {
		t.Fatal(err)
	}
	c := &changes{Changes: to.Diff(from)}
	status := admin.Status{Services: []admin.ServiceStatus{
		{Name: "gone", Endpoints: []admin.EndpointStatus{{Address: "10.0.0.1:80", Live: 2}, {Address: "10.0.0.8:80", Live: 9, State: admin.EndpointRemoved}}},
		{Name: "listed", Endpoints: []admin.EndpointStatus{{Address: "10.0.0.2:80", Live: 5}, {Address: "10.0.0.3:80", Live: 1}}},
		{Name: "bare"},
	}}
	findRemoved(&c.Changes, &status)
	c.Open = openTo(c.Changes, &status)
	var b bytes.Buffer
	if err := printChanges(&b, &output{}, c); err != nil {
		t.Fatal(err)
	}
	checkLines(t, b.String(), []string{
		"listed endpoint added 10.0.0.9:80 - - -",
		"listed endpoint removed 10.0.0.3:80 - - connections are closed after 30s",
		"gone removed - - - -",
		"gone endpoint removed 10.0.0.1:80 - - connections are reset",
		"open connections to endpoints that go: 3, of which 3 would be ended",
	})
}

// checkLines wants lines of a listing, without those of fields that have changed.
func checkLines(t *testing.T, out string, want []string) {
	t.Helper()
	var got []string
	for line := range strings.Lines(out) {
		words := strings.Fields(line)
		if len(words) > 0 && words[0] != "SERVICE" && !slices.Contains(words, "changed") {
			got = append(got, strings.Join(words, " "))
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s\n%s", diff, out)
	}
}

// TestDiffRunning compares with what an instance goes by, and counts the
// connections that it has.
func TestDiffRunning(t *testing.T) {
	c, err := config.Parse("old.yaml", []byte(oldConfig))
	if err != nil {
		t.Fatal(err)
	}
	i := &instance{plan: plan{merge: config.ParsePartial}}
	for name, answer := range map[string]http.Handler{
		"": answerDiff(&control{i: i, config: c, sources: newSources(i, nil)}),
		// It tells what it goes by, and no more.
		"an earlier version": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			_ = json.NewEncoder(w).Encode(admin.Error{Message: "no such path"})
		}),
	} {
		t.Run(name, func(t *testing.T) { diffRunningWith(t, c, answer) })
	}
}

// answerDiff is the route of admin's server.
func answerDiff(c *control) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, err := io.ReadAll(r.Body)
		if err != nil {
			panic(err)
		}
		result, err := c.diff(r.Context(), r.URL.Query().Get("name"), text)
		if err != nil {
			panic(err)
		}
		_ = json.NewEncoder(w).Encode(result)
	})
}

func diffRunningWith(t *testing.T, c *config.Config, byInstance http.Handler) {
	dir := t.TempDir()
	mux := http.NewServeMux()
	answer := func(v any) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(v) }
	}
	mux.Handle("POST /v1/diff", byInstance)
	mux.Handle("GET /v1/config", answer(c))
	mux.Handle("GET /v1/status", answer(admin.Status{Instance: "i", Services: []admin.ServiceStatus{
		{Name: "web", Endpoints: []admin.EndpointStatus{{Address: "10.0.0.1:80", Live: 7}, {Address: "10.0.0.2:80", Live: 2}}},
		{Name: "db", Endpoints: []admin.EndpointStatus{{Address: "10.0.0.3:80", Live: 3}}},
	}}))
	ln, err := net.Listen("unix", filepath.Join(dir, "i.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: mux}
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	defer func() {
		s.Close()
		<-done
	}()

	file := write(t, dir, "new.yaml", newConfig)
	out, err := call(t, "--runtime-dir", dir, "diff", file)
	if err != nil {
		t.Fatal(err)
	}
	const last = "\nopen connections to endpoints that go: 5, of which 2 would be ended\n"
	if !strings.HasSuffix(out, last) || !strings.Contains(out, "takes a restart") {
		t.Errorf("%s\nwant at its end: %s", out, last)
	}
	out, err = call(t, "--runtime-dir", dir, "diff", "--instance", "i", "-o", "json", file)
	if err != nil {
		t.Fatal(err)
	}
	var got changes
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]int64{"web": 2, "db": 3}, got.Open); diff != "" || !got.Restart || len(got.Services) != 4 {
		t.Errorf("%+v\n%s", got, diff)
	}
	// Where no endpoint goes, nothing is said of connections to them.
	more := write(t, dir, "more.yaml", oldConfig+"zone: elsewhere\n")
	if out, err := call(t, "--runtime-dir", dir, "diff", more); err != nil || !strings.Contains(out, "elsewhere") || strings.Contains(out, "open connections") {
		t.Errorf("%q, %v", out, err)
	}
	bad := write(t, dir, "bad.yaml", "a: 1\n")
	checkWhole(t, bad, 1, "--runtime-dir", dir, "diff", "-o", "json", bad)
	if out, err := call(t, "--runtime-dir", dir, "diff", bad); !isUsage(err) || out != "" || !strings.HasPrefix(err.Error(), bad+":1:1: a: unknown key") {
		t.Errorf("%q, %v", out, err)
	}
	same := write(t, dir, "same.yaml", oldConfig)
	if out, err := call(t, "--runtime-dir", dir, "diff", same); err != nil || out != "no change\n" {
		t.Errorf("%q, %v", out, err)
	}
}

// TestDiffAsReload: what diff says is what a reload does, of what flags said and of what
// is refused, too.
func TestDiffAsReload(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "") // nobody is in a pod
	file := filepath.Join(t.TempDir(), "p.yaml")
	f := &execFlags{
		file: file, path: "auto", onFailure: "closed", connect: "early", existing: "reset",
		services: []string{"10.96.0.9:80=10.0.0.9:80"}, deny: []string{"10.9.0.0/16"}, exclude: []string{"10.8.0.0/16"},
	}
	if err := os.WriteFile(file, []byte(oldConfig), 0o600); err != nil {
		t.Fatal(err)
	}
	c := f.running(t)
	before := c.config
	for name, tt := range map[string]struct {
		text             string
		services, wanted int // that change; that are refused
		whole            bool
	}{
		"the same":         {text: oldConfig},
		"another":          {text: newConfig, services: 4},
		"no API server":    {text: strings.Replace(newConfig, "file: /a.json", "kubernetes: {service: a/b}", 1), services: 3, wanted: 1},
		"partly wrong":     {text: strings.Replace(newConfig, "10.0.0.1:80", "10.0.0.1:0", 1), services: 4, wanted: 1},
		"wrong":            {text: "servces: []", wanted: 1, whole: true},
		"empty":            {text: "", wanted: 1, whole: true},
		"nothing, said":    {text: "services: []", services: 2},
		"no YAML":          {text: "a: [", wanted: 1, whole: true},
		"a flag's service": {text: "services: [{name: x, address: 10.96.0.9:80, endpoints: [10.0.0.1:80]}]", services: 2, wanted: 1},
	} {
		got, err := c.diff(t.Context(), file, []byte(tt.text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var changes config.Changes
		if whole := got.Changes == nil; whole != tt.whole {
			t.Errorf("%s: refused as a whole: %t", name, whole)
		} else if !whole {
			if err := json.Unmarshal(got.Changes, &changes); err != nil {
				t.Fatal(err)
			}
		}
		if len(changes.Services) != tt.services || len(got.Refused) != tt.wanted {
			t.Errorf("%s: %+v, refused %+v", name, changes, got.Refused)
		}
		// What a reload does.
		if err := os.WriteFile(file, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		text, err := c.read()
		if err != nil {
			t.Fatal(err)
		}
		next, refused, _, err := c.reread(before, text)
		if (err != nil) != tt.whole {
			t.Errorf("%s: a reload: %v", name, err)
		}
		if err != nil {
			continue
		}
		if diff := cmp.Diff(next.Diff(before).Lines(), changes.Lines()); diff != "" {
			t.Errorf("%s: reload -, diff +:\n%s", name, diff)
		}
		if diff := cmp.Diff(refusals(refused), got.Refused, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%s: refused, reload -, diff +:\n%s", name, diff)
		}
	}
}
