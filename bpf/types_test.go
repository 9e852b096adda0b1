package bpf

import (
	"net/netip"
	"testing"
	"unsafe"
)

// TestFromAddr goes to the kernel's form and back.
func TestFromAddr(t *testing.T) {
	for _, s := range []string{"10.96.0.12", "0.0.0.0", "255.255.255.255", "2001:db8::1", "::1"} {
		a := netip.MustParseAddr(s)
		if got := ToAddr(FromAddr(a)); got != a {
			t.Errorf("%v comes back as %v", a, got)
		}
	}
	mapped := netip.MustParseAddr("::ffff:10.96.0.12")
	if got := ToAddr(FromAddr(mapped)); got != mapped.Unmap() {
		t.Errorf("%v comes back as %v", mapped, got)
	}
	if got := FromAddr(netip.Addr{}); got != (IPAddr{}) {
		t.Errorf("the invalid address is %v", got)
	}
	if got := ToAddr(IPAddr{}); got.IsValid() {
		t.Errorf("all zero is %v", got)
	}
}

func TestParseEvent(t *testing.T) {
	raw := make([]byte, unsafe.Sizeof(ConnEvent{}))
	raw[0], raw[unsafe.Offsetof(ConnEvent{}.Ending)] = 7, EndingTimeout
	e, ok := ParseEvent(raw)
	if !ok || e.Cookie != 7 || e.Ending != EndingTimeout {
		t.Errorf("ParseEvent: %+v, %v", e, ok)
	}
	for _, size := range []int{0, len(raw) - 1, len(raw) + 1} {
		if _, ok := ParseEvent(make([]byte, size)); ok {
			t.Errorf("an event of %d bytes was read", size)
		}
	}
}
