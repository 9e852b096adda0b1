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
