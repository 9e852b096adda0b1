package systemd

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/rig/app"
	"github.com/pillion-project/pillion/tests/testutil"
)

// Where the application connects to. No service names the third one, which is a
// server itself.
var (
	relayed = netip.MustParseAddrPort("10.96.0.1:80")
	direct  = netip.MustParseAddrPort("10.96.0.2:80")
	unnamed = server(7)
)

// server is the address of a server in the world; there are those from 1 to 7.
func server(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(n)}), 8080)
}

const flowLog = "/var/log/pillion/shop.jsonl"

// shop is the configuration of the usual instance: two endpoints for each service.
var shop = fmt.Sprintf(`flow_log: %s
services:
- {name: relayed, address: %q, path: relay, endpoints: [%q, %q]}
- {name: direct, address: %q, path: direct, endpoints: [%q, %q]}
`, flowLog, relayed, server(1), server(2), direct, server(3), server(4))

// stage starts a machine with servers in its world.
func stage(t *testing.T) *machine {
	t.Helper()
	m := boot(t)
	for n := 1; n <= 7; n++ {
		m.Serve(t, server(n), app.NewServer(server(n).String()).Serve)
	}
	return m
}

// beside puts Pillion beside a service, by the shipped drop-in, with a
// configuration. It starts nothing. The machine reads its units again.
func (m *machine) beside(t testing.TB, name, config string, lines ...string) {
	t.Helper()
	m.service(t, name+".service", lines...)
	m.copy(t, shipped+"/pillion.conf", units+"/"+name+".service.d/pillion.conf", 0o644)
	m.write(t, "/etc/pillion/"+name+".yaml", config)
	m.must(t, "systemctl", "daemon-reload")
}

// override adds lines to [Service] of every instance's unit. The machine reads its
// units again.
func (m *machine) override(t testing.TB, lines ...string) {
	t.Helper()
	m.write(t, units+"/pillion@.service.d/test.conf", "[Service]\n"+strings.Join(lines, "\n")+"\n")
	m.must(t, "systemctl", "daemon-reload")
}

// instance asks an instance of the machine.
func (m *machine) instance(name string) *admin.Client {
	return admin.Dial(m.path("/run/pillion/" + name + ".sock"))
}

func (m *machine) status(t testing.TB, name string) admin.Status {
	t.Helper()
	s, err := m.instance(name).Status(context.Background())
	if err != nil {
		t.Fatalf("status of %s: %v", name, err)
	}
	return s
}

// serves waits until an instance captures and carries connections.
func (m *machine) serves(t testing.TB, name string) {
	t.Helper()
	testutil.Eventually(t, rig.Limit, func() bool {
		s, err := m.instance(name).Status(context.Background())
		// Status tells of the start, Ready of now.
		return err == nil && s.Ready && s.State == admin.StateServing && m.instance(name).Ready(context.Background()) == nil
	}, name, " is ready")
}

// goes fails the test unless the application's connections are served by each of
// these servers and nobody else. It returns how many connections that took.
func (a client) goes(t testing.TB, to netip.AddrPort, want ...netip.AddrPort) int {
	t.Helper()
	got := map[string]int{}
	tries := 16 * len(want)
	for range tries {
		got[a.Dial(t, to)]++
	}
	for _, w := range want {
		if got[w.String()] == 0 {
			t.Errorf("%s is never served by %s: %v", to, w, got)
		}
		delete(got, w.String())
	}
	if len(got) > 0 {
		t.Errorf("%s ends in %v", to, got)
	}
	return tries
}

// conserved fails the test unless every connection of an instance is accounted for.
func (m *machine) conserved(t testing.TB, name string) {
	t.Helper()
	left := int64(0)
	testutil.Eventually(t, rig.Limit, func() bool {
		left = m.status(t, name).Unaccounted
		return left == 0
	}, "connections are not accounted for")
}

// records are those of the ended connections of an instance to a destination, of
// which there have to be some number.
func (m *machine) records(t testing.TB, name string, to netip.AddrPort, want int) []flow.Record {
	t.Helper()
	var all []flow.Record
	testutil.Eventually(t, rig.Limit, func() bool {
		list, err := m.instance(name).Flows(context.Background(), admin.FlowQuery{})
		if err != nil {
			t.Fatal(err)
		}
		all = all[:0]
		for _, r := range list {
			if r.OrigDst == to && !r.Open {
				all = append(all, r)
			}
		}
		return len(all) >= want
	}, want, " records of connections to ", to)
	return all
}
