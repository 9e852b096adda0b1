package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Existing is a connection in scope that is older than the attach.
type Existing struct {
	Source, Destination netip.AddrPort
	Cgroup              uint64
	socket              *socket
}

// existing lists the connections that applications in scope have opened, to
// where they would be captured. Those that they have accepted are not
// captured in any case: their own port is one that somebody listens on.
func (d *Datapath) existing() ([]Existing, error) {
	cgroups, err := cgroupsBelow(d.options.Scope.dir())
	if err != nil {
		return nil, err
	}
	ports := map[uint16]bool{}
	if err := d.network.listening(func(s *socket) { ports[s.local.Port()] = true }); err != nil {
		return nil, err
	}
	var all []Existing
	err = d.network.sockets(func(s *socket) {
		to := s.remote.Addr()
		own := s.cgroup != 0 && s.cgroup == d.options.Own // of the process itself, in a pod
		if !cgroups[s.cgroup] || own || ports[s.local.Port()] || to.IsLoopback() || to.IsLinkLocalUnicast() || inSupernet(to) {
			return
		}
		all = append(all, Existing{Source: s.local, Destination: s.remote, Cgroup: s.cgroup, socket: s})
	})
	return all, err
}

func inSupernet(a netip.Addr) bool { return super4.Contains(a) || super6.Contains(a) }

// cgroupsBelow returns the ids of a cgroup and all below it.
func cgroupsBelow(path string) (map[uint64]bool, error) {
	ids := map[uint64]bool{}
	err := filepath.WalkDir(path, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it ended while we looked
		}
		if err != nil || !e.IsDir() {
			return err
		}
		id, err := cgroupID(path)
		if err == nil {
			ids[id] = true
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list cgroups below %s: %w", path, err)
	}
	return ids, nil
}

// Reset ends connections, so that their applications connect again and are
// captured.
func (d *Datapath) Reset(old []Existing) error {
	var errs []error
	for _, e := range old {
		if err := d.network.destroy(e.socket); !errors.Is(err, unix.ENOENT) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
