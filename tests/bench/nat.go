package main

import (
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
)

// nat is a way to balance in the kernel that users know: the destination of a
// service is translated in the application's own network namespace.
type nat struct {
	name string
	// install makes the service in ns, or says why that cannot be here.
	install func(ns *os.File, service netip.AddrPort, endpoints []netip.AddrPort) error
}

var nats = []nat{
	{"nftables", installNftables},
	{"iptables", installIptables},
	{"ipvs", installIPVS},
}

// installNftables is what kube-proxy does in its mode nftables, for one service.
func installNftables(ns *os.File, service netip.AddrPort, endpoints []netip.AddrPort) error {
	var to []string
	for i, e := range endpoints {
		to = append(to, fmt.Sprintf("%d : %s . %d", i, e.Addr(), e.Port()))
	}
	rules := fmt.Sprintf(`table ip bench {
	chain output {
		type nat hook output priority -100; policy accept;
		ip daddr %s tcp dport %d dnat ip addr . port to numgen random mod %d map { %s }
	}
}
`, service.Addr(), service.Port(), len(endpoints), strings.Join(to, ", "))
	if err := command(ns, rules, "nft", "-f", "-"); err != nil {
		return err
	}
	return forget(ns)
}

// installIptables is what kube-proxy does in its mode iptables. The older of the
// two programs of that name is the one that is not nftables again.
func installIptables(ns *os.File, service netip.AddrPort, endpoints []netip.AddrPort) error {
	for i, e := range endpoints {
		args := []string{"-t", "nat", "-A", "OUTPUT", "-d", service.Addr().String(), "-p", "tcp", "--dport", fmt.Sprint(service.Port())}
		if left := len(endpoints) - i; left > 1 {
			args = append(args, "-m", "statistic", "--mode", "random", "--probability", fmt.Sprintf("%.10f", 1/float64(left)))
		}
		args = append(args, "-j", "DNAT", "--to-destination", e.String())
		if err := command(ns, "", "iptables-legacy", args...); err != nil {
			return err
		}
	}
	return forget(ns)
}

// installIPVS is what kube-proxy does in its mode ipvs: the service's address is
// the namespace's own.
func installIPVS(ns *os.File, service netip.AddrPort, endpoints []netip.AddrPort) error {
	if _, err := netlink.GenlFamilyGet("IPVS"); err != nil {
		return fmt.Errorf("this kernel has no IPVS (generic netlink family: %w)", err)
	}
	if err := command(ns, "", "ip", "addr", "add", netip.PrefixFrom(service.Addr(), 32).String(), "dev", "lo"); err != nil {
		return err
	}
	if err := command(ns, "", "ipvsadm", "-A", "-t", service.String(), "-s", "rr"); err != nil {
		return err
	}
	for _, e := range endpoints {
		if err := command(ns, "", "ipvsadm", "-a", "-t", service.String(), "-r", e.String(), "-m"); err != nil {
			return err
		}
	}
	return nil
}

// forget has the kernel keep a translation for five seconds after its connection,
// in the peers' favour: with the two minutes of the default, the machine's one
// table of them fills up in a run, and connections fail.
func forget(ns *os.File) error {
	return within(ns, func() error {
		return os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait", []byte("5"), 0)
	})
}
