package loader

import (
	"net"
	"net/netip"
	"testing"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/tests/testutil"
)

// TestDeparted: a connection that its application has closed before anybody
// accepted it is known all the same, one that it has reset is not.
func TestDeparted(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "departed")
	setRules(t, d, plain)
	p.attach(t, d)
	p.handler(t, d)
	for _, reset := range []bool{false, true} {
		c, err := p.open(t, far)
		if err != nil {
			t.Fatal(err)
		}
		source := c.LocalAddr().(*net.TCPAddr).AddrPort()
		var slot netip.AddrPort
		var key bpf.LiveKey
		var l bpf.Live
		for it := d.maps.Live.Iterate(); it.Next(&key, &l); {
			if key.SourcePort == source.Port() {
				slot = netip.AddrPortFrom(bpf.ToAddr(key.Slot), key.SlotPort)
				break
			}
		}
		if _, ok := d.Live(source, slot); !ok {
			t.Fatal("an open connection is not known")
		}
		if reset {
			if err := c.(*net.TCPConn).SetLinger(0); err != nil {
				t.Fatal(err)
			}
		}
		c.Close()
		testutil.Eventually(t, patience, func() bool {
			_, ok := lookupLive(d.liveFD, liveKey(source, slot))
			return !ok
		}, "it is live no more")
		got, ok := d.Live(source, slot)
		if ok == reset || ok && got.OrigDst.AddrPort != far {
			t.Errorf("reset %v: known %v, %+v", reset, ok, got)
		}
		if n := stats(t, d).Live; n != 0 {
			t.Errorf("%d connections are open", n)
		}
	}
	p.unload(t, d)
	p.clean(t)
}

// TestDepartedIsAnother: who has an address that somebody departed from is not
// taken for him.
func TestDepartedIsAnother(t *testing.T) {
	const port = 20001
	p := newPlace(t)
	d := p.create(t, "departed")
	defer p.unload(t, d)
	setRules(t, d, plain)
	p.attach(t, d)
	p.handler(t, d)
	first, err := p.open(t, far)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	slot := netip.AddrPortFrom(slotAddr(t, d), far.Port())
	source := netip.AddrPortFrom(first.LocalAddr().(*net.TCPAddr).AddrPort().Addr(), port)
	if err := d.maps.Departed.Put(liveKey(source, slot), bpf.Live{Cookie: 1}); err != nil {
		t.Fatal(err)
	}
	c, err := p.open(t, far, func(d *net.Dialer) { d.LocalAddr = &net.TCPAddr{Port: port} })
	if err != nil {
		t.Fatal(err)
	}
	if got, ok := d.Live(source, slot); !ok || got.Cookie == 1 {
		t.Fatalf("open: known %v, %+v", ok, got)
	}
	if err := c.(*net.TCPConn).SetLinger(0); err != nil {
		t.Fatal(err)
	}
	c.Close()
	testutil.Eventually(t, patience, func() bool { return stats(t, d).Live == 1 }, "it is live no more")
	if got, ok := d.Live(source, slot); ok {
		t.Errorf("taken for another: %+v", got)
	}
}

// slotAddr is the slot of the only connection that is open.
func slotAddr(t *testing.T, d *Datapath) netip.Addr {
	t.Helper()
	var key bpf.LiveKey
	var l bpf.Live
	if !d.maps.Live.Iterate().Next(&key, &l) {
		t.Fatal("nothing is open")
	}
	return bpf.ToAddr(key.Slot)
}
