package testutil

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// buildsVM is where scripts/vm-test.sh leaves, in its virtual machine, the programs
// that tests build.
const buildsVM = "/builds"

// Prebuilt returns the path of what scripts/vm-test.sh has built by a name, in its
// virtual machine.
func Prebuilt(name string) (path string, ok bool) {
	return filepath.Join(buildsVM, name), InVM()
}

// Build compiles a program of this tree, statically, and returns its path. args are
// those of go build: its flags and the package. The virtual machine of
// scripts/vm-test.sh has no compiler: there it is what the script has built by the
// same name.
func Build(t testing.TB, name string, args ...string) string {
	t.Helper()
	if path, ok := Prebuilt(name); ok {
		if _, err := os.Stat(path); err != nil {
			t.Fatalf("scripts/vm-test.sh has not built it: %v", err)
		}
		return path
	}
	path := filepath.Join(t.TempDir(), name)
	cmd := exec.Command("go", append([]string{"build", "-o", path}, args...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", name, err, out)
	}
	return path
}
