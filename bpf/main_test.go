package bpf

import (
	"os"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/testutil"
)

func TestMain(m *testing.M) {
	if addrs := os.Getenv(envDial); addrs != "" {
		dialAll(addrs)
		return
	}
	if source, addr, ok := strings.Cut(os.Getenv(envHold), " "); ok {
		hold(source, addr)
		return
	}
	testutil.Main(m)
}
