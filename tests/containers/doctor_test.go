package containers

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/loader/probe"
)

// Profiles that make bpf(2) what it is where Pillion cannot work: the kernel of a
// sandbox has none, and podman's own profile denies it.
const (
	noBPF   = `{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["bpf"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]}`
	denyBPF = `{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["bpf"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]}`
)

// doctor is what pillion doctor says in containers, and pillion init where it is to
// refuse: of each thing that is missing its name, and what to set.
func doctor(t *testing.T, w *world) {
	three := []string{"BPF", "NET_ADMIN", "DAC_READ_SEARCH"}
	both := []mount{bpffs, nodeCgroups}
	file := func(name, text string) string {
		path := filepath.Join(w.dir, name+".json")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	// On a node with v2 alone, a container sees its own cgroup.
	unseen := map[string][]string{viewHybrid: {"cgroup v2"}}[w.view]
	p := w.newPod(t, podSpec{config: w.serving("")})
	for _, c := range []struct {
		name  string
		spec  spec
		fails []string
		says  string // what init says then
	}{
		{"as documented", w.minimal(), nil, ""},
		{"no mounts", spec{caps: three}, append(unseen, "bpffs"), "/sys/fs/"},
		{"another kernel", spec{caps: three, mounts: both, seccomp: file("none", noBPF), masked: []string{"/sys/kernel/btf"}}, []string{"btf", "bpf(2)"}, "give the pod another runtimeClassName"},
		{"denied", spec{caps: three, mounts: both, seccomp: file("deny", denyBPF)}, []string{"bpf(2)"}, "seccomp=unconfined"},
		{"no capabilities", spec{mounts: both}, []string{"CAP_BPF", "CAP_NET_ADMIN"}, "securityContext.capabilities.add"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.spec.args = append([]string{"doctor", "--output", "json"}, c.spec.args...)
			d := p.run(t, "doctor", c.spec)
			code := d.wait(t).code
			var found []probe.Finding
			if err := json.Unmarshal([]byte(d.output(t)), &found); err != nil {
				t.Fatalf("%v\n%s", err, d.output(t))
			}
			var fails []string
			for _, f := range found {
				if f.Level == probe.Fail {
					t.Logf("%s: %s; %s", f.Name, f.Detail, f.Cure)
					fails = append(fails, f.Name)
				}
			}
			if diff := cmp.Diff(c.fails, fails); diff != "" {
				t.Errorf("what doctor finds missing: %s", diff)
			}
			want := map[bool]int64{true: 0, false: 69}[len(c.fails) == 0]
			if code != want {
				t.Errorf("doctor: exit code %d, want %d", code, want)
			}
			if want == 0 {
				return
			}
			c.spec.args = initArgs
			i := p.run(t, "init", c.spec)
			if st := i.wait(t); st.code != want || !strings.Contains(i.output(t), c.says) {
				t.Errorf("init: exit code %d, want %d and that it says %q:\n%s", st.code, want, c.says, i.output(t))
			}
		})
	}
}
