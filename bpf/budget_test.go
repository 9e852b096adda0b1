package bpf

import (
	"testing"

	"github.com/cilium/ebpf"

	"github.com/pillion-project/pillion/tests/testutil"
)

// budget is how many instructions the verifier may walk for each program: some
// 30 % above what it does on 6.1 or 6.18, whichever walks more. It is what loading
// costs, and a sign of what running costs: who raises it says why in the commit.
var budget = map[string]uint32{
	ProgConnect4:     21000,
	ProgConnect6:     21000,
	ProgGetpeername4: 1100, // MPTCP: by up to four rows, by the first subflow, or by what is left of it
	ProgGetpeername6: 4200,
	ProgGetsockname4: 220,
	ProgGetsockname6: 280,
	ProgBind4:        170,
	ProgBind6:        190,
	ProgRelease:      660,
	ProgSockops:      24500, // the options that the upstream leg is to have; a decision in either place; the ways of a bucket
	ProgLookup:       1600,  // twice: a dry run may look too
	ProgHold:         1500,
	ProgInject:       20,
	ProgExplain:      13000,
	ProgMove:         620,
	ProgMoveLive:     200,
	ProgAdd:          60,
	ProgAddUsage:     80,
}

func TestBudget(t *testing.T) {
	testutil.CheckLeaks(t)
	progs, _ := loadAll(t, nil)
	for name := range programs {
		n := verified(t, progs[name])
		t.Logf("%s: %d of %d verified instructions", name, n, budget[name])
		if n > budget[name] {
			t.Errorf("%s: the verifier walks %d instructions, the budget is %d", name, n, budget[name])
		}
	}
}

func verified(t *testing.T, p *ebpf.Program) uint32 {
	t.Helper()
	info, err := p.Info()
	if err != nil {
		t.Fatalf("read info: %v", err)
	}
	n, ok := info.VerifiedInstructions()
	if !ok {
		t.Fatal("the kernel does not tell the number of verified instructions")
	}
	return n
}
