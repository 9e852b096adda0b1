package containers

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// direct is the address of a service that needs no handler.
const direct = "10.96.0.13:80"

// withDirect is serving, and a service on the direct path.
func (w *world) withDirect(more string) string {
	return strings.Replace(w.serving(more), "services:\n", fmt.Sprintf(
		"services:\n- {name: fast, address: %q, path: direct, endpoints: [%q, %q]}\n", direct, w.at(portA), w.at(portB)), 1)
}

// settings are those of on_failure that are tried on a node: what it is depends on the
// view no more than which pod is found.
func (w *world) settings() []string {
	if w.view == viewHybrid {
		return []string{"open", "closed"}
	}
	return []string{"closed"}
}

// failure is the table of docs/design.md, section 6, for a sidecar that is killed:
// by a signal, for a failed liveness probe, and where there is a controller of memory
// by the kernel.
func failure(t *testing.T, w *world) {
	for _, setting := range w.settings() {
		t.Run(setting, func(t *testing.T) {
			p := w.newPod(t, podSpec{config: w.withDirect("on_failure: " + setting)})
			p.prepare(t, w.minimal(initArgs...))
			spec := w.minimal(runArgs...)
			spec.memory = 128 << 20
			s := p.sidecar(t, spec)
			p.served(t, "with the sidecar")
			ways := []func(*sidecar, *testing.T){(*sidecar).kill, (*sidecar).hang}
			if w.view == viewHybrid {
				ways = append(ways, (*sidecar).exhaust)
			}
			for _, end := range ways {
				relayed, kept := p.run(t, "hold", application("hold", service)), p.run(t, "keep", application("hold", direct))
				relayed.says(t, service)
				kept.says(t, direct)
				end(s, t)
				p.unserved(t, setting, w.at(portApart))
				// A reset, or an end of file where nothing was on its way.
				relayed.wait(t)
				if st := kept.status(t); st.state != stateRunning {
					t.Errorf("a connection on direct ended with the sidecar: %s", kept.output(t))
				}
				s = p.sidecar(t, spec)
				p.served(t, "with the next sidecar")
				s.conserved(t)
				kept.stop(t, 0)
			}
		})
	}
}

// served fails the test unless the handler serves.
func (p *pod) served(t *testing.T, when string) {
	t.Helper()
	for _, to := range []string{service, direct} {
		if got := p.answers(t, 1, to); got[0] != answer("a", p, to) && got[0] != answer("b", p, to) {
			t.Errorf("%s, %s answers %q", when, to, got)
		}
	}
}

// unserved fails the test unless new connections go by on_failure. to is a
// destination that no service names.
func (p *pod) unserved(t *testing.T, setting, to string) {
	t.Helper()
	one := p.ask(t, 1, service)[0]
	other := p.ask(t, 1, to)[0]
	fast := p.ask(t, 1, direct)[0]
	if fast != answer("a", p, direct) && fast != answer("b", p, direct) {
		t.Errorf("without the sidecar, a service on direct answers %q", fast)
	}
	switch setting {
	case "open":
		if one != answer("a", p, service) && one != answer("b", p, service) {
			t.Errorf("without the sidecar, the service answers %q, want one of its endpoints", one)
		}
		if other != answer("apart", p, to) {
			t.Errorf("without the sidecar, a destination that no service names answers %q", other)
		}
	case "closed":
		for _, got := range []string{one, other} {
			if !strings.HasPrefix(got, "refused true") {
				t.Errorf("without the sidecar: %q, want that it is refused", got)
			}
		}
	}
}

// kill ends the sidecar without its knowing.
func (s *sidecar) kill(t *testing.T) {
	t.Helper()
	for _, pid := range s.pids(t) {
		s.signal(t, pid, unix.SIGKILL)
	}
	if st := s.wait(t); st.code != 137 || st.reason == "OOMKilled" {
		t.Errorf("killed, it ended with %d (%s)", st.code, st.reason)
	}
}

// hang stops the sidecar's process: the probe says so, and the kubelet ends the
// container, which takes a SIGKILL.
func (s *sidecar) hang(t *testing.T) {
	t.Helper()
	for _, pid := range s.pids(t) {
		s.signal(t, pid, unix.SIGSTOP)
	}
	if out, code := s.exec(t, "/pillion", "live"); code != 1 {
		t.Errorf("live, of a sidecar that is stopped: %d, %q", code, out)
	}
	if st := s.stop(t, 1); st.code != 137 {
		t.Errorf("it ended with %d", st.code)
	}
}

func (s *sidecar) signal(t *testing.T, pid string, sig unix.Signal) {
	t.Helper()
	n, err := strconv.Atoi(pid)
	if err == nil {
		err = unix.Kill(n, sig)
	}
	if err != nil && err != unix.ESRCH {
		t.Fatal(err)
	}
}

// exhaust has the kernel kill the sidecar for want of memory. What takes it is put
// into the container's cgroup of that controller alone.
func (s *sidecar) exhaust(t *testing.T) {
	t.Helper()
	group := s.cgroup(filepath.Join(cgroupDir, "memory"))
	for _, pid := range s.pids(t) {
		// It is to be the first whom the kernel takes.
		if err := os.WriteFile(filepath.Join("/proc", pid, "oom_score_adj"), []byte("1000"), 0); err != nil {
			t.Fatal(err)
		}
	}
	eater := exec.Command("sh", "-c", `echo $$ >"$1/cgroup.procs" && exec "$0" eat`, s.pod.binary, group)
	log := &rig.Log{}
	eater.Stdout, eater.Stderr = log, log
	if err := eater.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		eater.Process.Kill()
		_ = eater.Wait()
	}()
	testutil.Eventually(t, rig.Limit, func() bool { return s.status(t).state == stateExited }, "it is killed\n", log)
	if st := s.wait(t); st.code != 137 || st.reason != "OOMKilled" {
		t.Errorf("out of memory, it ended with %d (%s)", st.code, st.reason)
	}
}

// drain is what SIGTERM does: new connections go by on_failure, open ones may end
// by themselves, or are ended; then nothing is left.
func drain(t *testing.T, w *world) {
	for _, setting := range w.settings() {
		t.Run(setting, func(t *testing.T) {
			p := w.newPod(t, podSpec{config: w.withDirect("on_failure: " + setting)})
			s := p.sidecar(t, w.minimal(runArgs...))
			held := p.run(t, "hold", application("hold", service))
			held.says(t, service)
			s.signal(t, s.pids(t)[0], unix.SIGTERM)
			s.says(t, "draining")
			p.unserved(t, setting, w.at(portApart))
			if st := held.status(t); st.state != stateRunning {
				t.Errorf("the open connection ended at once: %s", held.output(t))
			}
			held.stop(t, 0)
			p.left(t, s.wait(t), 0)

			// The kubelet starts it again; this time somebody does not let go.
			s = p.sidecar(t, w.minimal(append(runArgs[:len(runArgs)-1:len(runArgs)-1], "200ms")...))
			held = p.run(t, "hold", application("hold", service))
			held.says(t, service)
			p.left(t, s.stop(t, 30), 75)
			held.says(t, "reset")
			if out := s.output(t); !strings.Contains(out, "1 connection open still") {
				t.Errorf("it does not say what it ended:\n%s", out)
			}
		})
	}
}

// left fails the test unless the sidecar has ended with code, and taken all away.
func (p *pod) left(t *testing.T, st status, code int64) {
	t.Helper()
	if st.code != code {
		t.Errorf("it ended with %d, want %d", st.code, code)
	}
	if contains(p.pins(t), p.instance()) {
		t.Error("its pins are left")
	}
	if got := p.ask(t, 1, service); !strings.Contains(got[0], "unreachable") {
		t.Errorf("when it has gone: %q, want no capture", got)
	}
}
