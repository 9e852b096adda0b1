package survive

import (
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// Who reads the metrics sees no counter jump back when the worker is killed, however
// often.
func TestTotals(t *testing.T) {
	t.Parallel()
	const each = 5
	to := netip.MustParseAddrPort("10.96.0.9:80")
	r := rig.New(t)
	end := r.Serve(t, netip.MustParseAddrPort("198.51.100.1:8080"), func(c net.Conn) { io.Copy(c, c) })
	i := r.Run(t, fmt.Sprintf("survive: crash\nservices: [{address: %q, endpoints: [%q]}]\n", to, end))
	for turn := 1; turn <= 3; turn++ {
		r.Output(t, os.Args[0], "-test.run=^TestKnock$", "-knock="+to.String(), fmt.Sprint("-knocks=", each))
		i.AllRelayed(t, turn*each)
		before := i.Counters(t)
		for _, name := range []string{
			"pillion_relay_accepted_total", "pillion_relay_ended_total",
			`pillion_endpoint_connects_total{cluster="` + to.String() + `",endpoint="` + end.String() + `"}`,
			`pillion_connection_duration_seconds_count{path="relay"}`,
		} {
			if before[name] != float64(turn*each) {
				t.Errorf("turn %d: %s is %v, want %d", turn, name, before[name], turn*each)
			}
		}
		s, err := i.Status(t.Context())
		if err == nil {
			err = unix.Kill(s.Pid, unix.SIGKILL)
		}
		if err != nil {
			t.Fatal(err)
		}
		testutil.Eventually(t, rig.Limit, func() bool {
			now, err := i.Status(t.Context())
			return err == nil && now.Pid != s.Pid && now.Ready
		}, "the next worker is ready")
		after := i.Counters(t)
		for name, v := range before {
			if after[name] < v {
				t.Errorf("turn %d: %s jumps from %v to %v", turn, name, v, after[name])
			}
		}
	}
}

var (
	knock  = flag.String("knock", "", "an address that TestKnock connects to")
	knocks = flag.Int("knocks", 1, "and how often, one connection after the other")
)

// TestKnock is an application that connects, and wants an answer. As a test it does
// nothing.
func TestKnock(t *testing.T) {
	if *knock == "" {
		return
	}
	for range *knocks {
		c, err := net.Dial("tcp", *knock)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 6)
		if _, err := io.WriteString(c, "hello\n"); err != nil {
			t.Error(err)
		} else if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello\n" {
			t.Errorf("the answer is %q, %v", got, err)
		}
		c.Close()
	}
}
