package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// store is one of podman's, and goes with the test.
type store struct{ dir string }

// newStore skips the test where podman cannot be used.
func newStore(t *testing.T) *store {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("this podman is run as root")
	}
	for _, name := range []string{"podman", "runc"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("%s is not installed (scripts/setup.sh image)", name)
		}
	}
	s := &store{dir: t.TempDir()}
	s.infra(t, "")
	t.Cleanup(func() {
		if out, err := s.run("system", "reset", "--force").CombinedOutput(); err != nil {
			t.Logf("podman system reset: %v\n%s", err, out)
		}
	})
	return s
}

func (s *store) conf() string { return filepath.Join(s.dir, "containers.conf") }

// infra makes an image that of the containers which hold a pod's namespaces.
func (s *store) infra(t *testing.T, image string) {
	t.Helper()
	text := "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\npids_limit = 0\n[engine]\nevents_logger = \"file\"\n"
	if image != "" {
		text += fmt.Sprintf("infra_image = %q\n", image)
	}
	if err := os.WriteFile(s.conf(), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (s *store) run(args ...string) *exec.Cmd {
	global := []string{
		"--root", filepath.Join(s.dir, "root"), "--runroot", filepath.Join(s.dir, "run"), "--tmpdir", filepath.Join(s.dir, "tmp"),
		"--cgroup-manager", "cgroupfs", "--runtime", "runc", "--storage-driver", "vfs",
	}
	cmd := exec.Command("podman", append(global, args...)...)
	cmd.Env = append(os.Environ(), "CONTAINERS_CONF="+s.conf())
	return cmd
}

// load loads an archive, and returns the image's name.
func (s *store) load(t *testing.T, archive string) string {
	t.Helper()
	out, err := s.run("load", "--quiet", "--input", archive).CombinedOutput()
	if err != nil {
		t.Fatalf("podman load: %v\n%s", err, out)
	}
	_, image, ok := strings.Cut(strings.TrimSpace(string(out)), "Loaded image: ")
	if !ok {
		t.Fatalf("podman load says %q", out)
	}
	return image
}
