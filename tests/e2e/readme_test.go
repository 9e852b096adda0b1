package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// TestQuickStart does what the README tells a newcomer to do, word for word.
func TestQuickStart(t *testing.T) {
	t.Parallel()
	testutil.RequireRoot(t)
	testutil.Need(t, "curl", "python3", "sh")
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(readme), "```sh\n")
	script, _, closed := strings.Cut(rest, "```")
	if !found || !closed {
		t.Fatal("the README has no quick start")
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "build"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(rig.Binary(t), filepath.Join(dir, "build", "pillion")); err != nil {
		t.Fatal(err)
	}
	// The binary is built, and we are root.
	script = "set -e\nmake() { :; }\nsudo() { \"$@\"; }\n" + script
	// The test's own places, so that several can run at once.
	script = strings.NewReplacer("/tmp/pillion-site", filepath.Join(dir, "site"),
		// A busy machine takes longer to start a server.
		"sleep 1\n", "until curl -s http://127.0.0.1:18081/ >/dev/null; do sleep 0.1; done\n",
		"build/pillion exec", "build/pillion --runtime-dir "+dir+"/run exec",
		"build/pillion flows", "build/pillion --runtime-dir "+dir+"/run flows").Replace(script)
	cmd := exec.Command("sh", "-c", script)
	cmd.Dir = dir
	ns := testutil.NewNS(t)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := ns.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	for _, want := range []string{"hello\n", "ASKED FOR", "10.96.0.12:80", "127.0.0.1:18081", "relay"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("output lacks %q:\n%s", want, out.String())
		}
	}
}
