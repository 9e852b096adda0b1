package bpf

import (
	"os"
	"testing"

	"github.com/pillion-project/pillion/tests/testutil"
)

func TestMain(m *testing.M) {
	if addrs := os.Getenv(envDial); addrs != "" {
		dialAll(addrs)
		return
	}
	testutil.Main(m)
}
