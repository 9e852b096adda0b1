package loader

import (
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

// TestUnavailable writes while what takes long is under way: a worker waits for
// it, with all its connections.
func TestUnavailable(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	service := netip.MustParseAddrPort("10.0.0.1:80")
	rules := plain
	rules.Services = []Service{{Addr: service, Connect: flow.ConnectMirror}}
	setRules(t, d, rules)
	defer p.unload(t, d)
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, wait := range []time.Duration{time.Hour, 0} {
		done := make(chan error, 1)
		go func() { done <- d.Unavailable(service, wait) }()
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("it waits")
		}
		var s bpf.Service
		if err := d.maps.Services.Lookup(bpf.EndpointKey{Addr: bpf.FromAddr(service.Addr()), Port: service.Port()}, &s); err != nil {
			t.Fatal(err)
		}
		if (s.Unavailable > 0) != (wait > 0) || s.Connect != uint8(d.connect(flow.ConnectMirror)) {
			t.Errorf("after %s: %+v", wait, s)
		}
	}
}

// TestRulesKeepUnavailable: that a service has no endpoint for a while is not taken
// back by rules that say something else of it.
func TestRulesKeepUnavailable(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer p.unload(t, d)
	rules := plain
	rules.Services = []Service{{Addr: shop, Connect: flow.ConnectMirror}}
	setRules(t, d, rules)
	if err := d.Unavailable(shop, time.Hour); err != nil {
		t.Fatal(err)
	}
	rules.Services = []Service{{Addr: shop, Connect: flow.ConnectEarly, Closed: true}}
	setRules(t, d, rules)
	if s := entry(t, d, shop); s.Unavailable == 0 || uint32(s.OnFailure) != bpf.OnFailureClosed {
		t.Errorf("%+v", s)
	}
	rules.Services = nil
	setRules(t, d, rules)
	rules.Services = []Service{{Addr: shop}}
	setRules(t, d, rules)
	if s := entry(t, d, shop); s.Unavailable != 0 {
		t.Errorf("it is a new service, and unavailable: %+v", s)
	}
}

// TestDraining: rules that come while it drains do not send the handler new
// connections, and who takes over drains with the rules that were in force, and is
// not draining itself.
func TestDraining(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	rules := plain
	rules.Closed = true
	rules.Deny = []Rule{{Prefix: netip.MustParsePrefix("192.0.2.0/24")}}
	setRules(t, d, rules)
	settings := func() (v bpf.Settings) {
		t.Helper()
		if err := d.maps.Settings.Lookup(uint32(0), &v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	drain := func() {
		t.Helper()
		if err := d.Drain(); err != nil {
			t.Fatal(err)
		}
	}
	drain()
	setRules(t, d, rules)
	if settings().Draining == 0 {
		t.Error("new rules ended the drain")
	}
	d = p.restart(t, d)
	defer func() { p.unload(t, d) }()
	drain()
	if v := settings(); v.Draining == 0 || v.DenyRules != 1 || v.OnFailure != bpf.OnFailureClosed {
		t.Errorf("who took over drains with %+v", v)
	}
	d = p.restart(t, d)
	setRules(t, d, rules)
	if settings().Draining != 0 {
		t.Error("who took over drains as the one before it did")
	}
}
