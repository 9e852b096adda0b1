package upgrade

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
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
	before := counters(t, i)
	i.Replace(t, rig.Binary(t))
	for name, v := range counters(t, i) {
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
	all := counters(t, i)
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

// counters are an instance's, by name and labels as they are in the text.
func counters(t *testing.T, i *rig.Instance) map[string]float64 {
	t.Helper()
	body, err := i.Metrics(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	all := map[string]float64{}
	lines := bufio.NewScanner(body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		bare, _, _ := strings.Cut(name, "{")
		if !strings.HasPrefix(bare, "pillion_") || !strings.HasSuffix(bare, "_total") && !strings.HasSuffix(bare, "_count") && !strings.HasSuffix(bare, "_bucket") {
			continue
		}
		if all[name], err = strconv.ParseFloat(value, 64); err != nil {
			t.Fatalf("%q: %v", lines.Text(), err)
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}
