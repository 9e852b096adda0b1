package bpf

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/tests/testutil"
)

// envLimited is set in the process that TestCapabilities starts.
const envLimited = "PILLION_TEST_LIMITED"

// TestCapabilities loads every program with the two capabilities that the
// always-on programs may ask for. Without CAP_PERFMON the verifier also minds
// what the processor may speculate, and refuses more.
func TestCapabilities(t *testing.T) {
	if os.Getenv(envLimited) != "" {
		loadAll(t, nil)
		loadFormerAll(t, 32)
		return
	}
	testutil.RequireRoot(t)
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestCapabilities$", "-test.v")
	cmd.Env = append(os.Environ(), envLimited+"=1")
	var log strings.Builder
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := (testutil.Place{}).With(unix.CAP_BPF, unix.CAP_NET_ADMIN).Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("with CAP_BPF and CAP_NET_ADMIN only: %v\n%s", err, log.String())
	}
}
