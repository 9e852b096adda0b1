package failure

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

func kill(t *testing.T, s *stage) { s.Kill(t) }

// killWorker kills the process that carries connections, and not the one that
// keeps them.
func killWorker(t *testing.T, s *stage) {
	keeper := s.Cmd.Process.Pid
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", keeper, keeper))
	if err != nil {
		t.Fatal(err)
	}
	worker, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatalf("the keeper's children: %q", text)
	}
	if err := unix.Kill(worker, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, rig.Limit, func() bool {
		now, err := s.Status(context.Background())
		return err == nil && now.Pid != worker && now.Ready
	}, "the next one is ready")
}

func launch(t *testing.T, s *stage) {
	start := time.Now()
	s.Launch(t)
	t.Logf("the next one is ready %v after its start", time.Since(start).Round(time.Millisecond))
}

func stop(t *testing.T, s *stage) { s.Halt(t) }

func proceed(t *testing.T, s *stage) { s.Signal(t, unix.SIGCONT) }

// memory are the ways to bound what a process has: where cgroups are made, the
// file of the bound, and where the kernel counts whom it killed.
var memory = []struct{ root, limit, kills, key string }{
	{"/sys/fs/cgroup", "memory.max", "memory.events", "oom_kill "},
	{"/sys/fs/cgroup/unified", "memory.max", "memory.events", "oom_kill "},
	{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.oom_control", "oom_kill "},
}

// exhaust puts the handler into a cgroup without memory, and waits until the
// kernel has killed it for the next page that it wants.
func exhaust(t *testing.T, s *stage) {
	pid := strconv.Itoa(s.Cmd.Process.Pid)
	for _, m := range memory {
		dir := filepath.Join(m.root, "pillion-test-memory-"+pid)
		if os.Mkdir(dir, 0o755) != nil {
			continue
		}
		t.Cleanup(func() {
			testutil.Eventually(t, rig.Limit, func() bool {
				err := os.Remove(dir)
				return err == nil || errors.Is(err, os.ErrNotExist)
			}, "remove ", dir)
		})
		if put(filepath.Join(dir, m.limit), "65536") != nil {
			continue
		}
		if err := put(filepath.Join(dir, "cgroup.procs"), pid); err != nil {
			t.Fatal(err)
		}
		s.Wait(t)
		b, err := os.ReadFile(filepath.Join(dir, m.kills))
		if err != nil {
			t.Fatal(err)
		}
		if _, n, _ := strings.Cut(string(b), m.key); !strings.HasPrefix(n, "1") {
			t.Errorf("the kernel did not kill it for want of memory: %s", b)
		}
		return
	}
	t.Fatal("no memory controller is there to test with")
}

// put writes a file that is there: what is not is no cgroup's.
func put(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(text)
	return err
}
