package cluster

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
)

// TestComponent has kubectl's Kustomize build what the component says of itself: it adds
// Pillion to every Deployment, before other init containers, and a ConfigMap that is
// a patch takes the place of its configuration. It needs no cluster.
func TestComponent(t *testing.T) {
	bin := os.Getenv(envNode)
	if bin == "" {
		t.Skip("needs kubectl: make test-cluster")
	}
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "component"), os.DirFS("../../deploy/kubernetes/component")); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"kustomization.yaml": "resources: [one.yaml, two.yaml]\ncomponents: [component]\npatches: [{path: configuration.yaml}]\n",
		"one.yaml": "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: one}\nspec:\n  template:\n    spec:\n" +
			"      initContainers: [{name: migrate}]\n      containers: [{name: app}]\n      volumes: [{name: data}]\n",
		"two.yaml":           "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: two}\nspec:\n  template:\n    spec:\n      containers: [{name: app}]\n",
		"configuration.yaml": "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: pillion}\ndata: {pillion.yaml: \"default: pass\"}\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var said strings.Builder
	cmd := exec.Command(bin, "kubectl", "kustomize", dir)
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("kustomize: %v\n%s", err, said.String())
	}
	type names []struct{ Name string }
	type object struct {
		Kind     string
		Metadata struct{ Name string }
		Data     map[string]string
		Spec     struct {
			Template struct {
				Spec struct {
					InitContainers names `yaml:"initContainers"`
					Containers     names
					Volumes        names
				}
			}
		}
	}
	list := func(all names) (s []string) {
		for _, e := range all {
			s = append(s, e.Name)
		}
		return s
	}
	got := map[string][][]string{}
	for _, text := range strings.Split(string(out), "\n---\n") {
		var o object
		if err := yaml.Unmarshal([]byte(text), &o); err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		if o.Kind == "ConfigMap" {
			got["ConfigMap "+o.Metadata.Name] = [][]string{{o.Data["pillion.yaml"]}}
			continue
		}
		spec := &o.Spec.Template.Spec
		got[o.Kind+" "+o.Metadata.Name] = [][]string{list(spec.InitContainers), list(spec.Containers), list(spec.Volumes)}
	}
	want := map[string][][]string{
		"ConfigMap pillion": {{"default: pass"}},
		"Deployment one":    {{"pillion-init", "pillion", "migrate"}, {"app"}, {"pillion-bpf", "pillion-run", "pillion-config", "data"}},
		"Deployment two":    {{"pillion-init", "pillion"}, {"app"}, {"pillion-bpf", "pillion-run", "pillion-config"}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s\n%s", d, out)
	}
}
