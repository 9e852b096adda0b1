package suites

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// appLimit is how long a program may run.
var appLimit = time.Duration(amount(2, 15)) * time.Minute

func at4(port uint16) netip.AddrPort { return netip.AddrPortFrom(rig.Far4, port) }
func at6(port uint16) netip.AddrPort { return netip.AddrPortFrom(rig.Far6, port) }

// number is one that is printed as it is then.
type number int

func (n *number) String() string { return strconv.Itoa(int(*n)) }

// app runs a program as an application and returns what it wrote to stdout. It
// must succeed.
func app(t testing.TB, r *rig.Rig, stdin, name string, args ...string) string {
	t.Helper()
	out, err := r.Feed(appLimit, stdin, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// beside is an instance that keeps a record of every connection.
type beside struct {
	*rig.Instance
	log string
}

// ride starts Pillion beside the applications of a world whose servers are
// there. It must be as quiet at the end as at the start.
func ride(t testing.TB, r *rig.Rig) *beside {
	t.Helper()
	b := &beside{log: filepath.Join(t.TempDir(), "flows.jsonl")}
	b.Instance = r.Run(t, "flow_log: "+b.log)
	b.NoLeaks(t)
	return b
}

// twice runs what a suite's programs do, with nobody beside them and then with
// Pillion, in one world. What they find must be the same, line by line, and at
// least so many connections must have been relayed, and no other seen.
func twice(t *testing.T, r *rig.Rig, atLeast int, play func(t testing.TB) []string) {
	t.Helper()
	direct := play(t)
	if t.Failed() {
		t.Fatal("it fails with nobody beside it")
	}
	b := ride(t, r)
	relayed := play(t)
	if diff := cmp.Diff(direct, relayed); diff != "" {
		t.Errorf("with Pillion it differs (- without, + with):\n%s", diff)
	}
	b.proof(t, atLeast)
	t.Logf("%d findings, with and without", len(relayed))
}

// proof waits until every connection has ended, and fails the test unless the
// records show at least so many, all of them relayed and known to the handler.
func (b *beside) proof(t testing.TB, atLeast int) {
	t.Helper()
	b.Idle(t)
	var sum number
	testutil.Eventually(t, rig.Limit, func() bool {
		sum = 0
		for _, total := range b.Totals(t) {
			sum += number(total.Count)
		}
		return int(sum) >= atLeast
	}, "ended connections: want ", atLeast, ", have ", &sum)
	// What goes to loopback is never captured: no server of ours is there.
	relayed := slices.DeleteFunc(b.records(t, int(sum)), func(rec flow.Record) bool { return rec.Reason == flow.ReasonLoopback })
	rig.Relayed(t, relayed)
	ends := map[flow.Reason]int{}
	for _, rec := range relayed {
		ends[rec.End]++
		if rec.End == flow.ReasonHandlerLost {
			t.Errorf("the handler knows nothing of a connection: %+v", rec)
		}
	}
	if len(relayed) < atLeast {
		t.Errorf("%d connections were relayed, want %d", len(relayed), atLeast)
	}
	t.Logf("%d connections, all relayed: %v", len(relayed), ends)
}

// records returns the records of at least n connections, once they are written.
func (b *beside) records(t testing.TB, n int) (all []flow.Record) {
	t.Helper()
	var have number
	testutil.Eventually(t, rig.Limit, func() bool {
		var err error
		if all, err = readRecords(b.log); err != nil {
			t.Fatal(err)
		}
		have = number(len(all))
		return len(all) >= n
	}, "records in the flow log: want ", n, ", have ", &have)
	return all
}

func readRecords(path string) (all []flow.Record, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	in := bufio.NewReader(f)
	for {
		line, err := in.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return all, nil // a line that has no end is being written
		}
		if err != nil {
			return nil, err
		}
		var rec flow.Record
		if err := json.Unmarshal(line, &rec); err != nil {
			return nil, fmt.Errorf("flow log: %q: %w", line, err)
		}
		all = append(all, rec)
	}
}
