package rig

import (
	"bufio"
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/testutil"
)

// Memory is what an instance's process holds.
type Memory struct {
	Resident int // bytes in memory
	Heap     int // bytes of the heap in use
}

// String implements [fmt.Stringer].
func (m Memory) String() string {
	return fmt.Sprintf("%d KiB resident, %d KiB of heap", m.Resident>>10, m.Heap>>10)
}

// within tells whether m is at most a tenth more than before.
func (m Memory) within(before Memory) bool {
	return m.Resident <= before.Resident*11/10 && m.Heap <= before.Heap*11/10
}

// memoryLooks is how often Memory looks.
const memoryLooks = 20

// Memory returns the most that an instance without load holds: what it holds
// rises and falls with each garbage collection.
func (i *Instance) Memory(t testing.TB) (most Memory) {
	t.Helper()
	for range memoryLooks {
		m := i.memory(t)
		most.Resident, most.Heap = max(most.Resident, m.Resident), max(most.Heap, m.Heap)
		time.Sleep(50 * time.Millisecond)
	}
	return most
}

// settleLimit is how long the runtime has to give free memory back, which it does
// slowly.
const settleLimit = 2 * time.Minute

// Settles waits until an instance holds what it held before, but for a tenth.
func (i *Instance) Settles(t testing.TB, before Memory) {
	t.Helper()
	var now Memory
	testutil.Eventually(t, settleLimit, func() bool {
		now = i.memory(t)
		return now.within(before) || pause()
	}, "the instance holds what it held: ", before, "; it holds ", &now)
	t.Logf("memory: before %v, after %v", before, now)
}

func (i *Instance) memory(t testing.TB) (m Memory) {
	t.Helper()
	f, err := footprintOf(i.Cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	m.Resident = f.memory
	body, err := i.Metrics(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	for lines := bufio.NewScanner(body); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), "go_memstats_heap_inuse_bytes "); ok {
			n, err := strconv.ParseFloat(value, 64)
			if err != nil {
				t.Fatal(err)
			}
			m.Heap = int(n)
		}
	}
	if m.Heap == 0 {
		t.Fatal("the metrics tell no heap")
	}
	return m
}
