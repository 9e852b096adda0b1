package systemd

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"

	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// TestSurvive is about the unit with `survive: crash`: its main process only keeps the
// descriptors of the handler, which is a child of it.
func TestSurvive(t *testing.T) {
	m := stage(t)
	m.beside(t, "shop", "survive: crash\n"+shop)
	m.must(t, "systemctl", "start", "shop.service")
	a := m.client(t, "shop.service")
	m.serves(t, "shop")
	keeper := m.show(t, unit, "MainPID")
	if pid := m.status(t, "shop").Pid; strconv.Itoa(pid) == keeper {
		t.Fatalf("the main process %d is the handler: the test proves nothing", pid)
	}
	t.Run("Killed", func(t *testing.T) {
		a.load(t, 1, 8, relayed, direct)
		for range 3 {
			before := m.status(t, "shop").Pid
			m.kill(t, before)
			testutil.Eventually(t, rig.Limit, func() bool {
				s, err := m.instance("shop").Status(context.Background())
				return err == nil && s.Ready && s.State == admin.StateServing && s.Pid != before
			}, "another handler is ready")
		}
		sum := a.Unload(t)
		for _, text := range sum.Broken {
			t.Error(text)
		}
		t.Logf("%d KiB were checked, the longest without a byte %v; new connections: %v, failed: %v", sum.Bytes>>10, slices.Max(sum.Slowest), sum.Names, sum.Failed)
		if got, n := m.show(t, unit, "MainPID"), m.show(t, unit, "NRestarts"); got != keeper || n != "0" {
			t.Errorf("systemd has seen it: main process %s, before %s, %s restarts", got, keeper, n)
		}
	})
	t.Run("Watched", func(t *testing.T) {
		// It is the handler who beats, also one that was started anew.
		told := m.when(t, unit, "Watchdog")
		testutil.Eventually(t, rig.Limit, func() bool { return m.when(t, unit, "Watchdog") > told }, "the watchdog is told")
		if n := m.show(t, unit, "NRestarts"); n != "0" {
			t.Errorf("%s restarts", n)
		}
	})
	t.Run("Restarted", func(t *testing.T) {
		a.load(t, 1, 8, relayed, direct)
		for range 2 {
			m.must(t, "systemctl", "restart", unit)
			m.serves(t, "shop")
		}
		sum := a.Unload(t)
		for _, text := range append(sum.Broken, sum.Failed...) {
			t.Error(text)
		}
		if got := m.show(t, unit, "MainPID"); got == keeper {
			t.Error("it is the same main process")
		}
		// What came out of the store is kept over a death, too.
		a.Open(t, "kept", relayed)
		m.must(t, "systemctl", "restart", unit)
		m.serves(t, "shop")
		before := m.status(t, "shop").Pid
		m.kill(t, before)
		testutil.Eventually(t, rig.Limit, func() bool {
			s, err := m.instance("shop").Status(context.Background())
			return err == nil && s.Ready && s.State == admin.StateServing && s.Pid != before
		}, "another handler is ready")
		if got := a.Talk(t, "kept"); got != "" {
			t.Errorf("after a restart and a death: %s", got)
		}
		a.Close(t, "kept")
	})
	m.conserved(t, "shop")
	m.must(t, "systemctl", "stop", unit)
	if got := m.show(t, unit, "Result"); got != "success" {
		t.Errorf("it ended with %s", got)
	}
	m.nothingLeft(t)
}

// kill kills a process that the machine numbers so.
func (m *machine) kill(t testing.TB, pid int) {
	t.Helper()
	for _, n := range m.numbers(t) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n))
		if err != nil {
			continue
		}
		if list := field(string(b), "NSpid"); len(list) == 2 && list[1] == strconv.Itoa(pid) && sameNamespace(n, m.init) {
			if err := unix.Kill(n, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("process %d is not found", pid)
}
