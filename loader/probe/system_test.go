package probe

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/tests/testutil"
)

func TestRanges(t *testing.T) {
	testutil.RequireRoot(t)
	add := func(cidr string, r netlink.Route) func() error {
		return func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			r.Dst, err = netlink.ParseIPNet(cidr)
			if err != nil {
				return err
			}
			if r.Type != unix.RTN_BLACKHOLE {
				r.LinkIndex = lo.Attrs().Index
			}
			return netlink.RouteAdd(&r)
		}
	}
	tests := map[string]struct {
		addr  string
		route func() error
		want  Level
		says  string
	}{
		"free":            {says: "0 routes of Pillion's"},
		"address":         {addr: "240.1.2.3/24", want: Warn, says: "address 240.1.2.3/24"},
		"address, v6":     {addr: "fd70:696c:6c69:7::1/64", want: Warn, says: "fd70:696c:6c69:7::1"},
		"beside":          {addr: "240.64.0.1/24", says: "0 routes"},
		"beside, v6":      {addr: "fd70:696c:6c6a::1/64", says: "0 routes"},
		"route":           {route: add("240.5.0.0/16", netlink.Route{Protocol: 4}), want: Warn, says: "route 240.5.0.0/16"},
		"class E":         {route: add("240.0.0.0/4", netlink.Route{Protocol: 4}), want: Warn, says: "route 240.0.0.0/4"},
		"another table":   {route: add("240.5.0.0/16", netlink.Route{Protocol: 4, Table: 77}), want: Warn, says: "table 77"},
		"v6 route":        {route: add("fd70:696c::/32", netlink.Route{Protocol: 4}), want: Warn, says: "route fd70:696c::/32"},
		"bogon blackhole": {route: add("240.0.0.0/4", netlink.Route{Type: unix.RTN_BLACKHOLE}), says: "0 routes"},
		"default":         {route: add("0.0.0.0/0", netlink.Route{Protocol: 4}), says: "0 routes"},
		"ours": {route: add("240.5.0.0/16", netlink.Route{
			Protocol: RouteProtocol, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST,
		}), says: "1 routes of Pillion's"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := testutil.NewNS(t)
			if tt.addr != "" {
				ns.AddAddr(t, "lo", netip.MustParsePrefix(tt.addr))
			}
			if tt.route != nil {
				ns.Do(t, tt.route)
			}
			var found []Finding
			ns.Do(t, func() error {
				found = checkRanges(context.Background(), newMachine(Options{}))
				return nil
			})
			wellFormed(t, found)
			if len(found) != 1 || found[0].Level != tt.want || !strings.Contains(found[0].Detail, tt.says) {
				t.Errorf("want %s with %q, got %+v", tt.want, tt.says, found)
			}
		})
	}
}

// TestSysctlsOfNamespace proves that the values are those of the namespace that
// the caller is in.
func TestSysctlsOfNamespace(t *testing.T) {
	ns := testutil.NewNS(t)
	ns.Sysctl(t, "net/ipv4/ip_local_port_range", "50000 50009")
	ns.Sysctl(t, "net/ipv6/conf/all/disable_ipv6", "1")
	ns.Do(t, func() error {
		found := checkSysctls(context.Background(), newMachine(Options{}))
		wellFormed(t, found)
		if found[0].Level != Warn || !strings.Contains(found[0].Detail, "10 ports") {
			t.Errorf("%+v", found[0])
		}
		if !strings.Contains(found[2].Detail, "every interface") {
			t.Errorf("%+v", found[2])
		}
		return nil
	})
}

// attach puts a program of this name on a cgroup until the test ends.
func attach(t *testing.T, cgroup *testutil.Cgroup, name string, typ ebpf.ProgramType, at ebpf.AttachType) {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: typ, AttachType: at, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	l, err := link.AttachRawLink(link.RawLinkOptions{Target: cgroup.FD(), Program: p, Attach: at})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
}

func TestForeign(t *testing.T) {
	testutil.RequireRoot(t)
	const (
		addr = ebpf.CGroupSockAddr
		skb  = ebpf.CGroupSKB
	)
	tests := map[string]struct {
		setUp func(t *testing.T, parent, scope *testutil.Cgroup)
		want  Level
		says  []string
	}{
		"nothing": {func(*testing.T, *testutil.Cgroup, *testutil.Cgroup) {}, OK, []string{"none that meets"}},
		"ours": {func(t *testing.T, parent, scope *testutil.Cgroup) {
			attach(t, scope, "pl_connect4", addr, ebpf.AttachCGroupInet4Connect)
			attach(t, parent, "pl_sockops", ebpf.SockOps, ebpf.AttachCGroupSockOps)
		}, OK, []string{"none that meets"}},
		"before ours": {func(t *testing.T, parent, scope *testutil.Cgroup) {
			attach(t, scope, "first", addr, ebpf.AttachCGroupInet4Connect)
			attach(t, scope, "second", addr, ebpf.AttachCGroupInet4Connect)
		}, Warn, []string{"run before", "first (id", "number 1 at connect4", "second (id", "number 2 at connect4"}},
		"after ours": {func(t *testing.T, parent, scope *testutil.Cgroup) {
			attach(t, parent, "cil_sock4", addr, ebpf.AttachCGroupInet4Connect)
		}, OK, []string{"run after", "cil_sock4"}},
		"sockops": {func(t *testing.T, parent, scope *testutil.Cgroup) {
			attach(t, parent, "mesh", ebpf.SockOps, ebpf.AttachCGroupSockOps)
		}, Warn, []string{"callback flags", "mesh"}},
		"systemd": {func(t *testing.T, parent, scope *testutil.Cgroup) {
			attach(t, scope, "sd_fw_egress", skb, ebpf.AttachCGroupInetEgress)
			attach(t, parent, "sd_fw_ingress", skb, ebpf.AttachCGroupInetIngress)
		}, Warn, []string{"IPAddressAllow=", "sd_fw_egress", "sd_fw_ingress"}},
		"filter": {func(t *testing.T, parent, scope *testutil.Cgroup) {
			attach(t, parent, "tally", skb, ebpf.AttachCGroupInetEgress)
		}, Warn, []string{"filter packets", "tally"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			parent := testutil.NewCgroup(t)
			scope := parent.Child(t, "scope")
			tt.setUp(t, parent, scope)
			found := checkForeign(context.Background(), newMachine(Options{Cgroup: scope.Path}))
			wellFormed(t, found)
			worst := OK
			var text strings.Builder
			for _, f := range found {
				worst = max(worst, f.Level)
				text.WriteString(f.Detail + "\n" + f.Cure + "\n")
			}
			if worst != tt.want {
				t.Errorf("worst is %s, want %s", worst, tt.want)
			}
			for _, says := range tt.says {
				if !strings.Contains(text.String(), says) {
					t.Errorf("%q is not in\n%s", says, &text)
				}
			}
		})
	}
}

func TestNoSuchCgroup(t *testing.T) {
	root := testutil.CgroupRoot(t)
	m := newMachine(Options{Cgroup: filepath.Join(root, "pillion-nothing-here")})
	for _, run := range []func(context.Context, *machine) []Finding{checkForeign, checkAttach} {
		found := run(context.Background(), m)
		wellFormed(t, found)
		if len(summary(found)) == 0 {
			t.Errorf("%+v", found)
		}
	}
}

// TestAttachRefused proves that a program above the scope which takes a hook
// for itself is found, and that the cgroup goes all the same.
func TestAttachRefused(t *testing.T) {
	testutil.RequireRoot(t)
	parent := testutil.NewCgroup(t)
	scope := parent.Child(t, "scope")
	p, err := load(ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, proceed())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	// Without flags: nobody below may attach.
	o := link.RawAttachProgramOptions{Target: parent.FD(), Program: p, Attach: ebpf.AttachCGroupInet4Connect}
	if err := link.RawAttachProgram(o); err != nil {
		t.Fatal(err)
	}
	defer link.RawDetachProgram(link.RawDetachProgramOptions{
		Target: parent.FD(), Program: p, Attach: ebpf.AttachCGroupInet4Connect,
	})
	found := checkAttach(context.Background(), newMachine(Options{Cgroup: scope.Path}))
	wellFormed(t, found)
	if got := strings.Join(summary(found), "\n"); got != "fail attach connect4" {
		t.Errorf("%s", got)
	}
	left, err := os.ReadDir(scope.Path)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range left {
		if e.IsDir() {
			t.Errorf("%s is left", e.Name())
		}
	}
}
