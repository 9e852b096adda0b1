package kube

import (
	"net/netip"
	"testing"
	"time"
)

// TestPending: an address is waited for until it is answered, never for long, and
// not again at once.
func TestPending(t *testing.T) {
	_, a, _ := addressOf(netip.MustParseAddrPort("10.96.0.10:80"))
	_, b, _ := addressOf(netip.MustParseAddrPort("10.96.0.11:80"))
	if _, mapped, ok := addressOf(netip.MustParseAddrPort("[::ffff:10.96.0.10]:80")); !ok || mapped != a {
		t.Error("the mapped form of an address is another one")
	}
	p := new(pending)
	now := time.Minute
	wants := func(hash uint64, want bool, why string) {
		t.Helper()
		if got := p.has(hash, now); got != want {
			t.Errorf("%s: %v, want %v", why, got, want)
		}
	}
	wants(a, false, "nobody has asked")
	p.open(a, now)
	wants(a, true, "it was asked for")
	wants(b, false, "another was")
	p.close(b, now)
	wants(a, true, "another was answered")
	p.close(a, now)
	wants(a, false, "it was answered")
	p.open(a, now+time.Second)
	now += time.Second
	wants(a, false, "it was answered a moment ago")
	now += pendingAgain
	p.open(a, now)
	wants(a, true, "it was answered long ago")
	now += pendingFor
	wants(a, false, "it takes too long")
	p.forget(a)
	p.open(a, now)
	wants(a, true, "it was forgotten")
}

// TestDemandPending: nobody waits for what is no service's, nor for what is outside
// the ranges of services.
func TestDemandPending(t *testing.T) {
	k, c := clusterKube(t)
	k.put("services", "default", "web", "", `{"spec":{"clusterIP":"10.96.0.10","clusterIPs":["10.96.0.10"],"ports":[{"name":"http","port":80}]}}`)
	d := demand(t, c, DemandOptions{Within: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}})
	outside := netip.MustParseAddrPort("192.0.2.1:80")
	d.Asked(outside)
	if d.Pending(outside) {
		t.Error("an address that can be no service's is waited for")
	}
	d.ask(2, "10.96.0.99:80", "10.96.0.10:81")
	for _, none := range []string{"10.96.0.99:80", "10.96.0.10:81"} {
		if d.Pending(netip.MustParseAddrPort(none)) {
			t.Errorf("%s is answered, and waited for", none)
		}
	}
}
