package containers

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// finding is the way from a container to its pod, with all that a runtime may give
// or withhold.
func finding(t *testing.T, w *world) {
	const (
		none    = "operation not permitted"
		ok      = ""
		another = "11111111-2222-3333-4444-555555555555"
	)
	two := []string{"BPF", "NET_ADMIN"}
	three := append([]string{"DAC_READ_SEARCH"}, two...)
	pins := []mount{bpffs}
	both := []mount{bpffs, nodeCgroups}
	type row struct {
		name, view string // empty: both views
		spec       spec
		parent     string
		code       int64
		says       []string
	}
	for _, c := range []row{
		{name: "as documented", spec: w.minimal()},
		{name: "two capabilities and the node's cgroups", spec: spec{caps: two, mounts: both}},
		{name: "privileged", spec: spec{privileged: true, mounts: pins}},
		{name: "unconfined", spec: spec{caps: three, mounts: both, seccomp: unconfined}},
		{name: "opened by id", view: viewUnified, spec: spec{caps: three, mounts: pins}},
		{name: "mounted by itself", view: viewHybrid, spec: spec{caps: append([]string{"SYS_ADMIN"}, three...), mounts: pins}},
		{name: "no way up", view: viewUnified, spec: spec{caps: two, mounts: pins}, code: 69, says: []string{"CAP_DAC_READ_SEARCH", "/sys/fs/cgroup", none}},
		{name: "no way in", view: viewHybrid, spec: spec{caps: three, mounts: pins}, code: 69, says: []string{"cgroup v2 is not mounted here", "/sys/fs/cgroup", none}},
		{name: "no capability", spec: spec{mounts: both}, code: 69, says: []string{"CAP_BPF", "CAP_NET_ADMIN"}},
		{name: "nowhere to pin", spec: spec{caps: three, mounts: []mount{nodeCgroups}}, code: 69, says: []string{"/sys/fs/bpf", "HostToContainer"}},
		{name: "pins that are not mounted", spec: spec{args: []string{"--bpffs", "/bpf"}, caps: three, mounts: []mount{nodeCgroups}}, code: 69, says: []string{"/bpf", "HostToContainer"}},
		{name: "of another uid", spec: spec{caps: three, mounts: both, uid: another}, code: 64, says: []string{another, "--cgroup PATH"}},
		{name: "not named like a pod", spec: w.minimal(), parent: "shop", code: 64, says: []string{"the container /" + w.top + "/kubepods/burstable/shop/", "--cgroup PATH"}},
	} {
		if c.view != "" && c.view != w.view {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			p := w.newPod(t, podSpec{config: w.serving("on_failure: closed"), privileged: c.spec.privileged, parent: c.parent})
			c.spec.args = slices.Concat(initArgs, c.spec.args)
			init := p.run(t, "init", c.spec)
			code, out := init.wait(t).code, init.output(t)
			t.Logf("exit code %d: %s", code, out)
			if code != c.code {
				t.Errorf("exit code %d, want %d", code, c.code)
			}
			for _, words := range c.says {
				if !strings.Contains(out, words) {
					t.Errorf("it does not say %q", words)
				}
			}
			want := "refused"
			if c.code != 0 {
				want = "unreachable" // nobody has the address
			} else if !strings.Contains(out, filepath.Join(w.top, "kubepods/burstable/pod"+p.uid)+" ") {
				t.Errorf("it does not say that it found the pod %s", p.uid)
			}
			if got := p.ask(t, 1, service); !strings.Contains(got[0], want) {
				t.Errorf("an application got %q, want %s", got, want)
			}
		})
	}
}
