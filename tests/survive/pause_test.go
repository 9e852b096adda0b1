package survive

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/rig/app"
	"golang.org/x/sys/unix"
)

// pauses is how many deaths TestPause measures.
var pauses = flag.Int("pauses", 4, "deaths that TestPause measures")

// pauseConns is how many connections it has.
const pauseConns = 50

// TestPause measures how long connections stand still when their handler is killed, as
// they see it. The machine is not its own, so of that it asserts nothing, but for what the
// pause was made of: the programs that were loaded are those of the first handler still.
func TestPause(t *testing.T) {
	r := rig.New(t)
	r.Serve(t, ends[0], app.NewServer("").Serve)
	s := &stage{Rig: r}
	s.Instance = s.Run(t, fmt.Sprintf("survive: crash\nservices:\n  - name: s\n    address: %q\n    endpoints: [%q]\nflow_log: %q\n",
		vip, ends[0], filepath.Join(t.TempDir(), "flows")))
	s.Application = app.Start(t, r)
	s.Load(t, app.Load{To: []netip.AddrPort{vip}, Stay: pauseConns, Kinds: []app.Kind{app.Echo}, Every: 5 * time.Millisecond, Longest: 64})
	ask := func() []time.Duration {
		t.Helper()
		o := s.Turn(t)
		o.Check(t)
		return o.Slowest
	}
	var all, quiet []time.Duration
	loaded := s.programs(t)
	for range *pauses {
		s.ready(t)
		time.Sleep(300 * time.Millisecond)
		ask()
		time.Sleep(300 * time.Millisecond)
		quiet = append(quiet, ask()...)
		w := s.worker()
		if w == 0 { // kill(2) would take it for everybody
			t.Fatalf("there is no worker\n%s", s.Log())
		}
		if err := unix.Kill(w, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		s.ready(t)
		all = append(all, ask()...)
		if now := s.programs(t); len(now) == 0 || !slices.Equal(now, loaded) {
			t.Errorf("the programs %v are now %v", loaded, now)
		}
	}
	own := regexp.MustCompile(`pause=(\S+)`).FindAllStringSubmatch(s.Log(), -1)
	if len(own) != *pauses || len(all) != *pauses*pauseConns {
		t.Fatalf("%d pauses on record, and %d of connections, want %d and %d\n%s", len(own), len(all), *pauses, *pauses*pauseConns, s.Log())
	}

	t.Logf("%d deaths under %d connections: the slowest answer of each p50 %v, p99 %v; in 300 ms without a death p50 %v, p99 %v; the handler says %v",
		*pauses, pauseConns, at(all, 50), at(all, 99), at(quiet, 50), at(quiet, 99), own)
}

// programs are the numbers of the BPF programs that the worker has.
func (s *stage) programs(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", s.worker()))
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, f := range files {
		text, _ := os.ReadFile(f) // it may be closed by now
		if strings.Contains(string(text), "prog_type:") {
			all = append(all, regexp.MustCompile(`prog_id:\s*\d+`).FindString(string(text)))
		}
	}
	slices.Sort(all)
	return all
}

// at is a percentile.
func at(all []time.Duration, percent int) time.Duration {
	slices.Sort(all)
	return all[min(len(all)*percent/100, len(all)-1)]
}
