package suites

import (
	"bufio"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// redisTool runs a client of Redis as an application.
func redisTool(t testing.TB, r *rig.Rig, at netip.AddrPort, stdin, name string, args ...string) string {
	t.Helper()
	return app(t, r, stdin, name, append([]string{"-h", at.Addr().String(), "-p", fmt.Sprint(at.Port())}, args...)...)
}

var (
	// A test's name, before its rate.
	redisRate = regexp.MustCompile(`(?m)([^\r\n:]+(?: \([^)]*\))?): (?:[0-9.]+|inf) requests per second`) // inf: it took no millisecond
	// How often the server ran a command, and how often that failed.
	redisCalls = regexp.MustCompile(`(?m)^cmdstat_(\S+?):calls=(\d+),.*rejected_calls=(\d+),failed_calls=(\d+)`)
)

// TestRedis runs every test of redis-benchmark, with and without pipelining, and
// has the server tell what it was asked for.
func TestRedis(t *testing.T) {
	testutil.Need(t, "redis-server", "redis-cli", "redis-benchmark")
	r := rig.New(t)
	ats := []netip.AddrPort{at4(6379), at6(6379)}
	r.Redis(t, ats...)
	requests := amount(800, 8000)
	runs := ats[:amount(1, 2)]
	twice(t, r, 2*50*len(runs), func(t testing.TB) (all []string) {
		for _, at := range runs {
			for _, pipeline := range []string{"1", "16"} {
				redisTool(t, r, at, "", "redis-cli", "FLUSHALL")
				redisTool(t, r, at, "", "redis-cli", "CONFIG", "RESETSTAT")
				out := redisTool(t, r, at, "", "redis-benchmark", "-q", "-n", fmt.Sprint(requests), "-P", pipeline, "-c", "50", "-d", "300")
				rates := redisRate.FindAllStringSubmatch(out, -1)
				if len(rates) < 15 || strings.Contains(strings.ToLower(out), "error") {
					t.Errorf("redis-benchmark: %s", out)
				}
				for _, m := range rates {
					all = append(all, "test "+strings.TrimSpace(m[1]))
				}
				calls := redisCalls.FindAllStringSubmatch(redisTool(t, r, at, "", "redis-cli", "INFO", "commandstats"), -1)
				if len(calls) < 10 {
					t.Errorf("the server counts %d commands", len(calls))
				}
				for _, m := range calls {
					all = append(all, fmt.Sprintf("%s: %s calls, %s rejected, %s failed", m[1], m[2], m[3], m[4]))
				}
				all = append(all, "keys: "+redisTool(t, r, at, "", "redis-cli", "DBSIZE"), "list: "+redisTool(t, r, at, "", "redis-cli", "LLEN", "mylist"))
			}
		}
		slices.Sort(all)
		return all
	})
}

// TestRedisPipe loads commands in bulk, which the client ends with a command of
// its own to know that everything was read.
func TestRedisPipe(t *testing.T) {
	testutil.Need(t, "redis-server", "redis-cli")
	r := rig.New(t)
	at := at4(6379)
	r.Redis(t, at)
	count := amount(100_000, 1_000_000)
	var load strings.Builder
	for i := range count {
		key, value := fmt.Sprintf("key:%d", i), strings.Repeat("v", i%100)
		fmt.Fprintf(&load, "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n", len(key), key, len(value), value)
	}
	twice(t, r, 2, func(t testing.TB) []string {
		redisTool(t, r, at, "", "redis-cli", "FLUSHALL")
		out := redisTool(t, r, at, load.String(), "redis-cli", "--pipe")
		if want := fmt.Sprintf("errors: 0, replies: %d", count); !strings.Contains(out, want) {
			t.Errorf("redis-cli --pipe does not say %q: %s", want, out)
		}
		return []string{out, redisTool(t, r, at, "", "redis-cli", "DBSIZE"), redisTool(t, r, at, "", "redis-cli", "DEBUG", "DIGEST")}
	})
}

// TestRedisPubSub has two clients listen for what a third one says.
func TestRedisPubSub(t *testing.T) {
	testutil.Need(t, "redis-server", "redis-cli")
	r := rig.New(t)
	ats := []netip.AddrPort{at4(6379), at6(6379)}
	r.Redis(t, ats...)
	count := amount(2000, 50_000)
	var say strings.Builder
	for i := range count {
		fmt.Fprintf(&say, "PUBLISH news \"message %d %s\"\n", i, strings.Repeat("x", i%50))
	}
	twice(t, r, 3, func(t testing.TB) (all []string) {
		var ears []*bufio.Scanner
		for _, at := range ats {
			cmd := r.Command("redis-cli", "-h", at.Addr().String(), "-p", fmt.Sprint(at.Port()), "SUBSCRIBE", "news")
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Start(cmd); err != nil {
				t.Fatal(err)
			}
			late := time.AfterFunc(appLimit, func() { cmd.Process.Kill() })
			// Both plays end their own, so that the second finds none.
			defer cmd.Wait()
			defer cmd.Process.Kill()
			defer late.Stop()
			ear := bufio.NewScanner(out)
			all = append(all, hear(t, ear, 3)...)
			ears = append(ears, ear)
		}
		// Each is answered with the number of those who heard it.
		all = append(all, strings.Fields(redisTool(t, r, ats[0], say.String(), "redis-cli"))...)
		if len(all) != 6+count {
			t.Errorf("%d answers to %d messages", len(all)-6, count)
		}
		for _, ear := range ears {
			all = append(all, hear(t, ear, 3*count)...)
		}
		return all
	})
}

// hear returns the next lines of a program's output.
func hear(t testing.TB, from *bufio.Scanner, lines int) (all []string) {
	t.Helper()
	for range lines {
		if !from.Scan() {
			t.Fatalf("the program ended after %d of %d lines: %v", len(all), lines, from.Err())
		}
		all = append(all, from.Text())
	}
	return all
}
