package upgrade

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
)

// Counters go on when another process takes over: none jumps back, and the connections
// of both are in the sum.
func TestTotals(t *testing.T) {
	t.Parallel()
	const each = 7
	r := rig.New(t)
	to := r.Serve(t, netip.MustParseAddrPort("198.51.100.1:8080"), func(c net.Conn) { io.Copy(c, c) })
	i := r.Run(t, fmt.Sprintf("services: [{address: %q, endpoints: [%q]}]\n", vip, to))
	connect := func() {
		script := fmt.Sprintf("for n in $(seq %d); do exec 3<>/dev/tcp/%s/%d; echo hello >&3; read line <&3; exec 3>&-; done", each, vip.Addr(), vip.Port())
		r.Output(t, "bash", "-c", script)
	}
	connect()
	i.AllRelayed(t, each)
	before := i.Counters(t)
	i.Replace(t, rig.Binary(t))
	for name, v := range i.Counters(t) {
		if v < before[name] {
			t.Errorf("%s jumps from %v to %v", name, before[name], v)
		}
		delete(before, name)
	}
	for name, v := range before {
		t.Errorf("%s, which was %v, is gone", name, v)
	}
	connect()
	i.AllRelayed(t, 2*each)
	all := i.Counters(t)
	for _, name := range []string{
		"pillion_relay_accepted_total", "pillion_relay_ended_total", "pillion_relay_dials_total", "pillion_connects_total",
		`pillion_endpoint_connects_total{cluster="` + vip.String() + `",endpoint="` + to.String() + `"}`,
		`pillion_connection_duration_seconds_count{path="relay"}`,
	} {
		if all[name] != 2*each {
			t.Errorf("%s is %v, want %d", name, all[name], 2*each)
		}
	}
	if name := `pillion_bytes_total{direction="sent",path="relay"}`; all[name] != 2*each*float64(len("hello\n")) {
		t.Errorf("%s is %v", name, all[name])
	}
}
