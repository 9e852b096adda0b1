package e2e

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// redisCLI runs redis-cli as an application.
func redisCLI(t testing.TB, r *rig.Rig, stdin string, at netip.AddrPort, args ...string) string {
	t.Helper()
	return runApp(t, r, stdin, "redis-cli", append([]string{"-h", at.Addr().String(), "-p", strconv.Itoa(int(at.Port()))}, args...)...)
}

// redisBenchmark runs redis-benchmark as an application.
func redisBenchmark(t testing.TB, r *rig.Rig, at netip.AddrPort, args ...string) {
	t.Helper()
	out := runApp(t, r, "", "redis-benchmark", append([]string{"-q", "-h", at.Addr().String(), "-p", strconv.Itoa(int(at.Port()))}, args...)...)
	if !strings.Contains(out, "requests per second") || strings.Contains(strings.ToLower(out), "error") {
		t.Errorf("redis-benchmark: %s", out)
	}
}

// counter is the key that redis-benchmark increments when it draws no keys.
const counter = "counter:__rand_int__"

func TestRedis(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "redis-server", "redis-cli", "redis-benchmark")
	r := rig.New(t)
	r.Redis(t, at4(6379), at6(6379))
	s := play(t, r, "")
	for _, at := range []netip.AddrPort{at4(6379), at6(6379)} {
		same(t, "PING", redisCLI(t, r, "", at, "PING"), "PONG")
		// A value of 8 MiB there and back.
		value := strings.Repeat("pillion ", 1<<20)
		same(t, "SET", redisCLI(t, r, value, at, "-x", "SET", "big"), "OK")
		if got := redisCLI(t, r, "", at, "--raw", "GET", "big"); strings.TrimSuffix(got, "\n") != value {
			t.Errorf("GET: %d bytes that differ", len(got))
		}
		redisCLI(t, r, "", at, "DEL", counter)
		redisBenchmark(t, r, at, "-n", "10000", "-c", "50", "-t", "incr")
		redisBenchmark(t, r, at, "-n", "20000", "-c", "10", "-P", "16", "-t", "incr")
		same(t, "counter", redisCLI(t, r, "", at, "GET", counter), "30000")
	}
	// A connection for each request.
	redisCLI(t, r, "", at4(6379), "DEL", counter)
	redisBenchmark(t, r, at4(6379), "-n", "1000", "-c", "8", "-k", "0", "-t", "incr")
	same(t, "counter", redisCLI(t, r, "", at4(6379), "GET", counter), "1000")
	s.AllRelayed(t, 2*(5+50+10)+2+1000)
}

// TestRedisService spreads one benchmark over two servers.
func TestRedisService(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "redis-server", "redis-cli", "redis-benchmark")
	r := rig.New(t)
	// A server of each family behind an address of IPv4.
	r.Redis(t, at4(6381))
	r.Redis(t, at6(6382))
	cache := netip.MustParseAddrPort("10.96.0.79:6379")
	s := play(t, r, fmt.Sprintf("services: [{name: cache, address: %q, endpoints: [%q, %q]}]", cache, at4(6381), at6(6382)))
	redisBenchmark(t, r, cache, "-n", "12000", "-c", "40", "-t", "incr")
	conns := map[netip.AddrPort]int{}
	for _, rec := range s.Ended(t, 40) {
		if rec.OrigDst != cache || rec.Service != "cache" {
			t.Errorf("record %+v", rec)
		}
		conns[rec.Endpoint]++
	}
	sum := 0
	for _, at := range []netip.AddrPort{at4(6381), at6(6382)} {
		n, err := strconv.Atoi(strings.TrimSpace(redisCLI(t, r, "", at, "GET", counter)))
		if err != nil || n == 0 || conns[at] < 10 {
			t.Errorf("%s counted %d (%v) over %d connections, want a share", at, n, err, conns[at])
		}
		sum += n
	}
	if sum != 12000 {
		t.Errorf("the servers counted %d, want 12000", sum)
	}
	s.AllRelayed(t, 40+2)
}
