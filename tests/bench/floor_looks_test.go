package main

import (
	"os/exec"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/pillion-project/pillion/tests/testutil"
)

// TestLooks: each of the programs finds all that it looks for, and so comes to its end,
// where it counts.
func TestLooks(t *testing.T) {
	for _, name := range []string{floorPass, floorDirect} {
		t.Run(name, func(t *testing.T) {
			all, cgroup := attached(t, name)
			cmd := exec.Command("bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/9") // refused
			if err := (testutil.Place{NS: testutil.NewNS(t), Cgroup: cgroup}).Start(cmd); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			info, err := all[name].Info()
			if err != nil {
				t.Fatal(err)
			}
			ids, _ := info.MapIDs()
			counted := uint64(0)
			for _, id := range ids {
				m, err := ebpf.NewMapFromID(id)
				if err != nil {
					t.Fatal(err)
				}
				if about, err := m.Info(); err == nil && about.Name == "tallies" {
					var perCPU []uint64
					if err := m.Lookup(uint32(1), &perCPU); err != nil {
						t.Error(err)
					}
					for _, n := range perCPU {
						counted += n
					}
				}
				m.Close()
			}
			if counted != 1 {
				t.Errorf("%d runs came to the end, want one", counted)
			}
		})
	}
}
