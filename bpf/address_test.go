package bpf

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
)

// inspect asks the kernel side about one address and names what is true of it.
func inspect(t *testing.T, p *ebpf.Program, a netip.Addr) []string {
	t.Helper()
	io := coreRunAddress{In: coreIpAddr(FromAddr(a)), Slot4: testSlot4, Slot6: testSlot6}
	run(t, p, &io)
	var is []string
	for _, f := range []struct {
		name string
		set  uint8
	}{
		{"link-local", io.LinkLocal},
		{"loopback", io.Loopback},
		{"mapped", io.Mapped},
		{"metadata", io.Metadata},
		{"multicast", io.Multicast},
		{"supernet", io.InSupernet},
		{"zero", io.Zero},
	} {
		if f.set != 0 {
			is = append(is, f.name)
		}
	}
	return is
}

// TestAddresses goes along both sides of every border.
func TestAddresses(t *testing.T) {
	progs := loadCoreProgs(t)
	for _, tt := range []struct{ addr, want string }{
		// Loopback and unspecified, IPv4. Every IPv4 address is mapped.
		{"0.0.0.0", "mapped loopback"},
		{"0.0.0.1", "mapped"},
		{"126.255.255.255", "mapped"},
		{"127.0.0.0", "mapped loopback"},
		{"127.0.0.1", "mapped loopback"},
		{"127.255.255.255", "mapped loopback"},
		{"128.0.0.0", "mapped"},
		{"::ffff:127.0.0.1", "mapped loopback"},
		{"::ffff:0.0.0.0", "mapped loopback"},

		// Loopback and unspecified, IPv6.
		{"::", "zero loopback"},
		{"::1", "loopback"},
		{"::2", ""},
		{"::1:0", ""},
		{"::0.0.1.0", ""},
		{"::1:0:1", ""},
		{"0:0:0:1::1", ""},
		{"1::1", ""},
		{"::127.0.0.1", ""}, // v4-compatible, long withdrawn
		{"::fffe:127.0.0.1", ""},
		{"::1:0:7f00:1", ""},
		{"1::ffff:127.0.0.1", ""},
		{"0:0:1::ffff:7f00:1", ""},
		{"64:ff9b::127.0.0.1", ""}, // NAT64

		// Link-local.
		{"169.253.255.255", "mapped"},
		{"169.254.0.0", "mapped link-local"},
		{"169.254.255.255", "mapped link-local"},
		{"169.255.0.0", "mapped"},
		{"fe7f:ffff:ffff:ffff:ffff:ffff:ffff:ffff", ""},
		{"fe80::", "link-local"},
		{"febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "link-local"},
		{"fec0::", ""},

		// Metadata services, and their neighbours.
		{"169.254.169.253", "mapped link-local"}, // AWS's resolver
		{"169.254.169.254", "mapped link-local metadata"},
		{"169.254.169.255", "mapped link-local"},
		{"169.254.170.1", "mapped link-local"},
		{"169.254.170.2", "mapped link-local metadata"},
		{"169.254.170.3", "mapped link-local"},
		{"168.63.129.15", "mapped"},
		{"168.63.129.16", "mapped metadata"},
		{"168.63.129.17", "mapped"},
		{"100.100.100.199", "mapped"},
		{"100.100.100.200", "mapped metadata"},
		{"100.100.100.201", "mapped"},
		{"fd00:ec2::253", ""},
		{"fd00:ec2::254", "metadata"},
		{"fd00:ec2::255", ""},
		{"fd00:ec3::254", ""},
		{"fd00:ec2:1::254", ""},
		{"fd00:ec2::1:254", ""},
		{"fd00:ec2:0:0:1::254", ""},
		{"fd00:ec2::23", "metadata"},
		{"fd00:ec2::22", ""},
		{"fd00:ec2:0:1::23", ""},
		{"fd00:c1::a9fe:a9fe", "metadata"},
		{"fd00:c1::254", ""},
		{"fd00:42::42", "metadata"},
		{"fd00:42::254", ""},
		{"fd20:ce::23", ""},
		{"fd20:ce::253", ""},
		{"fd20:ce::254", "metadata"},
		{"fd20:ce::255", ""},
		{"fd20:cf::254", ""},
		{"fd20:ce:1::254", ""},
		{"fd20:ce:0:0:1::254", ""},

		// Multicast and broadcast.
		{"223.255.255.255", "mapped"},
		{"224.0.0.0", "mapped multicast"},
		{"239.255.255.255", "mapped multicast"},
		{"255.255.255.254", "mapped"},
		{"255.255.255.255", "mapped multicast"},
		{"feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", ""},
		{"ff00::", "multicast"},
		{"ff02::1", "multicast"},
		{"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "multicast"},

		// The slot supernets.
		{"240.0.0.0", "mapped supernet"},
		{"240.63.255.255", "mapped supernet"},
		{"240.64.0.0", "mapped"},
		{"::ffff:240.0.0.1", "mapped supernet"},
		{"::240.0.0.1", ""},
		{"fd70:696c:6c68:ffff:ffff:ffff:ffff:ffff", ""},
		{"fd70:696c:6c69::", "supernet"},
		{"fd70:696c:6c69:ffff:ffff:ffff:ffff:ffff", "supernet"},
		{"fd70:696c:6c6a::", ""},
		{"fd70:696b:6c69::", ""},
		{"fd70:696d:6c69::", ""},

		// Of no scope.
		{"10.96.0.12", "mapped"},
		{"100.64.0.1", "mapped"},
		{"2001:db8::1", ""},
		{"fc00::", ""},
	} {
		t.Run(tt.addr, func(t *testing.T) {
			want := strings.Fields(tt.want)
			slices.Sort(want)
			got := inspect(t, progs.PlAddress, netip.MustParseAddr(tt.addr))
			if diff := cmp.Diff(strings.Join(want, " "), strings.Join(got, " ")); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestAddressesAsNetip compares with package netip where both know a scope.
func TestAddressesAsNetip(t *testing.T) {
	progs := loadCoreProgs(t)
	broadcast := netip.MustParseAddr("255.255.255.255")
	for i := range 256 {
		for _, a := range []netip.Addr{
			netip.AddrFrom4([4]byte{byte(i), 254, 1, 1}),
			netip.AddrFrom4([4]byte{169, byte(i), 1, 1}),
			netip.AddrFrom16([16]byte{byte(i), 0x80, 15: 9}),
			netip.AddrFrom16([16]byte{0xfe, byte(i), 15: 9}),
			netip.AddrFrom16([16]byte{15: byte(i)}),
			netip.AddrFrom16([16]byte{10: byte(i), 11: 255, 12: 127}),
		} {
			got := inspect(t, progs.PlAddress, a)
			for scope, want := range map[string]bool{
				"loopback":   a.Unmap().IsLoopback() || a.Unmap().IsUnspecified(),
				"link-local": a.Unmap().IsLinkLocalUnicast(),
				"multicast":  a.Unmap().IsMulticast() || a == broadcast,
				"mapped":     a.Unmap().Is4(),
			} {
				if slices.Contains(got, scope) != want {
					t.Errorf("%v: %s is %v in C, %v in Go", a, scope, !want, want)
				}
			}
		}
	}
}

func TestSlotOf(t *testing.T) {
	progs := loadCoreProgs(t)
	const ours4, ours6 = testSlot4, testSlot6
	for _, tt := range []struct {
		addr         string
		slot4, slot6 uint32
		want         int32
	}{
		{"240.4.255.255", ours4, ours6, -1},
		{"240.5.0.0", ours4, ours6, 0},
		{"240.5.0.1", ours4, ours6, SlotFirst},
		{"::ffff:240.5.0.1", ours4, ours6, SlotFirst},
		{"240.5.255.239", ours4, ours6, SlotLast},
		{"240.5.255.253", ours4, ours6, SlotListener},
		{"240.5.255.254", ours4, ours6, SlotCanary},
		{"240.5.255.255", ours4, ours6, Slots - 1},
		{"240.6.0.0", ours4, ours6, -1},
		{"240.0.0.1", 0xf0000000, 0, 1},
		{"240.63.255.255", 0xf03f0000, 0, Slots - 1},
		{"10.96.0.12", ours4, ours6, -1},
		{"0.5.0.1", ours4, ours6, -1},
		{"::240.5.0.1", ours4, ours6, -1},

		{"fd70:696c:6c69:8:ffff:ffff:ffff:ffff", ours4, ours6, -1},
		{"fd70:696c:6c69:9::", ours4, ours6, 0},
		{"fd70:696c:6c69:9::1", ours4, ours6, SlotFirst},
		{"fd70:696c:6c69:9::ffef", ours4, ours6, SlotLast},
		{"fd70:696c:6c69:9::fffd", ours4, ours6, SlotListener},
		{"fd70:696c:6c69:9::fffe", ours4, ours6, SlotCanary},
		{"fd70:696c:6c69:9::ffff", ours4, ours6, Slots - 1},
		// The rest of the /64 is ours too, and answers like a slot that
		// nothing is ever named after.
		{"fd70:696c:6c69:9::1:0", ours4, ours6, Slots - 1},
		{"fd70:696c:6c69:9:0:1::", ours4, ours6, Slots - 1},
		{"fd70:696c:6c69:9:ffff:ffff:ffff:ffff", ours4, ours6, Slots - 1},
		{"fd70:696c:6c69:a::", ours4, ours6, -1},
		{"fd70:696c:6c69:ffff::1", ours4, 0xffff, 1},
		{"fd70:696c:6c69::1", ours4, 0, 1},
		{"fd70:696c:6c6a:9::1", ours4, ours6, -1},
		{"fd70:696d:6c69:9::1", ours4, ours6, -1},
		{"2001:db8::1", ours4, ours6, -1},
		{"::", ours4, ours6, -1},
	} {
		name := fmt.Sprintf("%s in %x %x", tt.addr, tt.slot4, tt.slot6)
		t.Run(name, func(t *testing.T) {
			io := coreRunAddress{In: coreAddr(tt.addr), Slot4: tt.slot4, Slot6: tt.slot6}
			run(t, progs.PlAddress, &io)
			if io.Slot != tt.want {
				t.Errorf("slot_of: %d, want %d", io.Slot, tt.want)
			}
		})
	}
}

func TestSlotAddr(t *testing.T) {
	progs := loadCoreProgs(t)
	for _, tt := range []struct {
		like string
		n    uint32
		want string
	}{
		{"10.96.0.12", 0, "240.5.0.0"},
		{"10.96.0.12", SlotFirst, "240.5.0.1"},
		{"::ffff:10.96.0.12", SlotFirst, "240.5.0.1"},
		{"10.96.0.12", SlotLast, "240.5.255.239"},
		{"10.96.0.12", SlotListener, "240.5.255.253"},
		{"10.96.0.12", Slots - 1, "240.5.255.255"},
		{"2001:db8::1", 0, "fd70:696c:6c69:9::"},
		{"2001:db8::1", SlotFirst, "fd70:696c:6c69:9::1"},
		{"2001:db8::1", SlotLast, "fd70:696c:6c69:9::ffef"},
		{"2001:db8::1", SlotListener, "fd70:696c:6c69:9::fffd"},
		{"2001:db8::1", Slots - 1, "fd70:696c:6c69:9::ffff"},
	} {
		io := coreRunSlotAddr{Like: coreAddr(tt.like), N: tt.n, Slot4: testSlot4, Slot6: testSlot6}
		run(t, progs.PlSlotAddr, &io)
		if got := ToAddr(IPAddr(io.Out)); got != netip.MustParseAddr(tt.want) {
			t.Errorf("slot_addr(%s, %#x): %v, want %s", tt.like, tt.n, got, tt.want)
		}
	}
}

// TestSlotsThereAndBack names slots and finds them again, in both families.
func TestSlotsThereAndBack(t *testing.T) {
	progs := loadCoreProgs(t)
	step := uint32(251) // a prime: all low bytes come up
	for _, like := range []string{"10.96.0.12", "2001:db8::1"} {
		for n := uint32(0); n < Slots; n += step {
			there := coreRunSlotAddr{Like: coreAddr(like), N: n, Slot4: testSlot4, Slot6: testSlot6}
			run(t, progs.PlSlotAddr, &there)
			back := coreRunAddress{In: there.Out, Slot4: testSlot4, Slot6: testSlot6}
			run(t, progs.PlAddress, &back)
			if back.Slot != int32(n) || back.InSupernet == 0 {
				t.Fatalf("slot %d is at %v, which is slot %d (in the supernet: %d)",
					n, ToAddr(IPAddr(there.Out)), back.Slot, back.InSupernet)
			}
		}
	}
}
