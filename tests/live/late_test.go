package live

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// TestLateSource starts with sources that do not answer: their services go by
// on_failure, and when the answer comes it is used.
func TestLateSource(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		t.Run("file", func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "endpoints.json")
			late(t, path, fmt.Sprintf("{file: %q}", file), func(*rig.Rig) { put(t, file, list(3)) })
		})
		t.Run("dns", func(t *testing.T) { // a server that is silent, for longer than a start waits
			t.Parallel()
			at := netip.MustParseAddrPort("198.51.100.53:5353")
			late(t, path, fmt.Sprintf("{dns: {name: web.example., port: 8080, servers: [%q], max_ttl: 1s, min_ttl: 200ms}}", at), func(r *rig.Rig) {
				newNames(t, r, hosts("web.example", 3))
			})
		})
	})
}

func late(t *testing.T, path, source string, answer func(*rig.Rig)) {
	r := rig.New(t)
	serve(t, r, 3)
	// The address of the first service exists: open leads there.
	own := server(t, r, netip.AddrPortFrom(netip.MustParseAddr("198.51.100.99"), 80))
	if strings.Contains(source, "dns") {
		silent := r.ListenUDP(t, netip.MustParseAddrPort("198.51.100.53:5353"))
		before := answer
		answer = func(r *rig.Rig) {
			silent.Close()
			before(r)
		}
	}
	s := newStage(t, r, fmt.Sprintf("services:\n  - {name: open, address: %q, path: %s, discover: %s}\n", own.At, path, source)+
		service(2, fmt.Sprintf("path: %s, on_failure: closed, discover: %s", path, source))+service(3, "path: "+path, 3))
	for range 5 {
		if got := s.Dial(t, own.At); got != own.At.String() {
			t.Errorf("open, and nobody has told: %s", got)
		}
		if got := s.Dial(t, vip(2)); got != "ECONNREFUSED" {
			t.Errorf("closed, and nobody has told: %s", got)
		}
	}
	s.goes(t, 3, 3)
	for _, name := range []string{"open", "s2"} {
		source := s.service(t, name).Source
		if !source.Stale || source.Error == "" || !source.Updated.IsZero() {
			t.Errorf("%s: %+v", name, source)
		}
	}
	answer(r)
	s.has(t, "open", "3")
	s.has(t, "s2", "3")
	testutil.Eventually(t, rig.Limit, func() bool { return s.Dial(t, own.At) == far(3).String() && s.Dial(t, vip(2)) == far(3).String() }, "they are served")
	s.goes(t, 2, 3)
}

// TestRestart kills the process of services that are found, and starts it again
// while their source is silent: what the kernel side has goes on.
func TestRestart(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	serve(t, r, 1)
	file := filepath.Join(t.TempDir(), "endpoints.json")
	put(t, file, list(1))
	s := newStage(t, r, "services:\n"+service(1, fmt.Sprintf("path: direct, discover: {file: %q}", file)))
	s.goes(t, 1, 1)
	s.load(t, 2, 4, vip(1))
	for range 3 {
		s.Kill(t)
		s.goes(t, 1, 1)
		s.Launch(t)
		s.goes(t, 1, 1)
	}
	s.unload(t)
}

// TestExec changes the file of an exec that has flags too, while its command runs.
func TestExec(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "sh", "python3")
	r := rig.New(t)
	serve(t, r, 1, 2, 3)
	dir := t.TempDir()
	file, started, done := filepath.Join(dir, "pillion.yaml"), filepath.Join(dir, "started"), filepath.Join(dir, "done")
	put(t, file, "services:\n"+service(1, "", 1))
	type output struct {
		stdout, stderr string
		err            error
	}
	ended := make(chan output, 1)
	go func() {
		var o output
		o.stdout, o.stderr, o.err = r.Exec(t, []string{
			"--config", file, "--name", fmt.Sprintf("live-exec-%d", os.Getpid()),
			"--service", fmt.Sprintf("%s=%s", vip(2), far(3)), "--deny", "203.0.113.0/24",
		}, "sh", "-c", `touch "$0"; until test -e "$1"; do sleep 0.05; done; `+
			`for a in 1 2 4; do python3 -c 'import socket, sys; print(socket.create_connection((sys.argv[1], 80), 10).makefile().readline().strip())' 10.96.0.$a; done`,
			started, done)
		ended <- o
	}()
	exists := func(file string) bool { _, err := os.Stat(file); return err == nil }
	testutil.Eventually(t, rig.Limit, func() bool { return exists(started) }, "the command runs")
	i := admin.Dial(filepath.Join(r.Runtime, fmt.Sprintf("live-exec-%d.sock", os.Getpid())))
	services := func() string {
		var all []string
		status, err := i.Status(context.Background())
		if err != nil {
			t.Error(err)
			return ""
		}
		for _, s := range status.Services {
			for _, e := range s.Endpoints {
				all = append(all, s.Address+"="+e.Address)
			}
		}
		return strings.Join(all, " ")
	}
	has := func(refused int, pairs ...any) {
		t.Helper()
		var want []string
		for n := 0; n < len(pairs); n += 2 {
			want = append(want, fmt.Sprintf("%s=%s", pairs[n], pairs[n+1]))
		}
		testutil.Eventually(t, rig.Limit, func() bool {
			status, err := i.Status(context.Background())
			return err == nil && len(status.Configuration.Refused) == refused && services() == strings.Join(want, " ")
		}, "services are ", want)
	}
	has(0, vip(1), far(1), vip(2), far(3))
	put(t, file, "services:\n"+service(1, "", 2))
	has(0, vip(1), far(2), vip(2), far(3))
	// One that cannot be told might be any that is missing: not that of a flag.
	put(t, file, "services:\n  - {adress: x}\n"+service(4, "", 1))
	has(1, vip(1), far(2), vip(4), far(1), vip(2), far(3))
	put(t, file, "")
	has(1, vip(1), far(2), vip(4), far(1), vip(2), far(3))
	put(t, file, "services:\n"+service(1, "", 2)+service(4, "", 1))
	has(0, vip(1), far(2), vip(4), far(1), vip(2), far(3))
	write(t, done, "")
	select {
	case o := <-ended:
		want := fmt.Sprintf("%s\n%s\n%s\n", far(2), far(3), far(1))
		if o.err != nil || o.stdout != want {
			t.Errorf("%v: %q, want %q\n%s", o.err, o.stdout, want, o.stderr)
		}
	case <-time.After(rig.Limit):
		t.Error("exec does not end")
	}
}
