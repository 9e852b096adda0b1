package testutil

import (
	"os"
	"os/exec"
	"testing"
)

// The environment that decides whether a test may skip.
const (
	// envRequireRoot is set to 1 where a test that skips would hide a
	// failure, as in CI.
	envRequireRoot = "PILLION_REQUIRE_ROOT"
	// envVM is set to 1 inside the virtual machine of scripts/vm-test.sh,
	// which holds static binaries only.
	envVM = "PILLION_VM"
)

// RequireRoot skips the test when it does not run as root, and fails it when
// PILLION_REQUIRE_ROOT=1 says that it must.
func RequireRoot(t testing.TB) {
	t.Helper()
	if uid := os.Geteuid(); uid != 0 {
		missing(t, "needs root, runs as uid %d", uid)
	}
}

// Need skips the test when one of the programs is not in PATH, and fails it
// when PILLION_REQUIRE_ROOT=1: scripts/setup.sh installs them all. The virtual
// machine has none of them, so there it always skips.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	for _, name := range programs {
		if _, err := exec.LookPath(name); err != nil {
			if InVM() {
				t.Skipf("needs %s, which the virtual machine does not have", name)
			}
			missing(t, "needs %s (scripts/setup.sh test installs it): %v", name, err)
		}
	}
}

// InVM tells whether the test runs in the virtual machine of
// scripts/vm-test.sh: an emulated processor some 20 times slower than this
// one, with an old kernel.
func InVM() bool { return os.Getenv(envVM) == "1" }

func missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv(envRequireRoot) == "1" {
		t.Fatalf(format+" ("+envRequireRoot+"=1 forbids to skip)", args...)
	}
	t.Skipf(format, args...)
}
