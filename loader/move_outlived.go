package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// copyOutlived moves what sockops has noted of connections that ended before their MPTCP
// sockets, and only the names hooks read: when sockops is swapped and they are not yet,
// and once more when no old sockops is at work. What the new sockops has noted stays.
func (d *Datapath) copyOutlived(m *move) error {
	const name = "outlived"
	if !m.has(name) {
		return nil
	}
	from, into := m.from.Maps[name], m.to.Maps[name]
	keys, values := spansOf(from.Key, into.Key), spansOf(from.Value, into.Value)
	var key, value []byte
	it := m.old[name].Iterate()
	for it.Next(&key, &value) {
		err := d.maps.Outlived.Update(translate(keys, key, into.KeySize), translate(values, value, into.ValueSize), ebpf.UpdateNoExist)
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return fmt.Errorf("move map %s: %w", name, err)
		}
	}
	// Where entries are pushed out meanwhile, some are met twice or not at all: they
	// are the oldest ones.
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("move map %s: %w", name, err)
	}
	return nil
}
