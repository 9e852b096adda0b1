package bpf

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/tests/testutil"
)

// endpointOf is one member of a set. Its alias table is that of equal weights.
type endpointOf struct {
	addr   string
	weight uint16
}

// asRow lets a row of a set be written as what it is.
func asRow[T any](v T) SetRow {
	if unsafe.Sizeof(v) != unsafe.Sizeof(SetRow{}) {
		panic("not the size of a row")
	}
	return *(*SetRow)(unsafe.Pointer(&v))
}

// publish puts a set in place of the service's last one.
func (h *hooks) publish(t *testing.T, id uint32, config SetConfig, local int, firstID uint32, members []endpointOf, tables ...[]uint32) *ebpf.Map {
	t.Helper()
	if local == 0 {
		local = len(members)
	}
	var rows []SetRow
	for i, m := range members {
		at := netip.MustParseAddrPort(m.addr)
		index := uint32(i)
		if i >= local {
			index -= uint32(local)
		}
		rows = append(rows, asRow(SetEndpoint{
			Addr: abiIpAddr(FromAddr(at.Addr())), Port: at.Port(), Weight: m.weight,
			Id: firstID + uint32(i), Cut: 1<<32 - 1, Alias: index,
		}))
	}
	var tiers SetTiers
	tiers.Tier[0].Count = uint32(local)
	tiers.Tier[1].First, tiers.Tier[1].Count = uint32(local), uint32(len(members)-local)
	for i, table := range tables {
		tiers.Tier[i].Table, tiers.Tier[i].Entries = uint32(SetHead+len(rows)), uint32(len(table))
		for len(table) > 0 {
			var row SetTable
			table = table[copy(row.Entry[:], table):]
			rows = append(rows, asRow(row))
		}
	}
	rows = append([]SetRow{asRow(tiers), asRow(config), asRow(SetState{})}, rows...)
	inner, err := ebpf.NewMap(&ebpf.MapSpec{
		Type: ebpf.Array, KeySize: 4, ValueSize: uint32(unsafe.Sizeof(SetRow{})),
		MaxEntries: uint32(len(rows)), Flags: 0x1000, // BPF_F_INNER_MAP
	})
	if err != nil {
		t.Fatalf("create a set: %v", err)
	}
	t.Cleanup(func() { inner.Close() })
	for i, row := range rows {
		if err := inner.Put(uint32(i), row); err != nil {
			t.Fatalf("write a set: %v", err)
		}
	}
	h.put(t, "sets", id, inner)
	return inner
}

func (h *hooks) service(t *testing.T, addr string, s Service) {
	t.Helper()
	at := netip.MustParseAddrPort(addr)
	h.put(t, "services", EndpointKey{Addr: abiIpAddr(FromAddr(at.Addr())), Port: at.Port()}, s)
}

func (h *hooks) endpoint(t *testing.T, id uint32) Endpoint {
	t.Helper()
	var e Endpoint
	if err := h.maps["endpoints"].Lookup(id, &e); err != nil {
		t.Fatalf("endpoint %d: %v", id, err)
	}
	return e
}

// listenAt puts a listener where an endpoint is to be.
func (h *hooks) listenAt(t *testing.T, addr string) *net.TCPListener {
	t.Helper()
	var l net.Listener
	h.ns.Do(t, func() error {
		var err error
		config := net.ListenConfig{}
		config.SetMultipathTCP(false)
		l, err = config.Listen(t.Context(), "tcp", addr)
		return err
	})
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// ask is a dry run.
func (h *hooks) ask(t *testing.T, question DryRun) DryRun {
	t.Helper()
	size := 14 + unsafe.Sizeof(question)
	in, out := make([]byte, size), make([]byte, size)
	if _, err := binary.Encode(in[14:], binary.NativeEndian, question); err != nil {
		t.Fatal(err)
	}
	h.ns.Do(t, func() error {
		_, err := h.progs[ProgExplain].Run(&ebpf.RunOptions{Data: in, DataOut: out})
		return err
	})
	var answer DryRun
	if _, err := binary.Decode(out[14:], binary.NativeEndian, &answer); err != nil {
		t.Fatal(err)
	}
	return answer
}

// TestDirect sends connections straight to endpoints, in every family.
func TestDirect(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.serve(t)
	for _, s := range []struct {
		id            uint32
		addr, to, bad string
	}{
		{1, "10.96.0.12:80", "127.0.0.1:8001", "127.0.0.1:1"},
		{2, "[2001:db8::12]:80", "[::1]:8002", "[::1]:1"},
	} {
		h.service(t, s.addr, Service{Id: s.id, Path: uint8(PathDirect), NoEndpoint: 113})
		h.publish(t, s.id, SetConfig{Failures: 3, Base: 1000, Max: 2000, Panic: 50}, 0, 10*s.id, []endpointOf{{s.to, 1}})
		h.listenAt(t, s.to)
	}
	h.service(t, "10.96.0.13:80", Service{Id: 3, Path: uint8(PathDirect), NoEndpoint: 113}) // no set
	h.service(t, "10.96.0.14:80", Service{Id: 4, Path: uint8(PathPass)})
	want := []string{
		"10.96.0.12:80 10.96.0.12:80",
		"[2001:db8::12]:80 [2001:db8::12]:80",
		"10.96.0.13:80 EHOSTUNREACH",
		"10.96.0.14:80 ENETUNREACH",
	}
	if diff := cmp.Diff(want, h.dial(t, "10.96.0.12:80", "[2001:db8::12]:80", "10.96.0.13:80", "10.96.0.14:80")); diff != "" {
		t.Errorf("what the application saw (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{
		"denied deny no_endpoint 10.96.0.13:80",
		"end direct service 10.96.0.12:80",
		"end direct service [2001:db8::12]:80",
	}, h.events(t, 3)); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	for _, id := range []uint32{10, 20} {
		if diff := cmp.Diff(Endpoint{Connects: 1}, h.endpoint(t, id)); diff != "" {
			t.Errorf("endpoint %d (-want +got):\n%s", id, diff)
		}
	}
	if diff := cmp.Diff(map[uint32]uint64{
		TallyConnects: 2, TallyDecided: 3, TallyDenied: 1, TallyUnsent: 1, TallySentDirect: 2,
	}, h.counts(t, "tallies")); diff != "" {
		t.Errorf("tallies (-want +got):\n%s", diff)
	}
}
