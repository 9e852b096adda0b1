package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
)

// moveTries bounds how often sockets are looked through: one that ends meanwhile is not
// found.
const moveTries = 3

// moveSockets makes the entries of sockets at which nothing has happened since the hooks
// were swapped. What it cannot find, such as a socket whose connect was refused by the
// kernel itself, is moved when something happens there.
func (d *Datapath) moveSockets(m *move) (err error) {
	ours, err := d.openCells()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ours.close()) }()
	theirs, err := m.openCells()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, theirs.close()) }()
	opened, _ := find(m.from.Maps["decisions"].Value, "opened")
	for range moveTries {
		var left []*socket
		has := map[uint64]bool{}
		err := d.network.storages(d.maps.Decisions, func(s *socket) {
			has[s.cookie()] = has[s.cookie()] || len(s.storage) > 0 || ours.of(s.cookie()) != nil
		})
		if err != nil {
			return err
		}
		err = d.network.storages(m.old["decisions"], func(s *socket) {
			was := theirs.of(s.cookie())
			if len(s.storage) == int(m.from.Maps["decisions"].ValueSize) {
				was = s.storage
			}
			if was != nil && (!has[s.cookie()] || m.again == goesBack) && binary.NativeEndian.Uint64(was[opened.At:]) != 0 {
				left = append(left, s)
			}
		})
		if err != nil || len(left) == 0 {
			return err
		}
		for _, s := range left {
			q := bpf.Move{
				Cookie: s.cookie(),
				Own:    bpf.FromAddr(s.local.Addr()), Peer: bpf.FromAddr(s.remote.Addr()),
				OwnPort: s.local.Port(), PeerPort: s.remote.Port(),
			}
			if _, err := d.askMove(bpf.ProgMove, q, s.device()); err != nil {
				return fmt.Errorf("move what is stored with a socket: %w", err)
			}
		}
	}
	return nil
}

// askMove runs one of the programs of bpf/move.bpf.c. It tells whether that did anything.
func (d *Datapath) askMove(program string, q bpf.Move, device uint32) (bool, error) {
	const size = unsafe.Sizeof(q)
	frame := make([]byte, dryRunAt+size)
	copy(frame[dryRunAt:], (*[size]byte)(unsafe.Pointer(&q))[:])
	o := ebpf.RunOptions{Data: frame}
	if device != 0 {
		o.Context = testRunDevice{ifindex: device}
	}
	did, err := d.programs[program].Run(&o)
	return did == 1, err
}

// testRunDevice is struct __sk_buff up to ifindex. Only that may be set.
type testRunDevice struct {
	_       [10]uint32
	ifindex uint32
}
