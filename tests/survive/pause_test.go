package survive

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"golang.org/x/sys/unix"
)

// pauses is how many deaths TestPause measures.
var pauses = flag.Int("pauses", 4, "deaths that TestPause measures")

// envPause makes this test binary the application of TestPause.
const envPause = "PILLION_TEST_SURVIVE_PAUSE"

// pauseConns is how many connections it has.
const pauseConns = 50

// TestPause measures how long connections stand still when their handler is killed, as
// they see it. The machine is not its own, so of that it asserts nothing, but for what the
// pause was made of: the programs that were loaded are those of the first handler still.
func TestPause(t *testing.T) {
	r := rig.New(t)
	r.Serve(t, ends[0], func(c net.Conn) { io.Copy(c, c) })
	s := &stage{Rig: r}
	s.Instance = s.Run(t, fmt.Sprintf("survive: crash\nservices:\n  - name: s\n    address: %q\n    endpoints: [%q]\nflow_log: %q\n",
		vip, ends[0], filepath.Join(t.TempDir(), "flows")))
	cmd := r.Command(os.Args[0], "-test.run=^TestPauses$")
	cmd.Env = append(os.Environ(), envPause+"="+vip.String())
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Start(cmd); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	answers := json.NewDecoder(out)
	ask := func() (gaps []time.Duration) {
		t.Helper()
		if _, err := fmt.Fprintln(in, "next"); err != nil {
			t.Fatal(err)
		}
		if err := answers.Decode(&gaps); err != nil {
			t.Fatalf("the application: %v", err)
		}
		return gaps
	}
	var all, quiet []time.Duration
	loaded := s.programs(t)
	for range *pauses {
		s.ready(t)
		time.Sleep(300 * time.Millisecond)
		ask()
		time.Sleep(300 * time.Millisecond)
		quiet = append(quiet, ask()...)
		if err := unix.Kill(s.worker(), unix.SIGKILL); err != nil {
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

// TestPauses is the application of TestPause: for each line that it reads, it writes the
// slowest answer of each connection since the last one. As a test it does nothing.
func TestPauses(*testing.T) {
	to := os.Getenv(envPause)
	if to == "" {
		return
	}
	var mu sync.Mutex
	slowest := make([]time.Duration, pauseConns)
	for n := range pauseConns {
		c, err := net.Dial("tcp", to)
		if err != nil {
			panic(err)
		}
		go func() {
			b := make([]byte, 64)
			for {
				time.Sleep(5 * time.Millisecond)
				sent := time.Now()
				if _, err := c.Write(b); err != nil {
					panic(err)
				}
				if _, err := io.ReadFull(c, b); err != nil {
					panic(err)
				}
				mu.Lock()
				slowest[n] = max(slowest[n], time.Since(sent))
				mu.Unlock()
			}
		}()
	}
	answers := json.NewEncoder(os.Stdout)
	for {
		var word string
		if _, err := fmt.Scanln(&word); err != nil {
			os.Exit(0)
		}
		mu.Lock()
		answers.Encode(slowest)
		clear(slowest)
		mu.Unlock()
	}
}
