package origdst_test

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/origdst"
)

// key is a connection from the application's address to a slot.
type key struct{ source, slot netip.AddrPort }

// live stands for the kernel side.
type live map[key]flow.Downstream

func (l live) Live(source, slot netip.AddrPort) (flow.Downstream, bool) {
	d, ok := l[key{source, slot}]
	return d, ok
}

func (l live) Open(source, slot netip.AddrPort) bool {
	_, ok := l[key{source, slot}]
	return ok
}

func TestResolve(t *testing.T) {
	app, slot := netip.MustParseAddrPort("192.0.2.1:40000"), netip.MustParseAddrPort("240.0.0.1:80")
	app6, slot6 := netip.MustParseAddrPort("[2001:db8::1]:40000"), netip.MustParseAddrPort("[fd70:696c:6c69::1]:80")
	want := flow.Downstream{Cookie: 1, Source: app, OrigDst: flow.OrigDst{AddrPort: netip.MustParseAddrPort("10.96.0.12:80")}}
	want6 := flow.Downstream{Cookie: 2, Source: app6, OrigDst: flow.OrigDst{AddrPort: netip.MustParseAddrPort("[2001:db8::2]:80")}}
	r := origdst.NewResolver(live{{app, slot}: want, {app6, slot6}: want6})
	for _, c := range []struct {
		local, remote netip.AddrPort
		want          flow.Downstream
	}{{slot, app, want}, {slot6, app6, want6}} {
		got, err := r.Resolve(c.local, c.remote)
		if err != nil {
			t.Errorf("resolve %s from %s: %v", c.local, c.remote, err)
		}
		if diff := cmp.Diff(c.want, got, cmpopts.EquateComparable(netip.AddrPort{}, netip.Addr{})); diff != "" {
			t.Errorf("resolve %s from %s (-want +got):\n%s", c.local, c.remote, diff)
		}
	}
	if !r.Present(slot, app) || r.Present(app, slot) {
		t.Error("who is there is confused with who is not")
	}
	for _, c := range [][2]netip.AddrPort{
		{app, slot}, // the wrong way round
		{slot, netip.MustParseAddrPort("192.0.2.1:40001")},
		{netip.MustParseAddrPort("240.0.0.1:81"), app},
		{slot, app6},
	} {
		got, err := r.Resolve(c[0], c[1])
		if !errors.Is(err, origdst.ErrNotOurs) || flow.ReasonOf(err) != flow.ReasonNotOurs || got != (flow.Downstream{}) {
			t.Errorf("resolve %s from %s: %+v, %v", c[0], c[1], got, err)
		}
	}
}
