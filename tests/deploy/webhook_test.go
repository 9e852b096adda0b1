package deploy

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/cmd/pillion/inject"
	"github.com/pillion-project/pillion/cmd/pillion/webhook"
)

// TestInject wants the manifests to be what pillion inject would make of them: so
// it changes nothing.
func TestInject(t *testing.T) {
	for _, tt := range pods {
		if tt.podman || strings.Contains(tt.file, "component") {
			continue
		}
		o := inject.Options{
			Image: "ghcr.io/pillion-project/pillion:devel", Version: "devel", ConfigMap: "pillion", Form: inject.Container,
		}
		if tt.native {
			o.Form = inject.Sidecar
		}
		in, err := os.ReadFile(filepath.Join(dir, tt.file))
		if err != nil {
			t.Fatal(err)
		}
		out, results, err := o.Manifest(in)
		if err != nil || len(results) != 1 {
			t.Fatalf("%s: %d workloads: %v", tt.file, len(results), err)
		}
		if d := cmp.Diff(string(in), string(out)); d != "" {
			t.Errorf("%s (-it is +inject makes it):\n%s", tt.file, d)
		}
	}
}

// TestWebhook wants the names in the webhook's manifest to lead to each other.
func TestWebhook(t *testing.T) {
	byKind := make(map[string]object)
	for _, o := range documents(t, "kubernetes/webhook.yaml") {
		byKind[fmt.Sprint(o["kind"])] = o
	}
	deployment, service := byKind["Deployment"], byKind["Service"]
	hook := list(byKind["MutatingWebhookConfiguration"]["webhooks"])[0]
	client := at(hook, "clientConfig", "service")
	for what, pair := range map[string][2]any{
		"service":    {at(client, "name"), at(service, "metadata", "name")},
		"namespace":  {at(client, "namespace"), at(service, "metadata", "namespace")},
		"its own":    {at(deployment, "metadata", "namespace"), at(byKind["Namespace"], "metadata", "name")},
		"path":       {at(client, "path"), webhook.Path},
		"selector":   {at(service, "spec", "selector"), at(deployment, "spec", "template", "metadata", "labels")},
		"account":    {at(deployment, "spec", "template", "spec", "serviceAccountName"), at(byKind["ServiceAccount"], "metadata", "name")},
		"budget":     {at(byKind["PodDisruptionBudget"], "spec", "selector"), at(deployment, "spec", "selector")},
		"opt-in":     {at(hook, "namespaceSelector", "matchLabels", inject.Inject), "enabled"},
		"versions":   {at(hook, "admissionReviewVersions"), []any{"v1"}},
		"sideEffect": {at(hook, "sideEffects"), "None"},
	} {
		if d := cmp.Diff(pair[0], pair[1]); d != "" {
			t.Errorf("%s:\n%s", what, d)
		}
	}
	c := at(podOf(deployment), "containers", "webhook")
	want := object{
		"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
		"capabilities": object{"drop": []any{"ALL"}},
	}
	if d := cmp.Diff(want, at(c, "securityContext")); d != "" {
		t.Errorf("it needs no privilege (-want +got):\n%s", d)
	}
	if got := at(podOf(deployment), "securityContext", "runAsNonRoot"); got != true {
		t.Errorf("runAsNonRoot %v", got)
	}
	if got := at(hook, "namespaceSelector", "matchExpressions"); !strings.Contains(fmt.Sprint(got), "pillion-system") {
		t.Errorf("its own pods wait for itself: %v", got)
	}
}
