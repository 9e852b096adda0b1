package live

import (
	"bytes"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// TestProhibited has a firewall in front of an endpoint say so by ICMPv6, as firewalld
// does. Linux makes EACCES of it, as of what a machine itself forbids; it is the
// endpoint's failure on every path, and for a check.
func TestProhibited(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "nft")
	r := rig.New(t)
	shut, open := netip.AddrPortFrom(rig.Far6, 7001), netip.AddrPortFrom(rig.Far6, 7002)
	server(t, r, shut)
	server(t, r, open)
	r.World.Sysctl(t, "net/ipv6/icmp/ratelimit", "0") // of one a second to a host
	var out bytes.Buffer
	nft := exec.Command("nft", "-f", "-")
	nft.Stdout, nft.Stderr = &out, &out
	nft.Stdin = strings.NewReader(fmt.Sprintf(`table ip6 shut { chain in {
		type filter hook input priority 0; tcp dport %d reject with icmpv6 admin-prohibited
	}
	}`, shut.Port()))
	if err := r.World.Start(nft); err != nil {
		t.Fatal(err)
	}
	if err := nft.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	config := "health: {failures: 2, base: 1h, max: 1h, panic: 0}\nservices:\n"
	at := map[string]netip.AddrPort{}
	for n, name := range []string{"mirror", "adaptive", "direct", "checked"} {
		at[name] = netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf("2001:db8:96::%d", n+1)), 80)
		more := "path: relay, connect: " + name
		switch name {
		case "direct":
			more = "path: direct"
		case "checked":
			// The error comes back while connect(2) holds the socket, which drops it;
			// so it is the second SYN's, after a second.
			more = "path: direct, health: {failures: 0}, health_check: {tcp: {}, interval: 100ms, timeout: 10s, unhealthy: 1}"
		}
		config += fmt.Sprintf("  - {name: %s, address: %q, endpoints: [%q, %q], policy: round_robin, %s}\n", name, at[name], shut, open, more)
	}
	s := newStage(t, r, config)
	state := func(name string) admin.EndpointStatus {
		for _, e := range s.service(t, name).Endpoints {
			if e.Address == shut.String() {
				return e
			}
		}
		return admin.EndpointStatus{}
	}
	for name, to := range at {
		seen := &admin.EndpointStatus{}
		testutil.Eventually(t, rig.Limit, func() bool {
			s.Dial(t, to)
			*seen = state(name)
			return name == "checked" && seen.Down || name != "checked" && seen.Ejected
		}, name, ": the endpoint is shut, and it is ", seen)
	}
	if e := state("checked"); !strings.Contains(e.CheckError, "permission denied") {
		t.Errorf("the check says %q", e.CheckError)
	}
}
