package live

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// TestKept starts the process again while the sources of its services tell nothing:
// what was published last stays in force until they do, on whatever path and with
// whatever on_failure, and only what the configuration does not name any more goes.
func TestKept(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		serve(t, r, 1, 2, 3)
		file := filepath.Join(t.TempDir(), "endpoints.json")
		of := func(services ...int) string {
			text := "services:\n"
			for _, n := range services {
				more := fmt.Sprintf("policy: random, path: %s, discover: {file: %q}", path, file)
				if n == 2 {
					more += ", on_failure: closed"
				}
				text += service(n, more)
			}
			return text
		}
		put(t, file, list(1, 3))
		s := newStage(t, r, of(1, 2, 4))
		s.has(t, "s1", "1", "3")
		// One that is removed and has connections is no endpoint, whatever the kernel
		// side knows of it still.
		for n := range 8 {
			s.Open(t, fmt.Sprint(n), vip(1))
		}
		put(t, file, fmt.Sprintf(`["%s", "%s"]`, far(1), far(2)))
		for _, n := range []int{1, 2, 4} {
			s.has(t, fmt.Sprintf("s%d", n), "1", "2")
		}
		for range 2 { // who takes over from one that kept them keeps them too
			s.Kill(t)
			if err := os.Remove(file); err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
			put(t, s.file, of(1, 2))
			s.Launch(t)
			for n := 1; n <= 2; n++ {
				name := fmt.Sprintf("s%d", n)
				s.has(t, name, "1", "2")
				s.goes(t, n, 1, 2)
				if v := s.service(t, name); !v.Source.Stale || v.Source.Error == "" || v.Path.String() != path {
					t.Errorf("%s: path %s, %+v", name, v.Path, v.Source)
				}
				if got := s.metric(t, fmt.Sprintf(`pillion_discovery_stale{service=%q,source="file"}`, name)); got != "1" {
					t.Errorf("%s is stale: %s", name, got)
				}
			}
			if v := s.service(t, "s4"); v.Name != "" {
				t.Errorf("it is configured no more, and there: %+v", v)
			}
			if got := s.metric(t, "pillion_sets"); got != "2" {
				t.Errorf("%s sets", got)
			}
		}
		s.load(t, 2, 0, vip(1), vip(2))
		put(t, file, list(3))
		for n := 1; n <= 2; n++ {
			s.has(t, fmt.Sprintf("s%d", n), "3")
			s.goes(t, n, 3)
		}
		s.unload(t)
		if v := s.service(t, "s1"); v.Source.Stale {
			t.Errorf("it has told: %+v", v.Source)
		}
	})
}

// TestKeptDNS is the same with a source that is silent for longer than a start waits,
// and never says why.
func TestKeptDNS(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		serve(t, r, 1, 2)
		n := newNames(t, r, hosts("web.example", 1))
		s := newStage(t, r, "services:\n"+service(1, fmt.Sprintf(
			"path: %s, discover: {dns: {name: web.example., port: 8080, min_ttl: 200ms, max_ttl: 1s, servers: [%q]}}", path, n.at)))
		s.has(t, "s1", "1")
		s.Kill(t)
		n.p.Kill(t)
		silent := r.ListenUDP(t, n.at)
		s.Launch(t)
		s.has(t, "s1", "1")
		s.goes(t, 1, 1)
		if v := s.service(t, "s1"); !v.Source.Stale {
			t.Errorf("%+v", v.Source)
		}
		silent.Close()
		n.write(t, hosts("web.example", 2))
		n.start(t, r)
		s.has(t, "s1", "2")
		s.goes(t, 1, 2)
	})
}

// TestKeptHealth: what an earlier process found of the health of endpoints that are kept
// is found anew.
func TestKeptHealth(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		ward := checks["command"](t, r)
		file := filepath.Join(t.TempDir(), "endpoints.json")
		put(t, file, list(1, 2))
		s := newStage(t, r, "services:\n"+service(1, fmt.Sprintf(
			"path: %s, policy: random, health_check: %s, discover: {file: %q}", path, ward.check, file)))
		s.has(t, "s1", "1", "2")
		ward.set(t, 1, false)
		s.has(t, "s1", "1 down", "2")
		s.goes(t, 1, 2)
		s.Kill(t)
		ward.set(t, 1, true)
		ward.set(t, 2, false)
		remove(t, file)
		s.Launch(t)
		s.has(t, "s1", "1", "2 down")
		s.goes(t, 1, 1)
	})
}

// TestRemovedMeanwhile removes endpoints while no process is there: who takes over
// does with the connections to them what their services want. Those on relay ended
// with the process.
func TestRemovedMeanwhile(t *testing.T) {
	t.Parallel()
	for _, by := range []string{"configuration", "source"} {
		t.Run(by, func(t *testing.T) {
			t.Parallel()
			r := rig.New(t)
			serve(t, r, 1, 2)
			file := filepath.Join(t.TempDir(), "endpoints.yaml")
			of := func(endpoints ...int) string {
				text := "services:\n"
				for n := 1; n <= len(fates); n++ {
					more := "path: direct, " + fates[n]
					if by == "source" {
						text += service(n, fmt.Sprintf("%s, discover: {file: %q}", more, file))
					} else {
						text += service(n, more, endpoints...)
					}
				}
				return text
			}
			put(t, file, list(1))
			s := newStage(t, r, of(1))
			for n := range fates {
				if got := s.Open(t, fmt.Sprint(n), vip(n)); got != far(1).String() {
					t.Fatal(got)
				}
			}
			s.Kill(t)
			put(t, file, list(2))
			put(t, s.file, of(2))
			s.Launch(t)
			for n := range fates {
				s.has(t, fmt.Sprintf("s%d", n), "2")
			}
			for _, n := range []int{2, 3} {
				if got := s.EndOf(t, fmt.Sprint(n)); got != resets["direct"] {
					t.Errorf("%s: the connection ended by %s, want %s", fates[n], got, resets["direct"])
				}
			}
			for _, n := range []int{1, 4} {
				if got := s.Talk(t, fmt.Sprint(n)); got != "" {
					t.Errorf("%s: the connection ended: %s", fates[n], got)
				}
			}
			testutil.Eventually(t, rig.Limit, func() bool { return s.metric(t, "pillion_endpoint_removed_connections_total") == "2" }, "two were ended")
			s.goes(t, 1, 2)
		})
	}
}

// TestRemovedBefore: connections to an endpoint that was removed, and whose time was not
// up when the process was killed, are ended by the next one in time. Others are not,
// whatever their service wants by then.
func TestRemovedBefore(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		serve(t, r, 1, 2)
		of := func(n int, fate string) string {
			text := "survive: crash\nservices:\n" + service(1, fmt.Sprintf("path: %s, on_remove: close, remove_after: 10s", path), n)
			return text + service(2, fmt.Sprintf("path: %s, on_remove: %s", path, fate), n)
		}
		s := newStage(t, r, of(1, "keep"))
		for n := 1; n < 3; n++ {
			if got := s.Open(t, fmt.Sprint(n), vip(n)); got != far(1).String() {
				t.Fatal(got)
			}
		}
		s.reload(t, of(2, "keep"))
		s.reload(t, of(2, "reset"))
		note := "/sys/fs/bpf/pillion/" + s.Name + "/note"
		testutil.Eventually(t, rig.Limit, func() bool { _, err := os.Stat(note); return err == nil }, "it is noted")
		before := s.status(t).Pid
		if err := unix.Kill(before, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		testutil.Eventually(t, rig.Limit, func() bool {
			st, err := s.Status(context.Background())
			return err == nil && st.Ready && st.Pid != before
		}, "another one goes on")
		if got := s.EndOf(t, "1"); got != resets[path] {
			t.Errorf("the connection ended by %s, want %s", got, resets[path])
		}
		if got := s.Talk(t, "2"); got != "" {
			t.Errorf("one that is kept ended: %s", got)
		}
		s.goes(t, 1, 2)
	})
}
