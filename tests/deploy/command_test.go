package deploy

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
)

// TestCommand runs inject and webhook as a user does: what they write where, and
// with which exit code they end.
func TestCommand(t *testing.T) {
	sidecar := filepath.Join(dir, "kubernetes/sidecar.yaml")
	const pod = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\nspec:\n  containers:\n  - name: a\n"
	for _, tt := range []struct {
		name, stdin, stdout, stderr string // the last two: something that is in it
		args                        []string
		code                        int
	}{
		{"standard input", pod, "- name: pillion-init", "Pod a injected", []string{"inject", "-f", "-"}, 0},
		{"an image", pod, "image: here/pillion:3", "Pod a injected", []string{"inject", "-f", "-", "--image", "here/pillion:3"}, 0},
		{"refused", strings.Replace(pod, "spec:", "spec:\n  hostNetwork: true", 1), "", "hostNetwork", []string{"inject", "-f", "-"}, 64},
		{"nothing to do", "kind: Service\napiVersion: v1\n", "kind: Service", "no workload", []string{"inject", "-f", "-"}, 0},
		{"no file", "", "", "which manifest", []string{"inject"}, 64},
		{"a file that is not there", "", "", "no such file", []string{"inject", "-f", filepath.Join(t.TempDir(), "none")}, 64},
		{"no such form", pod, "", "want sidecar or container", []string{"inject", "-f", sidecar, "--form", "x"}, 64},
		{"a webhook without a certificate", "", "", "--cert", []string{"webhook"}, 64},
		{"a certificate that is not there", "", "", "no such file", []string{"webhook", "--cert", "/none", "--key", "/none"}, 64},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cmd := exec.Command(rig.Binary(t), tt.args...)
			var stdout, stderr bytes.Buffer
			cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(tt.stdin), &stdout, &stderr
			err := cmd.Run()
			if code := cmd.ProcessState.ExitCode(); code != tt.code {
				t.Errorf("exit code %d, want %d: %v", code, tt.code, err)
			}
			if !strings.Contains(stdout.String(), tt.stdout) || tt.stdout == "" && stdout.Len() > 0 {
				t.Errorf("it writes, want %q:\n%s", tt.stdout, stdout.String())
			}
			if !strings.Contains(stderr.String(), tt.stderr) {
				t.Errorf("it says, want %q:\n%s", tt.stderr, stderr.String())
			}
		})
	}
}
