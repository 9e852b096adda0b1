package rig

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/loader/probe"
)

// gone fails the test unless nothing of the instance is left in the kernel. The
// routes of its slots cannot be told from those of others, so they are looked
// at when the rig's last instance has ended.
func (i *Instance) gone(t testing.TB) {
	t.Helper()
	pins := filepath.Join(loader.BPFFS, "pillion", i.Name)
	if _, err := os.Stat(pins); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pins are left in %s: %v", pins, err)
	}
	if i.rig.instances.Add(-1) > 0 {
		return
	}
	err := i.rig.App.Run(func() error {
		filter := &netlink.Route{Table: unix.RT_TABLE_LOCAL, Protocol: probe.RouteProtocol}
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
		if err == nil && len(routes) > 0 {
			err = fmt.Errorf("routes of slots are left: %v", routes)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
