package systemd

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/rig/app"
	"github.com/pillion-project/pillion/tests/testutil"
)

// TestRestart: systemctl restart, as after an upgrade, loses nothing: connections on
// relay go on with their bytes, and no new one fails.
func TestRestart(t *testing.T) {
	m := stage(t)
	m.beside(t, "shop", shop)
	m.must(t, "systemctl", "start", "shop.service")
	a := m.client(t, "shop.service")
	m.serves(t, "shop")
	t.Run("Loaded", func(t *testing.T) { testRestartLoaded(t, m, a) })
	t.Run("Idle", func(t *testing.T) { testRestartIdle(t, m, a) })
	t.Run("Late", func(t *testing.T) { testRestartLate(t, m, a) })
	t.Run("Useless", func(t *testing.T) { testRestartUseless(t, m, a) })
}

// testRestartLoaded: with connections that send and receive all the time.
func testRestartLoaded(t *testing.T, m *machine, a client) {
	const restarts, open = 6, 40
	builds := []string{rig.Binary(t), build(t, "next")}
	a.load(t, 2, open, relayed, direct, unnamed)
	links, version := m.links(t), m.status(t, "shop").Version
	seen := map[int]bool{m.status(t, "shop").Pid: true}
	for n := range restarts {
		// An upgrade, and then a downgrade.
		m.copy(t, builds[(n+1)%2], "/usr/local/bin/pillion", 0o755)
		m.must(t, "systemctl", "restart", unit)
		m.serves(t, "shop")
		s := m.status(t, "shop")
		seen[s.Pid] = true
		if want := []string{version, "next"}[(n+1)%2]; s.Version != want {
			t.Errorf("version %s runs, want %s", s.Version, want)
		}
		if got := m.show(t, unit, "NFileDescriptorStore"); got != "0" {
			t.Errorf("%s descriptors are left in the store", got)
		}
		time.Sleep(200 * time.Millisecond) // the load is to go on in between
	}
	sum := a.Unload(t)
	for _, text := range slices.Concat(sum.Failed, sum.Broken) {
		t.Error(text)
	}
	if len(seen) != restarts+1 {
		t.Errorf("%d restarts made %d processes", restarts, len(seen))
	}
	connects := 0
	for _, n := range sum.Names {
		connects += n
	}
	t.Logf("%d restarts: %d new connections, none failed; %d open ones, %d KiB checked, the longest without a byte %v",
		restarts, connects, open, sum.Bytes>>10, slices.Max(sum.Slowest).Round(time.Millisecond))
	journal := m.journal(t, unit)
	if n := strings.Count(journal, `msg="kept for the next process"`); n != restarts {
		t.Errorf("%d of %d processes kept what was open", n, restarts)
	}
	for line := range strings.Lines(journal) {
		if strings.Contains(line, `msg="taken over"`) {
			t.Log(strings.TrimSpace(line))
		}
	}
	if got := m.links(t); !slices.Equal(got, links) {
		t.Errorf("the links were %v and are %v", links, got)
	}
	m.conserved(t, "shop")
}

// build compiles a pillion that calls itself by this version.
func build(t *testing.T, version string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "pillion")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-X main.version="+version, "-o", path, "github.com/pillion-project/pillion/cmd/pillion")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build pillion: %v\n%s", err, out)
	}
	return path
}

// testRestartIdle: what is open has one record, with all of its bytes, whichever
// processes carried it; endpoints keep their counts.
func testRestartIdle(t *testing.T, m *machine, a client) {
	if got := a.Open(t, "kept", relayed); !strings.HasPrefix(got, "198.51.100.") {
		t.Fatal(got)
	}
	m.must(t, "systemctl", "restart", unit)
	if got := a.Talk(t, "kept"); got != "" {
		t.Errorf("after the restart: %s", got)
	}
	m.serves(t, "shop")
	live := int64(0)
	for _, s := range m.status(t, "shop").Services {
		for _, e := range s.Endpoints {
			live += e.Live
		}
	}
	if live != 1 {
		t.Errorf("%d connections are counted at the endpoints, one is open", live)
	}
	a.Close(t, "kept")
	var kept []flow.Record
	testutil.Eventually(t, rig.Limit, func() bool {
		kept = slices.DeleteFunc(m.records(t, "shop", relayed, 1), func(r flow.Record) bool { return r.Sent != app.HeadSize+app.TalkSize })
		return len(kept) > 0
	}, "the connection is on record")
	if len(kept) != 1 || kept[0].Received != uint64(len(server(1).String()+"\n"))+app.TalkSize || kept[0].Path != flow.PathRelay {
		t.Errorf("the records of the connection: %+v", kept)
	}
	// A stop is no restart: nothing is kept.
	m.must(t, "systemctl", "stop", unit)
	if got := m.show(t, unit, "NFileDescriptorStore"); got != "0" {
		t.Errorf("%s descriptors are left in the store", got)
	}
	m.nothingLeft(t)
	m.must(t, "systemctl", "start", unit)
	if _, err := m.instance("shop").Flows(context.Background(), admin.FlowQuery{}); err != nil {
		t.Error(err)
	}
}

// testRestartLate: what is open waits also while the next process cannot be started
// at first.
func testRestartLate(t *testing.T, m *machine, a client) {
	a.Open(t, "waits", relayed)
	m.override(t, `ExecStartPre=/bin/sh -c "mkdir /var/log/pillion/once.d || exit 0; exit 1"`)
	if code, _ := m.code(t, "systemctl", "restart", unit); code == 0 {
		t.Fatal("it was started at once: the test proves nothing")
	}
	if got := a.Talk(t, "waits"); got != "" {
		t.Errorf("a connection that was open before: %s", got)
	}
	m.serves(t, "shop")
	if got := a.Dial(t, relayed); !strings.HasPrefix(got, "198.51.100.") {
		t.Errorf("a new connection: %s", got)
	}
	a.Close(t, "waits")
	m.override(t)
	m.conserved(t, "shop")
}

// testRestartUseless: where the next process would not start, and where there is no
// store, a restart drains: it does not drop what is open at once.
func testRestartUseless(t *testing.T, m *machine, a client) {
	for _, tt := range []struct {
		name  string
		spoil func()
		log   string
		then  string // the state in the end
	}{
		{"no store", func() { m.override(t, "FileDescriptorStoreMax=0") }, "has no FileDescriptorStoreMax", "active"},
		{"broken file", func() { m.configure(t, shop+"- {name: broken}\n") }, "the next process will not start", "failed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m.serves(t, "shop")
			a.Open(t, tt.name, relayed)
			tt.spoil()
			m.must(t, "systemctl", "restart", "--no-block", unit)
			testutil.Eventually(t, rig.Limit, func() bool {
				s, err := m.instance("shop").Status(context.Background())
				return err == nil && s.State == admin.StateDraining
			}, "it drains")
			if got := a.Talk(t, tt.name); got != "" {
				t.Errorf("while it drains: %s", got)
			}
			a.Close(t, tt.name)
			testutil.Eventually(t, rig.Limit, func() bool { return m.show(t, unit, "ActiveState") == tt.then }, "it is ", tt.then)
			if journal := m.journal(t, unit); !strings.Contains(journal, tt.log) {
				t.Errorf("%q is not in the journal:\n%s", tt.log, journal)
			}
			m.override(t)
		})
	}
}
