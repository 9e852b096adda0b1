package node

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Where things are on a node.
const (
	// Name is the node's.
	Name = "n1"
	// Address is the node's, and PodRange that of its pods.
	Address  = "10.200.0.1"
	PodRange = "10.202.0.0/24"
	// PinDir is where Pillion's instances have their pins.
	PinDir = "/sys/fs/bpf/pillion"

	link = "node0"
)

// ownDirs are where CNI and the kubelet write what no setting moves. A machine need
// not have them.
var ownDirs = []string{"/var/lib/cni", "/var/lib/kubelet"}

// prepare makes the machine: what is mounted and set up here is seen and used by
// nobody outside of the namespaces.
func prepare(dir string, l Layout, cgroup string) error {
	for _, m := range append([]string{dir, "/run", "/var/log"}, ownDirs...) {
		if err := unix.Mount("tmpfs", m, "tmpfs", 0, "mode=0755"); err != nil {
			return fmt.Errorf("mount a tmpfs on %s: %w", m, err)
		}
	}
	for _, d := range []string{"/run/netns", "/run/lock", "/run/containerd"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, ""); err != nil {
		return fmt.Errorf("mount a bpffs: %w", err)
	}
	if err := shadow(); err != nil {
		return err
	}
	if err := control(l, cgroup); err != nil {
		return err
	}
	// Containers see what is mounted later, as on a node of systemd's.
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("share the mounts: %w", err)
	}
	return network()
}

// shadow puts files in the place of those settings that the kubelet writes and
// that are the whole machine's.
func shadow() error {
	for _, key := range []string{"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
		"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"} {
		real := filepath.Join("/proc/sys", key)
		b, err := os.ReadFile(real)
		if err != nil {
			return fmt.Errorf("read a setting: %w", err)
		}
		name := filepath.Join("/run", strings.ReplaceAll(key, "/", "."))
		if err := os.WriteFile(name, b, 0o644); err != nil {
			return err
		}
		if err := unix.Mount(name, real, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("shadow %s: %w", real, err)
		}
	}
	return nil
}

// control makes the cgroup that the kubelet has for its root.
func control(l Layout, name string) error {
	const root = "/sys/fs/cgroup"
	if l == Hybrid {
		for _, h := range hierarchies() {
			if isCgroup(h) {
				if err := os.MkdirAll(filepath.Join(h, name), 0o755); err != nil {
					return fmt.Errorf("make a cgroup: %w", err)
				}
			}
		}
		return nil
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	all := strings.Split(string(mounts), "\n")
	for i := len(all) - 1; i >= 0; i-- {
		if w := strings.Fields(all[i]); len(w) > 2 && strings.HasPrefix(w[1], root) {
			if err := unix.Unmount(w[1], unix.MNT_DETACH); err != nil {
				return fmt.Errorf("unmount %s: %w", w[1], err)
			}
		}
	}
	if err := unix.Mount("none", root, "cgroup2", 0, ""); err != nil {
		return fmt.Errorf("mount cgroup v2: %w", err)
	}
	controllers, err := os.ReadFile(root + "/cgroup.controllers")
	if err != nil {
		return err
	}
	for _, c := range strings.Fields(string(controllers)) {
		if err := os.WriteFile(root+"/cgroup.subtree_control", []byte("+"+c), 0); err != nil {
			return fmt.Errorf("turn the controller %s on: %w", c, err)
		}
	}
	return os.Mkdir(filepath.Join(root, name), 0o755)
}

// network has the node's address, and a way to everywhere that leads nowhere.
func network() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: link}}
	if err := netlink.LinkAdd(bridge); err != nil {
		return fmt.Errorf("add the node's link: %w", err)
	}
	for _, l := range []netlink.Link{lo, bridge} {
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("set the node's link up: %w", err)
		}
	}
	if err := give(netip.MustParsePrefix(Address + "/24")); err != nil {
		return err
	}
	gateway := net.ParseIP("10.200.0.254")
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: bridge.Index, Gw: gateway}); err != nil {
		return fmt.Errorf("add the default route: %w", err)
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
}

// give gives the node an address.
func give(p netip.Prefix) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(p.String())
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(l, addr); err != nil {
		return fmt.Errorf("give the node %s: %w", p, err)
	}
	return nil
}
