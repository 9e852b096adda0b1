package systemd

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/rig/app"
	"github.com/pillion-project/pillion/tests/testutil"
)

// bare runs Pillion over the cgroup of a service itself, without slice and drop-in.
const bare = `[Service]
Type=notify
ExecStart=/usr/local/bin/pillion run --cgroup /sys/fs/cgroup/system.slice/plain.service --name plain --config /etc/pillion/plain.yaml
Restart=always
RuntimeDirectory=pillion
RuntimeDirectoryPreserve=yes
`

// TestBare: a unit's cgroup is removed when the unit stops, and another is made when
// it starts. Pillion follows by itself: later than the first connection, so what is
// shipped uses a slice.
func TestBare(t *testing.T) {
	m := stage(t)
	m.service(t, "plain.service", "Environment="+app.EnvFirst+"="+unnamed.String())
	m.write(t, units+"/bare.service", bare)
	m.write(t, "/etc/pillion/plain.yaml", fmt.Sprintf("services: [{address: %q, path: relay, endpoints: [%q]}]\n", relayed, server(5)))
	m.must(t, "systemctl", "daemon-reload")
	m.must(t, "systemctl", "start", "plain.service", "bare.service")
	m.serves(t, "plain")
	m.client(t, "plain.service").goes(t, relayed, server(5))
	const dir = "/sys/fs/cgroup/system.slice/plain.service"
	before := m.inode(t, dir)

	m.must(t, "systemctl", "stop", "plain.service")
	if got := m.list(t, dir); got != nil {
		t.Fatal("the stopped service still has a cgroup")
	}
	// It is told of, and is no reason to end.
	testutil.Eventually(t, rig.Limit, func() bool { return m.instance("plain").Ready(context.Background()) != nil }, "it says that it captures nothing")
	if err := m.instance("plain").Live(t.Context()); err != nil {
		t.Errorf("it is to be started again: %v", err)
	}
	m.must(t, "systemctl", "start", "plain.service")
	start := time.Now()
	a := m.client(t, "plain.service")
	if after := m.inode(t, dir); after == before {
		t.Fatal("the service has its old cgroup: the test proves nothing")
	}
	m.serves(t, "plain")
	t.Logf("captured again %v after the service was started again", time.Since(start).Round(time.Millisecond))
	a.goes(t, relayed, server(5))
	m.conserved(t, "plain")

	// It cannot start while there is no cgroup, and is no use then. Once there is one
	// again it can, anew.
	m.must(t, "systemctl", "stop", "plain.service")
	if code, _ := m.code(t, "systemctl", "restart", "bare.service"); code == 0 {
		t.Error("it started without a cgroup")
	}
	if journal := m.journal(t, "bare.service"); !strings.Contains(journal, "no such cgroup: "+dir) {
		t.Errorf("the journal does not tell:\n%s", journal)
	}
	m.must(t, "systemctl", "start", "--no-block", "bare.service")
	m.must(t, "systemctl", "start", "plain.service")
	a = m.client(t, "plain.service")
	m.serves(t, "plain")
	tries := a.goes(t, relayed, server(5))
	for _, r := range m.records(t, "plain", relayed, tries) {
		if r.Path != flow.PathRelay {
			t.Errorf("a connection went by %s (%s)", r.Path, r.Reason)
		}
	}
	m.conserved(t, "plain")
	m.must(t, "systemctl", "stop", "plain.service", "bare.service")
	m.nothingLeft(t)
}
