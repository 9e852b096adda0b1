package systemd

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// TestRestart: systemctl restart, as after an upgrade, loses nothing: connections on
// relay go on with their bytes, and no new one fails.
func TestRestart(t *testing.T) {
	m := stage(t)
	m.beside(t, "shop", shop)
	m.must(t, "systemctl", "start", "shop.service")
	a := m.app(t, "shop.service")
	m.serves(t, "shop")
	t.Run("Loaded", func(t *testing.T) { testRestartLoaded(t, m, a) })
	t.Run("Idle", func(t *testing.T) { testRestartIdle(t, m, a) })
}

// testRestartLoaded: with connections that send and receive all the time.
func testRestartLoaded(t *testing.T, m *machine, a *app) {
	const restarts, open = 5, 40
	a.load(t, 2, open, relayed, direct, unnamed)
	links := m.links(t)
	seen := map[int]bool{m.status(t, "shop").Pid: true}
	for range restarts {
		m.must(t, "systemctl", "restart", unit)
		m.serves(t, "shop")
		s := m.status(t, "shop")
		seen[s.Pid] = true
		if got := m.show(t, unit, "NFileDescriptorStore"); got != "0" {
			t.Errorf("%s descriptors are left in the store", got)
		}
		time.Sleep(200 * time.Millisecond) // the load is to go on in between
	}
	sum := a.unload(t)
	for _, text := range slices.Concat(sum.Failed, sum.Broken) {
		t.Error(text)
	}
	if len(seen) != restarts+1 {
		t.Errorf("%d restarts made %d processes", restarts, len(seen))
	}
	connects := 0
	for _, n := range sum.Connects {
		connects += n
	}
	t.Logf("%d restarts: %d new connections, none failed; %d open ones, %d KiB checked, the longest without a byte %v",
		restarts, connects, open, sum.Bytes>>10, sum.Longest.Round(time.Millisecond))
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

// testRestartIdle: what is open has one record, with all of its bytes, whichever
// processes carried it; endpoints keep their counts.
func testRestartIdle(t *testing.T, m *machine, a *app) {
	if got := a.open(t, "kept", relayed); !strings.HasPrefix(got, "198.51.100.") {
		t.Fatal(got)
	}
	m.must(t, "systemctl", "restart", unit)
	if got := a.talk(t, "kept"); got != "" {
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
	a.do(t, order{Do: "close", ID: "kept"})
	var kept []flow.Record
	for _, r := range m.records(t, "shop", relayed, 1) {
		if r.Sent == 5 { // a line of one word
			kept = append(kept, r)
		}
	}
	if len(kept) != 1 || kept[0].Received != uint64(len(server(1).String()+"\n"))+5 || kept[0].Path != flow.PathRelay {
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
