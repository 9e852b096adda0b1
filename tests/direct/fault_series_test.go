package direct

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/tests/rig"
)

// pinnedTally returns a function that tells how many events found the ring full,
// also while the process is stopped.
func pinnedTally(t testing.TB, i *rig.Instance) func() uint64 {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join("/sys/fs/bpf/pillion", i.Name, "tallies"), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return func() (sum uint64) {
		var all []uint64
		if err := m.Lookup(uint32(bpf.TallyEventsLost), &all); err != nil {
			t.Fatal(err)
		}
		for _, n := range all {
			sum += n
		}
		return sum
	}
}

// pause lets some time pass between two questions to an instance. It returns false.
func pause() bool {
	time.Sleep(100 * time.Millisecond)
	return false
}
