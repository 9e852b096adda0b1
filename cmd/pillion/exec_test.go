package main

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/cmd/pillion/config"
)

// TestExecReload: flags are on top of the file before it is judged, and so a service
// that does not go with them is refused alone, at its place.
func TestExecReload(t *testing.T) {
	dir := t.TempDir()
	for name, tt := range map[string]struct {
		flags      execFlags
		more, want string // what is added to the file, and why it is refused
	}{
		"the path": {
			execFlags{path: "direct"}, "  - {name: c, address: 10.96.0.4:80, endpoints: [10.0.0.4:80], attempts: 3}\n",
			":5:74: services[2].attempts: 3 attempts need path: relay, direct is the path of all services (--path)",
		},
		"a service": {
			execFlags{services: []string{"10.96.0.9:80=10.0.0.9:80"}}, "  - {name: c, address: 10.96.0.9:80, endpoints: [10.0.0.4:80]}\n",
			`:5:24: services[2].address: 10.96.0.9:80 is the address of service "10.96.0.9:80" already (--service 10.96.0.9:80)`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := tt.flags
			f.file = write(t, dir, "p.yaml", oldConfig)
			c := f.running(t)
			before := c.config
			text := []byte(oldConfig + tt.more)
			next, refused, _, err := c.reread(before, text)
			if err != nil {
				t.Fatal(err)
			}
			where, _, _ := strings.Cut(tt.want, ": ")
			want := []config.Refused{{Name: "c", Where: f.file + where, Text: f.file + tt.want}}
			if diff := cmp.Diff(want, refused); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if d := next.Diff(before); !d.Empty() {
				t.Errorf("the rest has changed: %v", d.Lines())
			}
			said, err := c.diff(t.Context(), f.file, text)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(refusals(want), said.Refused); diff != "" || said.Changes == nil {
				t.Errorf("diff, -want +got:\n%s", diff)
			}
		})
	}
}

// TestExecStart: so it is at the start.
func TestExecStart(t *testing.T) {
	const text = "path: direct\nservices: [{address: 10.96.0.1:80, endpoints: [10.0.0.1:80], attempts: 3}]\n"
	file := write(t, t.TempDir(), "p.yaml", text)
	for path, want := range map[string]string{
		"":       file + ":2:72: services[0].attempts: 3 attempts need path: relay, direct is the path of all services",
		"direct": file + ":2:72: services[0].attempts: 3 attempts need path: relay, direct is the path of all services (--path)",
		"relay":  "",
		"auto":   "",
		"relai":  `--path: "relai": did you mean relay?`,
	} {
		f := &execFlags{file: file, path: path}
		flags, err := f.overlay()
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		if _, err := f.configuration(flags); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("--path %s: %s\nwant: %s", path, got, want)
		}
	}
	f := &execFlags{file: filepath.Join(t.TempDir(), "none.yaml")}
	if _, err := f.configuration(nil); err == nil {
		t.Error("a file that is not there is taken")
	}
}

// running is the control of an exec with these flags and their file, without a kernel side.
func (f *execFlags) running(t *testing.T) *control {
	t.Helper()
	flags, err := f.overlay()
	if err != nil {
		t.Fatal(err)
	}
	c, err := f.configuration(flags)
	if err != nil {
		t.Fatal(err)
	}
	i := &instance{plan: plan{file: f.file, merge: flags.ParsePartial}}
	i.control = &control{i: i, config: c, sources: newSources(i, nil)}
	return i.control
}
