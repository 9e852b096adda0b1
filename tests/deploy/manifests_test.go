package deploy

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/cmd/pillion/config"
)

const dir = "../../deploy"

type object = map[string]any

// documents reads a manifest, strictly.
func documents(t *testing.T, name string) []object {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var all []object
	for d := yaml.NewDecoder(f); ; {
		var o object
		err := d.Decode(&o)
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(o) > 0 {
			all = append(all, o)
		}
	}
}

// at follows keys and, in lists, names of elements. Nothing there is nil.
func at(v any, path ...string) any {
	for _, p := range path {
		switch w := v.(type) {
		case object:
			v = w[p]
		case []any:
			n := slices.IndexFunc(w, func(e any) bool { return at(e, "name") == p })
			if n < 0 {
				return nil
			}
			v = w[n]
		default:
			return nil
		}
	}
	return v
}

func list(v any) []any { l, _ := v.([]any); return l }

// podOf returns the pod of a manifest, or nil: its specification.
func podOf(o object) any {
	if o["kind"] == "Pod" {
		return at(o, "spec")
	}
	return at(o, "spec", "template", "spec")
}

func TestParse(t *testing.T) {
	n := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".yaml" {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		for _, o := range documents(t, rel) {
			n++
			if text, ok := at(o, "data", "pillion.yaml").(string); ok {
				check(t, rel, []byte(text))
				continue
			}
			if filepath.Base(path) != "pillion.yaml" && (o["kind"] == nil || o["apiVersion"] == nil) {
				t.Errorf("%s: a document without kind or apiVersion", rel)
			}
		}
		return nil
	})
	if err != nil || n < 8 {
		t.Errorf("%d documents: %v", n, err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "kubernetes/component/pillion.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	check(t, "component", text)
}

// check wants a configuration of Pillion.
func check(t *testing.T, where string, text []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "pillion.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := config.Load(file); err != nil {
		t.Errorf("%s: %v", where, err)
	}
}

// pods are the manifests with a pod in them, and what each is.
var pods = []struct {
	file      string
	native    bool
	podman    bool
	container []string // names, all, in their order
}{
	{"kubernetes/sidecar.yaml", true, false, []string{"app"}},
	{"kubernetes/two-containers.yaml", false, false, []string{"pillion", "app"}},
	{"kubernetes/component/sidecar.yaml", true, false, nil},
	{"podman/pillion.kube.yaml", false, true, []string{"pillion", "app"}},
}

func TestPods(t *testing.T) {
	for _, tt := range pods {
		t.Run(tt.file, func(t *testing.T) {
			docs := documents(t, tt.file)
			spec := podOf(docs[len(docs)-1])
			var names []string
			for _, c := range list(at(spec, "containers")) {
				names = append(names, fmt.Sprint(at(c, "name")))
			}
			if d := cmp.Diff(tt.container, names); d != "" {
				t.Errorf("containers (-want +got):\n%s", d)
			}
			if got := at(list(at(spec, "initContainers"))[0], "name"); got != "pillion-init" {
				t.Errorf("the first init container is %v", got)
			}
			side := at(spec, "initContainers", "pillion")
			if !tt.native {
				side = at(spec, "containers", "pillion")
			}
			if got := at(side, "restartPolicy"); tt.native && got != "Always" || !tt.native && got != nil {
				t.Errorf("the sidecar's restartPolicy is %v", got)
			}
			if !tt.podman {
				if d := cmp.Diff([]any{"/pillion", "ready"}, at(side, "startupProbe", "exec", "command")); d != "" {
					t.Errorf("startupProbe (-want +got):\n%s", d)
				}
			}
			for _, c := range []any{side, at(spec, "initContainers", "pillion-init")} {
				modest(t, c, tt.podman)
				mounted(t, spec, c)
			}
			if got := at(spec, "hostNetwork"); got != nil {
				t.Errorf("hostNetwork %v", got)
			}
		})
	}
}

// modest wants a container that asks for no more privilege than is needed.
func modest(t *testing.T, c any, podman bool) {
	t.Helper()
	name := at(c, "name")
	want := object{
		"runAsUser": uint64(0), "runAsGroup": uint64(0), "runAsNonRoot": false,
		"privileged": false, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
		"capabilities": object{"drop": []any{"ALL"}, "add": []any{"BPF", "NET_ADMIN", "DAC_READ_SEARCH"}},
	}
	if !podman {
		want["seccompProfile"] = object{"type": "RuntimeDefault"}
	}
	if d := cmp.Diff(want, at(c, "securityContext")); d != "" {
		t.Errorf("%v: securityContext (-want +got):\n%s", name, d)
	}
}

// mounted wants every mount to have a volume.
func mounted(t *testing.T, spec, c any) {
	t.Helper()
	paths := make(map[any]any)
	for _, m := range list(at(c, "volumeMounts")) {
		volume := fmt.Sprint(at(m, "name"))
		if at(spec, "volumes", volume) == nil {
			t.Errorf("%v: no volume %s", at(c, "name"), volume)
		}
		paths[at(m, "mountPath")] = at(spec, "volumes", volume, "hostPath", "path")
	}
	// Below /sys the AppArmor profile of containers lets nobody write.
	if got := paths["/bpf"]; got != "/sys/fs/bpf" {
		t.Errorf("%v: /bpf is %v of the node", at(c, "name"), got)
	}
	if args := list(at(c, "args")); !slices.Contains(args, any("--bpffs")) || args[slices.Index(args, any("--bpffs"))+1] != "/bpf" {
		t.Errorf("%v: its pins are not in /bpf: %v", at(c, "name"), args)
	}
	for _, want := range []string{"/run/pillion", "/etc/pillion"} {
		if from, ok := paths[want]; !ok || from != nil {
			t.Errorf("%v: %s is mounted: %v, of the node: %v", at(c, "name"), want, ok, from)
		}
	}
}

// TestComponent wants the component to add what the pod has.
func TestComponent(t *testing.T) {
	docs := documents(t, "kubernetes/sidecar.yaml")
	pod := podOf(docs[len(docs)-1])
	patch := podOf(documents(t, "kubernetes/component/sidecar.yaml")[0])
	for _, key := range []string{"initContainers", "volumes"} {
		if d := cmp.Diff(at(pod, key), at(patch, key)); d != "" {
			t.Errorf("%s (-sidecar.yaml +component):\n%s", key, d)
		}
	}
	k := documents(t, "kubernetes/component/kustomization.yaml")[0]
	if k["kind"] != "Component" || k["apiVersion"] != "kustomize.config.k8s.io/v1alpha1" {
		t.Errorf("it is a %v of %v", k["kind"], k["apiVersion"])
	}
	for _, p := range list(k["patches"]) {
		if _, err := os.Stat(filepath.Join(dir, "kubernetes/component", fmt.Sprint(at(p, "path")))); err != nil {
			t.Error(err)
		}
	}
	generator := list(k["configMapGenerator"])[0]
	if name := at(patch, "volumes", "pillion-config", "configMap", "name"); at(generator, "name") != name {
		t.Errorf("the ConfigMap is %v, and %v is mounted", at(generator, "name"), name)
	}
}

func TestPodman(t *testing.T) {
	docs := documents(t, "podman/pillion.kube.yaml")
	pod := docs[len(docs)-1]
	if got := at(pod, "spec", "restartPolicy"); got != "Never" && got != "OnFailure" {
		t.Errorf("restartPolicy %v: podman restarts the init container for ever", got)
	}
	for _, name := range []string{"pillion-init", "pillion"} {
		key := "container.seccomp.security.alpha.kubernetes.io/" + name
		if got := at(pod, "metadata", "annotations", key); got != "unconfined" {
			t.Errorf("%s: %v, but podman's profile forbids bpf()", key, got)
		}
	}
	if c := at(pod, "spec", "initContainers"); len(list(c)) != 1 {
		t.Errorf("%d init containers: podman has no native sidecars", len(list(c)))
	}
	if strings.Contains(fmt.Sprint(pod), "Probe") {
		t.Error("podman refuses probes of init containers, and runs others by systemd's timers alone")
	}
}

// TestDiscoveryRights has the shipped rights be those of the document, which
// tests/kubernetes tries on a real API server.
func TestDiscoveryRights(t *testing.T) {
	doc, err := os.ReadFile("../../docs/discovery-kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, _ := strings.Cut(string(doc), "\nkind: ClusterRole\n")
	block, _, found := strings.Cut(block, "\n---\n")
	var documented object
	if err := yaml.Unmarshal([]byte(block), &documented); err != nil || !found {
		t.Fatalf("no ClusterRole in the document: %v", err)
	}
	for _, o := range documents(t, "kubernetes/discovery.yaml") {
		if o["kind"] != "ClusterRole" {
			continue
		}
		if d := cmp.Diff(documented["rules"], o["rules"]); d != "" || len(list(o["rules"])) == 0 {
			t.Errorf("rules (-documented +shipped):\n%s", d)
		}
		return
	}
	t.Error("no ClusterRole is shipped")
}
