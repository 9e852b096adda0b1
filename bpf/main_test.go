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
	if steps := os.Getenv(envSteps); steps != "" {
		takeSteps(steps)
		return
	}
	if to := strings.Fields(os.Getenv(envNames)); len(to) == 3 {
		askNames(to[0], to[1], to[2])
		return
	}
	if to := os.Getenv(envRace); to != "" {
		raceAll(to)
		return
	}
	testutil.Main(m)
}
