package failure

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

func parseNet(p netip.Prefix) (net.IP, *net.IPNet, error) { return net.ParseCIDR(p.String()) }

// ownMounts gives the instance a mount namespace of its own, with one more file
// system. Somebody stays in it, so that it outlives the instance.
func (s *stage) ownMounts(t *testing.T, mount string) {
	t.Helper()
	testutil.Need(t, "unshare", "nsenter")
	p := rig.StartProcess(t, s.World, exec.Command("unshare", "-m", "--propagation", "private", "sh", "-c", mount+" && echo mounted && exec sleep inf"), unix.SIGKILL)
	testutil.Eventually(t, rig.Limit, func() bool { p.Running(t); return strings.Contains(p.Log.String(), "mounted") }, mount)
	s.Wrap = []string{"nsenter", "-t", fmt.Sprint(p.Cmd.Process.Pid), "-m", "--"}
}

// ownPins gives the instance a bpf file system of its own.
func ownPins(t *testing.T, s *stage) string {
	s.ownMounts(t, "mount -t bpf -o mode=0700 bpf /sys/fs/bpf")
	return ""
}

// inMounts runs a program where the instance's mounts are.
func (s *stage) inMounts(args ...string) (string, error) {
	line := append(slices.Clone(s.Wrap), args...)
	out, err := exec.Command(line[0], line[1:]...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), err
}

// mustIn is inMounts for a program that must not fail.
func (s *stage) mustIn(t *testing.T, args ...string) string {
	t.Helper()
	out, err := s.inMounts(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// unmount takes the file system of the pins away.
func unmount(t *testing.T, s *stage) {
	notePins(t, s)
	s.mustIn(t, "umount", "-l", "/sys/fs/bpf")
}

// notePins remembers which pins there are.
func notePins(t *testing.T, s *stage) {
	if s.extra = s.mustIn(t, "ls", s.pins()); !strings.Contains(s.extra.(string), "link_pl_connect4\n") {
		t.Fatalf("pins: %s", s.extra)
	}
}

// pinnedAgain waits until all pins are there again. Then the next process takes
// over what this one had, which it counts on.
func pinnedAgain(t *testing.T, s *stage) {
	start := time.Now()
	testutil.Eventually(t, rig.Limit, func() bool {
		out, err := s.inMounts("ls", s.pins())
		return err == nil && out == s.extra
	}, "the pins are there again")
	t.Logf("the pins are there again after %v", time.Since(start).Round(time.Millisecond))
}

// takenOver kills the instance: what was pinned again holds, and is taken over.
func takenOver(t *testing.T, s *stage) {
	before := s.counted(t, "service")
	s.do(t, order{Do: "quiet"})
	s.Kill(t)
	for _, kind := range kinds {
		s.tries(t, s.app, kind, byFailure(kind, s.setting))
	}
	launch(t, s)
	if after := s.counted(t, "service"); after < before {
		t.Errorf("%d connections to services are counted, before %d: it started over", after, before)
	}
}

// unpin removes every pin, and the directory.
func unpin(t *testing.T, s *stage) {
	notePins(t, s)
	if err := os.RemoveAll(s.pins()); err != nil {
		t.Fatal(err)
	}
}

// unpinLookup ends the instance and, with it, the program that brings
// connections to slots.
func unpinLookup(t *testing.T, s *stage) {
	stop(t, s)
	if err := os.Remove(filepath.Join(s.pins(), "link_pl_lookup")); err != nil {
		t.Fatal(err)
	}
	s.Kill(t)
}

func detachLookup(t *testing.T, s *stage) { s.detach(t, "link_pl_lookup") }

func detachConnect(t *testing.T, s *stage) {
	s.detach(t, "link_pl_connect4")
	s.detach(t, "link_pl_connect6")
}

// detach takes a program away from what it is attached to.
func (s *stage) detach(t *testing.T, pin string) {
	t.Helper()
	l, err := link.LoadPinnedLink(filepath.Join(s.pins(), pin), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.(interface{ Detach() error }).Detach(); err != nil {
		t.Fatal(err)
	}
}

// logOnDisk has the flow log on a file system of 32 KiB.
func logOnDisk(t *testing.T, s *stage) string {
	// On a directory that is there, and that nothing else in the test needs.
	s.ownMounts(t, "mount -t tmpfs -o size=32k tmpfs "+filepath.Dir(flowLog))
	return ""
}

// flowLog is a path that only an instance with mounts of its own has something at.
const flowLog = "/mnt/flows.json"

// fillDisk waits until the disk is full, which records alone see to.
func fillDisk(t *testing.T, s *stage) {
	testutil.Eventually(t, rig.Limit, func() bool {
		s.do(t, order{Do: "try", To: s.to[toDirect], Count: 50, Patience: patience})
		return s.Metric(t, `pillion_records_lost_total{where="flowlog"}`) > 0
	}, "lines are lost")
}

func diskIsFull(t *testing.T, s *stage) { s.says(t, "The flow log cannot be written") }

// rotate makes room, as logrotate does with copytruncate.
func rotate(t *testing.T, s *stage) { s.mustIn(t, "truncate", "-s", "0", flowLog) }

// logsAgain wants whole lines.
func logsAgain(t *testing.T, s *stage) {
	testutil.Eventually(t, rig.Limit, func() bool {
		s.do(t, order{Do: "try", To: s.to[toDirect], Count: 1, Patience: patience})
		lines := bytes.Split(bytes.TrimSpace([]byte(s.mustIn(t, "cat", flowLog))), []byte("\n"))
		return len(lines) > 2 && json.Valid(lines[len(lines)-2])
	}, "the flow log has lines again")
}

// removeSocket removes the admin socket.
func removeSocket(t *testing.T, s *stage) {
	if err := os.Remove(filepath.Join(s.Runtime, s.Name+".sock")); err != nil {
		t.Fatal(err)
	}
}

// answersAgain waits until status can be asked.
func answersAgain(t *testing.T, s *stage) {
	start := time.Now()
	testutil.Eventually(t, rig.Limit, func() bool {
		_, err := s.Status(context.Background())
		return err == nil
	}, "status answers")
	t.Logf("status answers again after %v", time.Since(start).Round(time.Millisecond))
}

// removeTakers removes the socket that a process comes to which is to take over. With
// on_failure: closed somebody else has made one there, too, that nobody listens on.
func removeTakers(t *testing.T, s *stage) {
	path := filepath.Join(s.Runtime, s.Name+".takeover")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if s.setting == onOpen {
		return
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
}

// takersCome has another process take over, when there is a way.
func takersCome(t *testing.T, s *stage) {
	const said = "made the socket for takers again"
	testutil.Eventually(t, rig.Limit, func() bool { return strings.Contains(s.Log(), said) }, "it says: ", said)
	s.Replace(t, rig.Binary(t))
}

// sameName starts another run of the same name: it is refused.
func sameName(t *testing.T, s *stage) {
	_, err := s.Pillion(t, "run", "--name", s.Name, "--cgroup", s.Scope.Path)
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || exit.ExitCode() != 1 || !strings.Contains(err.Error(), "running") {
		t.Errorf("a second run: %v", err)
	}
}

// otherName starts another run of the same scope, with a configuration that
// says nothing.
func otherName(t *testing.T, s *stage) {
	s.extra = s.Rig.Run(t, "on_failure: "+s.setting)
}

func endOther(t *testing.T, s *stage) {
	other := s.extra.(*rig.Instance)
	other.Conserved(t)
	if err := other.Stop(t); err != nil {
		t.Errorf("the other: %v", err)
	}
}

// someEndpoints has one more service, whose endpoints a file tells.
func someEndpoints(t *testing.T, s *stage) string {
	file := filepath.Join(t.TempDir(), "endpoints.json")
	s.extra = file
	endpoints(t, file, 3)
	return fmt.Sprintf("  - {name: crowded, address: \"10.96.9.9:80\", discover: {file: %q}}\n", file)
}

func endpoints(t *testing.T, file string, n int) {
	t.Helper()
	targets := make([]string, n)
	for k := range targets {
		targets[k] = fmt.Sprintf("10.%d.%d.%d:80", 100+k>>16, k>>8&255, k&255)
	}
	text, err := json.Marshal([]any{map[string]any{"targets": targets}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file+".next", text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".next", file); err != nil {
		t.Fatal(err)
	}
}

func tooManyEndpoints(t *testing.T, s *stage) {
	endpoints(t, s.extra.(string), bpf.SetEndpoints+1)
	testutil.Eventually(t, rig.Limit, func() bool { return strings.Contains(s.crowded(t), "want at most") }, "status says that there are too many")
}

func fewerEndpoints(t *testing.T, s *stage) {
	endpoints(t, s.extra.(string), 3)
	testutil.Eventually(t, rig.Limit, func() bool { return s.crowded(t) == "" }, "status says that all is well")
}

// crowded is what is wrong with the source of the service with the many.
func (s *stage) crowded(t *testing.T) string {
	for _, v := range s.status(t).Services {
		if v.Name == "crowded" {
			return v.Source.Error
		}
	}
	return ""
}

// renewAlone has the scope's cgroup made again while nobody is there to see it.
func renewAlone(t *testing.T, s *stage) {
	s.Kill(t)
	renewScope(t, s)
}

// renewBereft is renewAlone with a keeper, which starts the next handler.
func renewBereft(t *testing.T, s *stage) {
	before := s.status(t).Pid
	if err := unix.Kill(before, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	renewScope(t, s)
	testutil.Eventually(t, rig.Limit, func() bool {
		now, err := s.Status(context.Background())
		return err == nil && now.Pid != before && now.Ready
	}, "the next one is ready\n", &logged{s})
}

// renewScope removes the scope's cgroup, when the application has moved
// elsewhere, and makes it again. Then another application starts there.
func renewScope(t *testing.T, s *stage) {
	s.do(t, order{Do: "quiet"})
	root := filepath.Join(testutil.CgroupRoot(t), "cgroup.procs")
	if err := put(root, fmt.Sprint(s.app.cmd.Process.Pid)); err != nil {
		t.Fatal(err)
	}
	s.Scope.Renew(t)
	s.former = s.app
	s.app = newApp(t, s.Rig, portCount/2)
	s.streams(t)
}
