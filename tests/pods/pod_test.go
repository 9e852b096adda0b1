package pods

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// service is where applications connect to; nobody has the address.
var service = netip.MustParseAddrPort("10.96.0.12:80")

// pod is one, as the systemd driver lays it out.
type pod struct {
	*rig.Rig
	ns      *testutil.NS
	runtime string // before the ids of containers
	uid     string
	name    string // of its instance
	cgroup  *testutil.Cgroup
	sandbox *exec.Cmd
	config  string
}

// newPod makes a pod of containerd's in a namespace of r, with its sandbox.
func newPod(t testing.TB, r *rig.Rig, ns *testutil.NS, config string) *pod {
	t.Helper()
	return newPodOf(t, r, ns, "cri-containerd-", config)
}

// newPodOf is newPod for a runtime.
func newPodOf(t testing.TB, r *rig.Rig, ns *testutil.NS, runtime, config string) *pod {
	t.Helper()
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	h := hex.EncodeToString(b)
	p := &pod{Rig: r, ns: ns, runtime: runtime, name: "pod-" + h, config: filepath.Join(t.TempDir(), "pillion.yaml")}
	p.uid = strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
	if err := os.WriteFile(p.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	top := testutil.NewCgroup(t).Child(t, "kubepods.slice").Child(t, "kubepods-burstable.slice")
	p.cgroup = top.Child(t, "kubepods-burstable-pod"+strings.ReplaceAll(p.uid, "-", "_")+".slice")
	t.Cleanup(func() {
		// Whatever the test did, nothing may stay.
		if out, err := p.pillion(t, nil, "unload", p.name); err != nil && !strings.Contains(out, "no such instance") {
			t.Errorf("pillion unload: %v\n%s", err, out)
		}
		if _, err := os.Stat(p.pins()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("pins are left in %s: %v", p.pins(), err)
		}
	})
	p.sandbox = p.start(t, p.container(t), exec.Command("sleep", "1000"))
	return p
}

func (p *pod) pins() string { return filepath.Join(loader.BPFFS, "pillion", p.name) }

// container makes a cgroup for a container, as a runtime does for each start.
func (p *pod) container(t testing.TB) *testutil.Cgroup {
	t.Helper()
	b := make([]byte, 32)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return p.cgroup.Child(t, p.runtime+hex.EncodeToString(b)+".scope")
}

// start starts a program in a container. It ends with the test at the latest.
func (p *pod) start(t testing.TB, c *testutil.Cgroup, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	if err := (testutil.Place{NS: p.ns, Cgroup: c}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
	return cmd
}

// pillion runs a command of the binary, in a container or, for nil, outside of the
// pod, and returns all that it wrote.
func (p *pod) pillion(t testing.TB, c *testutil.Cgroup, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(rig.Binary(t), append(args, "--runtime-dir", p.Runtime)...)
	cmd.Env = append(os.Environ(), "POD_UID="+p.uid)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := (testutil.Place{NS: p.ns, Cgroup: c}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	err := cmd.Wait()
	return out.String(), err
}

// prepare runs pillion init as an init container.
func (p *pod) prepare(t testing.TB) {
	t.Helper()
	if out, err := p.pillion(t, p.container(t), "init", "--config", p.config); err != nil {
		t.Fatalf("pillion init: %v\n%s", err, out)
	}
}

// sidecar is a container with pillion run.
type sidecar struct {
	*admin.Client
	pod       *pod
	container *testutil.Cgroup
	cmd       *exec.Cmd
	log       *rig.Log
	ended     chan struct{}
	err       error
}

// sidecar starts pillion run in a container of its own, and waits until the probe
// says that it is ready. through are the words of a command that starts it.
func (p *pod) sidecar(t testing.TB, through []string, flags ...string) *sidecar {
	t.Helper()
	words := append(through, rig.Binary(t), "run", "--config", p.config, "--runtime-dir", p.Runtime, "--drain-timeout", "5s")
	words = append(words, flags...)
	s := &sidecar{
		pod: p, container: p.container(t), log: &rig.Log{}, ended: make(chan struct{}),
		Client: admin.Dial(filepath.Join(p.Runtime, p.name+".sock")),
	}
	s.cmd = exec.Command(words[0], words[1:]...)
	s.cmd.Env = append(os.Environ(), "POD_UID="+p.uid)
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	if err := (testutil.Place{NS: p.ns, Cgroup: s.container, Nice: rig.Preferred}).Start(s.cmd); err != nil {
		t.Fatal(err)
	}
	go s.wait()
	t.Cleanup(func() {
		s.stop(t)
		if t.Failed() {
			t.Logf("log of the sidecar:\n%s", s.log)
		}
	})
	testutil.Eventually(t, rig.Limit, func() bool {
		select {
		case <-s.ended:
			t.Fatalf("pillion run ended: %v\n%s", s.err, s.log)
		default:
		}
		_, err := p.pillion(t, nil, "ready", "--instance", p.name)
		return err == nil
	}, "pillion is ready\n", s.log)
	return s
}

func (s *sidecar) wait() {
	s.err = s.cmd.Wait()
	close(s.ended)
}

// stop ends the sidecar as a kubelet does. One that has ended is no error.
func (s *sidecar) stop(t testing.TB) {
	t.Helper()
	select {
	case <-s.ended:
		return
	default:
	}
	s.cmd.Process.Signal(unix.SIGTERM)
	<-s.ended
	if s.err != nil {
		t.Errorf("pillion run: %v\n%s", s.err, s.log)
	}
}

// kill ends the sidecar and its container without its knowing.
func (s *sidecar) kill(t testing.TB) {
	t.Helper()
	if err := s.container.Kill(); err != nil {
		t.Fatal(err)
	}
	<-s.ended
}

// counters are the kernel side's.
func (s *sidecar) counters(t testing.TB) map[string]uint64 {
	t.Helper()
	st, err := s.Status(context.Background())
	if err != nil {
		t.Fatalf("%v\n%s", err, s.log)
	}
	return st.Counters
}

// flows waits for so many records.
func (s *sidecar) flows(t testing.TB, want int) []flow.Record {
	t.Helper()
	var all []flow.Record
	testutil.Eventually(t, rig.Limit, func() bool {
		var err error
		if all, err = s.Flows(context.Background(), admin.FlowQuery{}); err != nil {
			t.Fatalf("%v\n%s", err, s.log)
		}
		return len(all) >= want
	}, "connections that have ended\n", s.log)
	return all
}

// conserved fails the test unless every connection in the pod is accounted for.
func (s *sidecar) conserved(t testing.TB) {
	t.Helper()
	testutil.Eventually(t, rig.Limit, func() bool {
		st, err := s.Status(context.Background())
		return err == nil && st.Unaccounted == 0
	}, "every connection is accounted for\n", s.log)
}

// ask is an application that connects at once: it prints what it is told first, or
// nothing. The shell is there within the first milliseconds of its container.
func (p *pod) ask(t testing.TB, c *testutil.Cgroup, to netip.AddrPort) string {
	t.Helper()
	testutil.Need(t, "bash")
	cmd := exec.Command("bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/%s/%d && read -r line <&3 && echo $line", to.Addr(), to.Port()))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := (testutil.Place{NS: p.ns, Cgroup: c}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	if cmd.Wait() != nil {
		return "refused"
	}
	return strings.TrimSpace(out.String())
}

// named says its name, and waits for the end.
func named(name string) func(net.Conn) {
	return func(c net.Conn) {
		fmt.Fprintln(c, name)
		_, _ = io.Copy(io.Discard, c)
	}
}

// exitCode returns a command's.
func exitCode(err error) int {
	if err == nil {
		return 0
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode()
	}
	return -1
}

// dialHere connects from the calling thread's namespace, and returns a dialer that
// gives that connection.
func dialHere(to netip.AddrPort) (func(context.Context, string, string) (net.Conn, error), error) {
	c, err := net.Dial("tcp", to.String())
	return func(context.Context, string, string) (net.Conn, error) { return c, err }, err
}
