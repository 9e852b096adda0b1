package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/loader/probe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// removeOrphans takes away the slot routes of this network namespace that no
// instance has: one that was swept from another namespace has left its own here.
// Provably: no record that can be seen names the range, nobody listens on it, and
// every look-up program that is attached here is of an instance that can be seen;
// others may keep their pins elsewhere. The caller holds the root's lock.
func (d *Datapath) removeOrphans() error {
	seen, err := d.neighbours()
	if err != nil {
		return err
	}
	if all, err := seen.explain(); err != nil || !all {
		return err
	}
	filter := &netlink.Route{Table: unix.RT_TABLE_LOCAL, Protocol: probe.RouteProtocol}
	list, err := d.network.handle.RouteListFiltered(netlink.FAMILY_ALL, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return fmt.Errorf("list slot routes: %w", err)
	}
	// Of both families, since a handler may listen on one alone.
	err = d.network.listening(func(s *socket) { seen.take(s.local.Addr()) })
	if err != nil {
		return err
	}
	var errs []error
	for i := range list {
		p, ok := routePrefix(&list[i])
		if !ok || !inSupernet(p.Addr()) || seen.ranges[rangeNumber(p.Addr())] {
			continue
		}
		err := d.network.removeRoute(p)
		if err == nil {
			d.options.Log.Warn("removed a slot route that no instance has", "route", p)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// rangeNumber is that of the range which a slot is in.
func rangeNumber(slot netip.Addr) int {
	b := slot.As16()
	if slot.Is4() {
		return int(b[13] & (ranges - 1))
	}
	return int(binary.BigEndian.Uint16(b[6:]))
}

// neighbours are the instances of one network namespace, as far as their pins
// can be seen.
type neighbours struct {
	ranges  map[int]bool // by number, those that are somebody's
	lookups map[ebpf.ProgramID]bool
}

func (d *Datapath) neighbours() (*neighbours, error) {
	n := &neighbours{ranges: map[int]bool{}, lookups: map[ebpf.ProgramID]bool{}}
	root := filepath.Dir(d.dir.path)
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, fmt.Errorf("list instances: %w", err)
	}
	for _, e := range entries {
		other := &dir{path: filepath.Join(root, e.Name())}
		m, i, err := readInstance(other)
		if err != nil {
			continue // not ours to judge, or not there yet
		}
		m.Close()
		if i.Netns != d.options.Scope.Netns {
			continue
		}
		n.ranges[rangeOf(&i).number] = true
		l, err := link.LoadPinnedLink(other.pin(linkPrefix+bpf.ProgLookup), nil)
		if err != nil {
			continue
		}
		if info, err := l.Info(); err == nil {
			n.lookups[info.Program] = true
		}
		l.Close()
	}
	return n, nil
}

// take notes that somebody uses an address, if it is a slot.
func (n *neighbours) take(a netip.Addr) {
	if inSupernet(a) {
		n.ranges[rangeNumber(a)] = true
	}
}

// explain tells whether every look-up program of the calling thread's network
// namespace is a neighbour's.
func (n *neighbours) explain() (bool, error) {
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return false, fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()
	attached, err := link.QueryPrograms(link.QueryOptions{Target: int(ns.Fd()), Attach: ebpf.AttachSkLookup})
	if err != nil {
		return false, fmt.Errorf("list look-up programs: %w", err)
	}
	for _, p := range attached.Programs {
		if !n.lookups[p.ID] {
			return false, nil
		}
	}
	return true, nil
}
