package bpf

import (
	"net/netip"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
)

// TestOwnGroup: what the handler's own container asks for is left alone, wherever it goes,
// and only while the settings say which one that is.
func TestOwnGroup(t *testing.T) {
	h := newHooks(t)
	to := []string{"10.96.0.12:80", "[2001:db8::12]:80"}
	for _, tt := range []struct {
		group uint64
		self  uint64
	}{{0, 0}, {h.cgroup.ID, uint64(len(to))}, {h.cgroup.ID + 1<<40, 0}} {
		h.put(t, "settings", uint32(0), Settings{DefaultPath: uint32(flow.PathPass), OwnGroup: tt.group})
		before := h.counts(t, "reasons")[uint32(flow.ReasonSelf)]
		h.dial(t, to...)
		if n := h.counts(t, "reasons")[uint32(flow.ReasonSelf)] - before; n != tt.self {
			t.Errorf("own group %d: %d connects are the handler's own, want %d", tt.group, n, tt.self)
		}
	}
}

// TestBoundDevice: what is bound to a device is left alone.
func TestBoundDevice(t *testing.T) {
	h := newHooks(t)
	h.put(t, "settings", uint32(0), Settings{DefaultPath: uint32(flow.PathPass)})
	to := []string{"10.96.0.12:80", "[2001:db8::12]:80"}
	for _, a := range []string{"10.96.0.12/32", "2001:db8::12/128"} {
		h.ns.AddAddr(t, "lo", netip.MustParsePrefix(a)) // somebody refuses, so nobody waits
	}
	for device, want := range map[string]uint64{"": 0, "lo": uint64(len(to))} {
		t.Setenv(envDevice, device)
		before := h.counts(t, "reasons")[uint32(flow.ReasonBoundDevice)]
		h.dial(t, to...)
		if n := h.counts(t, "reasons")[uint32(flow.ReasonBoundDevice)] - before; n != want {
			t.Errorf("device %q: %d connects are bound to one, want %d", device, n, want)
		}
	}
}
