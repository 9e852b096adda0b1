package inject

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files again")

func options() Options {
	return Options{Image: "ghcr.io/pillion-project/pillion:devel", Version: "devel", Form: Sidecar, ConfigMap: "pillion"}
}

// flags are said by the first line of an input: # options: container ...
func flags(text []byte) Options {
	o := options()
	line, _, _ := strings.Cut(string(text), "\n")
	_, words, _ := strings.Cut(line, "# options:")
	for _, w := range strings.Fields(words) {
		switch w {
		case "container":
			o.Form = Container
		case "host-network":
			o.HostNetwork = true
		case "cgroup-mount":
			o.CgroupMount = true
		}
	}
	return o
}

func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.in.*")
	if err != nil || len(files) < 8 {
		t.Fatalf("%d files: %v", len(files), err)
	}
	for _, name := range files {
		t.Run(filepath.Base(name), func(t *testing.T) {
			in, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			o := flags(in)
			out, _, err := o.Manifest(in)
			if err != nil {
				t.Fatal(err)
			}
			golden := strings.Replace(name, ".in.", ".out.", 1)
			if *update {
				if err := os.WriteFile(golden, out, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), string(out)); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
			kept(t, in, out)
			again, results, err := o.Manifest(out)
			if err != nil || !bytes.Equal(again, out) {
				t.Errorf("done again, it differs: %v\n%s", err, cmp.Diff(string(out), string(again)))
			}
			for _, r := range results {
				if r.Changed {
					t.Errorf("done again, %s changes", r.Workload)
				}
			}
			upgrade(t, o, out)
		})
	}
}

// kept wants every line of a YAML input in the output, in its order, but for
// keys that were empty.
func kept(t *testing.T, in, out []byte) {
	t.Helper()
	if bytes.HasPrefix(bytes.TrimSpace(in), []byte("{")) || bytes.Contains(in, []byte(Injected)) {
		return
	}
	rest := strings.SplitAfter(string(out), "\n")
	for line := range strings.Lines(string(in)) {
		if !strings.HasSuffix(line, "\n") {
			line += "\n"
		}
		if nothing.MatchString(line) {
			continue
		}
		n := 0
		for n < len(rest) && rest[n] != line {
			n++
		}
		if n == len(rest) {
			t.Fatalf("the line %q is lost, or out of order", line)
		}
		rest = rest[n+1:]
	}
}

// upgrade wants another version to replace what is there, and nothing else, and
// to be replaced in turn.
func upgrade(t *testing.T, o Options, out []byte) {
	t.Helper()
	newer := o
	newer.Image, newer.Version = "ghcr.io/pillion-project/pillion:2.0.0", "2.0.0"
	up, _, err := newer.Manifest(out)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(up, []byte(o.Image)) {
		t.Errorf("the older image is still there:\n%s", up)
	}
	down, _, err := o.Manifest(up)
	if err != nil || !bytes.Equal(down, out) {
		t.Errorf("up and down again: %v\n%s", err, cmp.Diff(string(out), string(down)))
	}
	other := o
	other.Form = map[Form]Form{Sidecar: Container, Container: Sidecar}[o.Form]
	changed, _, err := other.Manifest(out)
	if err != nil {
		t.Fatalf("the other form: %v", err)
	}
	if same, _, err := other.Manifest(changed); err != nil || !bytes.Equal(same, changed) {
		t.Errorf("the other form, done again: %v\n%s", err, cmp.Diff(string(changed), string(same)))
	}
}

const podHead = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\nspec:\n"

func TestRefused(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"host network", podHead + "  hostNetwork: true\n  containers:\n  - name: a\n", "hostNetwork"},
		{"host network, as YAML 1.1 says it", podHead + "  hostNetwork: yes\n  containers:\n  - name: a\n", "hostNetwork"},
		{"user namespace, as YAML 1.1 says it", podHead + "  hostUsers: Off\n  containers:\n  - name: a\n", "user namespace"},
		{"windows by the older selector", podHead + "  nodeSelector: {beta.kubernetes.io/os: windows}\n  containers:\n  - name: a\n", "Windows"},
		{"UTF-16", "\xff\xfea\x00:\x00 \x00b\x00\n\x00", "UTF-8"},
		{"a NUL", "a: \x00\n", "UTF-8"},
		{"windows", podHead + "  os: {name: windows}\n  containers:\n  - name: a\n", "Windows"},
		{"windows by selector", podHead + "  nodeSelector: {kubernetes.io/os: windows}\n  containers:\n  - name: a\n", "Windows"},
		{"user namespace", podHead + "  hostUsers: false\n  containers:\n  - name: a\n", "user namespace"},
		{"no containers", podHead + "  containers: []\n", "no containers"},
		{"somebody else's", podHead + "  containers:\n  - name: pillion\n", "not there by injection"},
		{"somebody else's volume", podHead + "  containers:\n  - name: a\n  volumes:\n  - name: pillion-run\n", "not there by injection"},
		{"flow list", podHead + "  containers:\n  - name: a\n  volumes: [{name: a}]\n", "flow style"},
		{"flow mapping", "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  containers:\n  - name: a\n", "flow style"},
		{"no template", "apiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: a\nspec:\n  replicas: 1\n", "spec.template"},
		{"no spec", "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n", "no spec"},
		{"an alias", "x: &a\n  - name: a\napiVersion: v1\nkind: Pod\nmetadata:\n  name: a\nspec:\n  containers:\n  - name: a\n  volumes: *a\n", "write it out"},
		{"a line without an end", "apiVersion: v1\rkind: Pod\n", "carriage return"},
		{"opted out wrongly", "apiVersion: v1\nkind: Pod\nmetadata:\n  annotations:\n    " + Inject + ": false\nspec:\n  containers:\n  - name: a\n", "not text"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, _, err := options().Manifest([]byte(tt.text))
			if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), tt.want) || out != nil {
				t.Errorf("%v, want %q; and a text: %v", err, tt.want, out != nil)
			}
		})
	}
}

// TestAlone leaves what is no workload, or not ours to change, as it is.
func TestAlone(t *testing.T) {
	for _, text := range []string{
		"", "# nothing\n", "---\n---\n", "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n",
		"apiVersion: serving.knative.dev/v1\nkind: Job\nspec: {}\n", "just text\n", "- a\n- b\n",
		"apiVersion: v1\nkind: Pod\nmetadata:\n  annotations:\n    kubernetes.io/config.mirror: 0f\nspec:\n  hostNetwork: true\n  containers:\n  - name: a\n",
		"apiVersion: v1\nkind: Pod\nmetadata:\n  annotations:\n    " + Inject + ": \"false\"\nspec:\n  containers:\n  - name: a\n",
	} {
		out, _, err := options().Manifest([]byte(text))
		if err != nil || string(out) != text {
			t.Errorf("%q becomes %q: %v", text, out, err)
		}
	}
}

// TestLists wants the pods of every kind of list to be found: those of the API have
// elements that do not say what they are.
func TestLists(t *testing.T) {
	const spec = `"metadata":{"name":"a"},"spec":{"containers":[{"name":"a"}]}`
	for _, text := range []string{
		`{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Pod",` + spec + `}]}`,
		`{"apiVersion":"v1","kind":"PodList","items":[{` + spec + `}]}`,
		`{"apiVersion":"v1","kind":"PodList","items":[{"apiVersion":"v1","kind":"Pod",` + spec + `}]}`,
		`{"apiVersion":"apps/v1","kind":"DeploymentList","items":[{"metadata":{"name":"a"},"spec":{"template":{` + spec + `}}}]}`,
		"apiVersion: v1\nkind: PodList\nitems:\n- metadata:\n    name: a\n  spec:\n    containers:\n    - name: a\n",
	} {
		out, results, err := options().Manifest([]byte(text))
		if err != nil || len(results) != 1 || !results[0].Changed || !strings.Contains(string(out), sidecarName) {
			t.Errorf("%s: %v, %v", text, results, err)
		}
		if again, _, err := options().Manifest(out); err != nil || !bytes.Equal(again, out) {
			t.Errorf("%s, done again: %v\n%s", text, err, cmp.Diff(string(out), string(again)))
		}
	}
}

// TestSpared leaves what an API server adds to our containers and volumes where it
// is, when it asks again; not what another version had put there.
func TestSpared(t *testing.T) {
	o := options()
	text, _, err := o.Manifest([]byte(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"},"spec":{"containers":[{"name":"a"}]}}`))
	if err != nil {
		t.Fatal(err)
	}
	change := func(f func(pod, sidecar dict)) []byte {
		t.Helper()
		v, err := decodeJSON(text)
		if err != nil {
			t.Fatal(err)
		}
		inits := seqOf(dictOf(dictOf(v)["spec"])["initContainers"])
		f(dictOf(v), dictOf(inits[len(inits)-1]))
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	admitted := func(pod, sidecar dict) {
		token := dict{"name": "kube-api-access-x", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": true}
		sidecar["volumeMounts"] = append(seqOf(sidecar["volumeMounts"]), token)
		dictOf(sidecar["resources"])["limits"] = dict{"memory": "1Gi"}
		sidecar["terminationMessagePath"] = "/dev/termination-log"
		volumes := seqOf(dictOf(pod["spec"])["volumes"])
		dictOf(dictOf(volumes[len(volumes)-1])["configMap"])["defaultMode"] = 420
		dictOf(pod["spec"])["volumes"] = append(volumes, dict{"name": "kube-api-access-x"})
	}
	for name, tt := range map[string]struct {
		f       func(pod, sidecar dict)
		changes bool
	}{
		"nothing":  {func(dict, dict) {}, false},
		"admitted": {admitted, false},
		"its argument": {func(_, sidecar dict) {
			sidecar["args"] = append(seqOf(sidecar["args"]), "--cgroup", "auto")
		}, true},
		"its privilege": {func(_, sidecar dict) { dictOf(sidecar["securityContext"])["privileged"] = true }, true},
		"its mount":     {func(_, sidecar dict) { sidecar["volumeMounts"] = seqOf(sidecar["volumeMounts"])[1:] }, true},
		"its version": {func(pod, sidecar dict) {
			admitted(pod, sidecar)
			dictOf(dictOf(pod["metadata"])["annotations"])[Injected] = "0.9"
		}, true},
	} {
		patch, err := o.Patch(change(tt.f))
		if err != nil || (patch != nil) != tt.changes {
			t.Errorf("%s: %v, %s, want a patch: %v", name, err, patch, tt.changes)
		}
	}
}

// TestMoved has another webhook put its init container and its volume before ours: ours
// are put first again, with what the API server has added to them, since that adds
// it once.
func TestMoved(t *testing.T) {
	o := options()
	text, _, err := o.Manifest([]byte(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"},"spec":{"containers":[{"name":"a"}]}}`))
	if err != nil {
		t.Fatal(err)
	}
	v, err := decodeJSON(text)
	if err != nil {
		t.Fatal(err)
	}
	spec := dictOf(dictOf(v)["spec"])
	sidecar := dictOf(seqOf(spec["initContainers"])[1])
	sidecar["volumeMounts"] = append(seqOf(sidecar["volumeMounts"]), dict{"name": "token", "mountPath": "/token"})
	dictOf(dictOf(seqOf(spec["volumes"])[2])["configMap"])["defaultMode"] = 420
	spec["initContainers"] = append(seq{dict{"name": "other"}}, seqOf(spec["initContainers"])...)
	all := seqOf(spec["volumes"])
	spec["volumes"] = seq{all[0], dict{"name": "other"}, all[1], all[2]}
	moved, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	out, _, err := o.Manifest(moved)
	if err != nil {
		t.Fatal(err)
	}
	v, err = decodeJSON(out)
	if err != nil {
		t.Fatal(err)
	}
	spec = dictOf(dictOf(v)["spec"])
	names := func(key string) (all []string) {
		for _, e := range seqOf(spec[key]) {
			all = append(all, dictOf(e)["name"].(string))
		}
		return all
	}
	want := []string{initName, sidecarName, "other"}
	if d := cmp.Diff(want, names("initContainers")); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if d := cmp.Diff([]string{"other", bpfVolume, runVolume, configVolume}, names("volumes")); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	for _, lost := range []string{`"mountPath": "/token"`, `"defaultMode": 420`} {
		if !strings.Contains(string(out), lost) {
			t.Errorf("%s is lost:\n%s", lost, out)
		}
	}
}

func FuzzManifest(f *testing.F) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte(podHead + "  containers: &c\n  - name: a\n  initContainers: *c\n"))
	f.Add([]byte(podHead + "  containers:\n  - {name: a}\n  - args: |\n     - x\n\n    name: b"))
	f.Fuzz(func(t *testing.T, text []byte) {
		out, _, err := options().Manifest(text)
		if err != nil {
			return
		}
		again, _, err := options().Manifest(out)
		if err != nil || !bytes.Equal(again, out) {
			t.Errorf("done again: %v\n%s", err, cmp.Diff(string(out), string(again)))
		}
	})
}
