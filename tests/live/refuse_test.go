package live

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// cli runs pillion reload, and returns what it wrote and its exit code.
func (s *stage) cli(t testing.TB, flags ...string) (string, int) {
	t.Helper()
	out, err := s.Pillion(t, append([]string{"reload", "--instance", s.Name}, flags...)...)
	var exit *exec.ExitError
	switch {
	case err == nil:
		return out, 0
	case errors.As(err, &exit):
		return out + err.Error(), exit.ExitCode()
	default:
		t.Fatal(err)
		return "", 0
	}
}

// TestRefusedFile has a file that is no YAML, and one whose settings are wrong:
// all stays, until it is mended.
func TestRefusedFile(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	serve(t, r, 1, 2)
	good := "services:\n" + service(1, "", 1)
	s := newStage(t, r, good)
	bad := map[string]struct{ yaml, where, text string }{
		"no YAML":       {"services:\n  - {name: s1\n  address: [\n", ":", ""},
		"a setting":     {"on_failure: maybe\nservices:\n" + service(1, "", 2), ":1:13", "maybe"},
		"unknown key":   {"servises:\n" + service(1, "", 2), ":1:1", "services"},
		"no mapping":    {"hello\n", ":1:1", ""},
		"two documents": {good + "---\n" + good, ":", ""},
		"nothing":       {"", "", "empty"},
		"a comment":     {"# soon\n", "", "empty"},
	}
	failures := s.Metric(t, "pillion_config_reload_failures_total")
	for name, b := range bad {
		put(t, s.file, b.yaml)
		out, code := s.cli(t)
		if code != 64 || !strings.Contains(out, b.text) || !strings.Contains(out, s.file+b.where) {
			t.Errorf("%s: exit code %d, want 64 and %s%s ... %s:\n%s", name, code, s.file, b.where, b.text, out)
		}
		status := s.status(t)
		c := status.Configuration
		if c.Generation != 1 || len(c.Refused) == 0 || c.Refused[0].Name != "" {
			t.Errorf("%s: %+v", name, c)
		}
		if got := s.metric(t, "pillion_config_last_reload_successful"); got != "0" {
			t.Errorf("%s: last reload successful: %s", name, got)
		}
		if n := s.Metric(t, "pillion_config_reload_failures_total"); n <= failures {
			t.Errorf("%s: %d failures, before %d", name, n, failures)
		} else {
			failures = n
		}
		s.goes(t, 1, 1)
	}
	put(t, s.file, "services:\n"+service(1, "", 2))
	if out, code := s.cli(t); code != 0 {
		t.Errorf("mended: exit code %d\n%s", code, out)
	}
	if c := s.status(t).Configuration; c.Generation != 2 || len(c.Refused) != 0 {
		t.Errorf("mended: %+v", c)
	}
	if got := s.metric(t, "pillion_config_last_reload_successful"); got != "1" {
		t.Errorf("mended: last reload successful: %s", got)
	}
	s.goes(t, 1, 2)
}

// TestWatchFirst: a reload after the watch has taken the file tells what the watch did
// with it, and its exit code is of what the file says. The log has each refusal once.
func TestWatchFirst(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	serve(t, r, 1, 2, 3)
	s := newStage(t, r, "services:\n"+service(1, "", 1)+service(2, "", 1))
	const start = "configuration 1 holds, taken at "
	if out, code := s.cli(t); code != 0 || !strings.HasPrefix(out, start) || !strings.Contains(out, " by the start\n  nothing changed\n") {
		t.Errorf("the file of the start: exit code %d\n%s", code, out)
	}
	const refusal = "polcy: unknown key"
	part := "services:\n" + service(1, "", 2) + service(2, "polcy: random", 2)
	whole := "on_failure: maybe\n" + part
	for _, tt := range []struct {
		name, file string
		generation uint64
		refused    []string
		code       int
		want       []string
	}{
		{"in part", part, 2, []string{"s2"}, 64, []string{
			"configuration 2 holds, taken at ", " by the watch on " + s.file + "\n", "service s1: endpoint ", refusal, "! s2 is refused, the earlier state stays",
		}},
		{"as a whole", whole, 2, []string{""}, 64, []string{
			"configuration 2 holds, taken at ", " by the watch on " + s.file + "\n", "nothing changed", "the configuration is refused, the earlier one stays", "maybe",
		}},
		{"mended", "services:\n" + service(1, "", 2) + service(2, "", 3), 3, nil, 0, []string{
			"configuration 3 holds, taken at ", " by the watch on " + s.file + "\n", "service s2: endpoint ",
		}},
	} {
		put(t, s.file, tt.file)
		testutil.Eventually(t, rig.Limit, func() bool {
			c := s.status(t).Configuration
			names := make([]string, 0, len(c.Refused))
			for _, r := range c.Refused {
				names = append(names, r.Name)
			}
			return c.Generation == tt.generation && slices.Equal(slices.Compact(names), tt.refused)
		}, tt.name, ": the watch has taken the file")
		for range 2 {
			out, code := s.cli(t)
			if code != tt.code {
				t.Errorf("%s: exit code %d, want %d", tt.name, code, tt.code)
			}
			for _, want := range tt.want {
				if !strings.Contains(out, want) {
					t.Errorf("%s: no %q in:\n%s", tt.name, want, out)
				}
			}
		}
		if c := s.status(t).Configuration; c.Generation != tt.generation || c.By != admin.TakenByWatch {
			t.Errorf("%s: %+v", tt.name, c)
		}
	}
	for _, refused := range []string{"part of the configuration is refused", "the configuration is refused, the last one stays"} {
		if n := strings.Count(s.Log(), refused); n != 1 {
			t.Errorf("%q is in the log %d times:\n%s", refused, n, s.Log())
		}
	}
}

// TestRefusedServices has a file in which some services are wrong: each is
// refused alone.
func TestRefusedServices(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	serve(t, r, 1, 2, 3)
	s := newStage(t, r, "services:\n"+service(1, "", 1)+service(2, "", 1)+service(3, "", 1))
	put(t, s.file, "services:\n"+
		service(1, "", 2)+
		service(2, "polcy: random", 2)+ // stays as it was
		service(4, "attempts: 0", 2)+ // is new: left out
		service(5, "", 3))
	out, code := s.cli(t)
	if code != 64 {
		t.Errorf("exit code %d", code)
	}
	for _, want := range []string{s.file + ":3:", "did you mean policy", s.file + ":4:", "attempts"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	text, code := s.cli(t, "-o", "json")
	var result admin.ReloadResult
	if err := json.Unmarshal([]byte(text[:strings.LastIndex(text, "}")+1]), &result); err != nil || code != 64 {
		t.Fatalf("exit code %d, %v:\n%s", code, err, text)
	}
	for _, refused := range [][]admin.Refusal{result.Refused, s.status(t).Configuration.Refused} {
		kept := map[string]bool{}
		for _, r := range refused {
			if !strings.HasPrefix(r.Where, s.file+":") || r.Text == "" {
				t.Errorf("%+v", r)
			}
			kept[r.Name] = len(r.Kept) > 0
		}
		if len(kept) != 2 || !kept["s2"] || kept["s4"] {
			t.Errorf("refused %+v", refused)
		}
	}
	for _, name := range []string{"s2", "s4"} {
		if got := s.metric(t, `pillion_config_refused{service="`+name+`"}`); got != "1" {
			t.Errorf("refused %s: %q", name, got)
		}
	}
	if got := s.metric(t, "pillion_config_generation"); got != "2" {
		t.Errorf("generation %s", got)
	}
	s.goes(t, 1, 2)
	s.goes(t, 2, 1) // the last good state
	s.goes(t, 5, 3)
	for _, gone := range []string{"s3", "s4"} {
		if got := s.service(t, gone); got.Name != "" {
			t.Errorf("service %s is there: %+v", gone, got)
		}
	}
	// What is refused does not come and go with other changes.
	for n := range 3 {
		s.tryReload(t, "services:\n"+service(1, "", 1+n%3)+service(2, "polcy: random", 2))
		s.goes(t, 2, 1)
	}
	s.reload(t, "services:\n"+service(1, "", 1)+service(2, "policy: random", 3)+service(4, "attempts: 1", 2))
	s.goes(t, 2, 3)
	s.goes(t, 4, 2)
	if got := s.metric(t, `pillion_config_refused{service="s2"}`); got != "" {
		t.Errorf("mended, and refused: %q", got)
	}
}

// TestMissingFile has a configuration that vanishes: all stays, and is said.
func TestMissingFile(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	serve(t, r, 1, 2)
	s := newStage(t, r, "services:\n"+service(1, "", 1))
	remove(t, s.file)
	out, code := s.cli(t)
	if code != 64 || !strings.Contains(out, s.file) {
		t.Errorf("exit code %d, want 64 and the file:\n%s", code, out)
	}
	if c := s.status(t).Configuration; len(c.Refused) != 1 || c.Generation != 1 {
		t.Errorf("%+v", c)
	}
	s.goes(t, 1, 1)
	put(t, s.file, "services:\n"+service(1, "", 2)) // the watch sees that
	s.has(t, "s1", "2")
	if c := s.status(t).Configuration; len(c.Refused) != 0 || c.Generation != 2 {
		t.Errorf("%+v", c)
	}
}

// TestDiff tells what a reload would do, and the reload tells the same.
func TestDiff(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	s := newStage(t, r, "services:\n"+service(1, "", 1, 2)+service(2, "", 1))
	next := "services:\n" + service(1, "policy: random", 1, 3) + service(3, "", 1)
	put(t, s.file+".new", next)
	out, err := s.Pillion(t, "diff", "--instance", s.Name, s.file+".new")
	if err != nil {
		t.Fatal(err)
	}
	result := s.tryReload(t, next)
	for _, want := range []string{far(2).String(), far(3).String(), "s2", "s3", "random"} {
		if !strings.Contains(out, want) {
			t.Errorf("diff: no %s in:\n%s", want, out)
		}
		changes, err := json.Marshal(result)
		if err != nil || !strings.Contains(string(changes), want) {
			t.Errorf("reload: no %s in:\n%s", want, changes)
		}
	}
	if out, err := s.Pillion(t, "diff", "--instance", s.Name, s.file); err != nil || !strings.Contains(out, "no change") {
		t.Errorf("after the reload: %v\n%s", err, out)
	}
	// One that changes nothing is not a new generation.
	again, err := s.Instance.Reload(context.Background())
	if err != nil || again.Generation != 2 {
		t.Errorf("%v, %+v", err, again)
	}
}

// TestRestartOnly has a change that only a start reads: it is told, and it is no
// new generation however often the file is read.
func TestRestartOnly(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	serve(t, r, 1)
	s := newStage(t, r, "services:\n"+service(1, "", 1))
	for range 3 {
		s.reload(t, "relay: {workers: 1}\nservices:\n"+service(1, "", 1))
	}
	if g := s.status(t).Configuration.Generation; g != 1 {
		t.Errorf("generation %d, want 1: nothing holds that did not before", g)
	}
	put(t, s.file, "relay: {workers: 1}\nservices:\n"+service(1, "", 1))
	if out, code := s.cli(t); code != 0 || !strings.Contains(out, "at the next start") {
		t.Errorf("exit code %d, want 0 and when it holds:\n%s", code, out)
	}
}

// TestTakenOverRefused: who takes over, and cannot put its own configuration in
// force, leaves what the one before it left, and tries again with the next.
func TestTakenOverRefused(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	serve(t, r, 1, 2)
	denied := func(net int) string { return fmt.Sprintf("deny: [10.%d.0.0/16]\nservices:\n", net) }
	s := newStage(t, r, denied(97)+service(1, "path: direct", 1))
	s.goes(t, 1, 1)
	// What the file has is right: the kernel side is what does not take it.
	deny, err := ebpf.LoadPinnedMap(filepath.Join(loader.BPFFS, "pillion", s.Name, "deny"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer deny.Close()
	s.Kill(t)
	if err := deny.Freeze(); err != nil {
		t.Fatal(err)
	}
	put(t, s.file, denied(98)+service(1, "path: direct", 2))
	s.Launch(t)
	if c := s.status(t).Configuration; len(c.Refused) == 0 || !strings.Contains(c.Refused[0].Text, "deny") {
		t.Errorf("%+v", c)
	}
	s.goes(t, 1, 1)
	s.reload(t, denied(97)+service(1, "path: direct", 2))
	if c := s.status(t).Configuration; len(c.Refused) != 0 {
		t.Errorf("mended: %+v", c)
	}
	s.goes(t, 1, 2)
}

// TestEverythingReplaced starts again, and reloads, with as many deny rules as there may
// be, all of them others than before.
func TestEverythingReplaced(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	serve(t, r, 1, 2)
	denied := func(net int) string {
		text := "deny:\n"
		for n := range 16384 {
			text += fmt.Sprintf("  - 10.%d.%d.0/29:%d\n", net, n&255, 1+n>>8)
		}
		return text + "services:\n"
	}
	s := newStage(t, r, denied(97)+service(1, "path: direct", 1))
	s.goes(t, 1, 1)
	s.Kill(t)
	put(t, s.file, denied(98)+service(1, "path: direct", 2))
	s.Launch(t)
	s.goes(t, 1, 2)
	s.reload(t, denied(99)+service(1, "path: direct", 1))
	s.goes(t, 1, 1)
	if c := s.status(t).Configuration; len(c.Refused) != 0 {
		t.Errorf("%+v", c.Refused)
	}
}
