package pods

import (
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

func serving(to netip.AddrPort, more string) string {
	return fmt.Sprintf("services: [{name: web, address: %q, endpoints: [%q]}]\n%s", service, to, more)
}

// TestLife is that of a pod: init, sidecar, applications, a sidecar that is killed
// and comes back in a container of another id, the end.
func TestLife(t *testing.T) {
	for _, setting := range []string{"open", "closed"} {
		t.Run(setting, func(t *testing.T) {
			r := rig.New(t)
			far := r.Serve(t, netip.AddrPortFrom(rig.Far4, 8081), named("far"))
			r.Serve(t, service, named("host"))
			p := newPod(t, r, r.App, serving(far, "on_failure: "+setting))
			without := map[string]string{"open": "far", "closed": "refused"}[setting]

			p.prepare(t)
			// Twice: a kubelet may do so.
			p.prepare(t)
			app := p.container(t)
			if got := p.ask(t, app, service); got != without {
				t.Errorf("between init and run: %q, want %q", got, without)
			}
			s := p.sidecar(t, nil)
			if st, err := s.Status(t.Context()); err != nil || st.Kind != "run" || st.Scope != p.cgroup.Path || st.Instance != p.name {
				t.Errorf("status %+v, %v", st, err)
			}
			if got := p.ask(t, app, service); got != "far" {
				t.Errorf("with the sidecar: %q", got)
			}
			if got := p.ask(t, p.container(t), service); got != "far" {
				t.Errorf("from a container that started later: %q", got)
			}
			for _, rec := range s.flows(t, 2) {
				if rec.Path != flow.PathRelay && rec.Reason != flow.ReasonHandlerStale {
					t.Errorf("record %+v, want relay, or what was before the sidecar", rec)
				}
			}
			// The sidecar's own container: kubectl exec, and what it starts.
			before := s.counters(t)["self"]
			if got := p.ask(t, s.container, service); got != "host" {
				t.Errorf("from the sidecar's own container: %q, want what has the address", got)
			}
			if n := s.counters(t)["self"]; n <= before {
				t.Error("the sidecar's own container is not exempt")
			}

			s.kill(t)
			if got := p.ask(t, app, service); got != without {
				t.Errorf("with the sidecar killed: %q, want %q", got, without)
			}
			s = p.sidecar(t, nil)
			if got := p.ask(t, app, service); got != "far" {
				t.Errorf("with the sidecar back: %q", got)
			}
			if got := p.ask(t, s.container, service); got != "host" {
				t.Errorf("from the sidecar's new container: %q, want what has the address", got)
			}
			s.conserved(t)
			s.stop(t)
			if _, err := os.Stat(p.pins()); !os.IsNotExist(err) {
				t.Errorf("pins after the end: %v", err)
			}
		})
	}
}

// TestHidden runs a sidecar that sees nothing of the hierarchy but its own cgroup,
// as in a container without privileges, and one that sees nothing at all.
func TestHidden(t *testing.T) {
	testutil.Need(t, "unshare")
	for name, c := range map[string]struct{ flags, mount string }{
		"own":     {"-Cm", "mount -t cgroup2 -o ro none /sys/fs/cgroup"},
		"nothing": {"-m", "true"},
	} {
		t.Run(name, func(t *testing.T) {
			r := rig.New(t)
			far := r.Serve(t, netip.AddrPortFrom(rig.Far4, 8081), named("far"))
			p := newPod(t, r, r.App, serving(far, "on_failure: closed"))
			script := "umount -l $(awk '/ - cgroup2 /{print $5}' /proc/self/mountinfo) && " + c.mount + ` && exec "$0" "$@"`
			s := p.sidecar(t, []string{"unshare", c.flags, "--propagation", "private", "sh", "-c", script})
			app := p.container(t)
			if got := p.ask(t, app, service); got != "far" {
				t.Errorf("answer %q", got)
			}
			rig.Relayed(t, s.flows(t, 1))
			// The links are watched over here too.
			if err := os.Remove(filepath.Join(p.pins(), "link_pl_connect4")); err != nil {
				t.Fatal(err)
			}
			testutil.Eventually(t, rig.Limit, func() bool { return strings.Contains(s.log.String(), "mended a link") }, "the pin is back")
			if got := p.ask(t, app, service); got != "far" {
				t.Errorf("answer %q", got)
			}
			s.conserved(t)
		})
	}
}

// envStarts is how many pods TestFirstConnect starts.
const envStarts = "PILLION_PODS"

// TestFirstConnect has an application connect as soon as its container is there:
// nothing escapes, in any of many pods.
func TestFirstConnect(t *testing.T) {
	starts, _ := strconv.Atoi(os.Getenv(envStarts))
	starts = max(starts, 5)
	r := rig.New(t)
	far := r.Serve(t, netip.AddrPortFrom(rig.Far4, 8081), named("far"))
	for n := range starts {
		p := newPod(t, r, r.App, serving(far, "on_failure: closed"))
		if n%2 == 0 {
			p.prepare(t)
		}
		s := p.sidecar(t, nil)
		// A handler that a busy machine does not let beat is taken for gone: then
		// it is refused, as promised, and that is no escape.
		asked := 0
		testutil.Eventually(t, rig.Limit, func() bool {
			asked++
			return p.ask(t, p.container(t), service) == "far"
		}, "start ", n, " is answered\n", s.log)
		for _, r := range s.flows(t, asked) {
			if r.Path != flow.PathRelay && (r.Path != flow.PathDeny || r.Reason != flow.ReasonHandlerStale) {
				t.Errorf("start %d: connection to %s took %s (%s)", n, r.OrigDst, r.Path, r.Reason)
			}
		}
		s.conserved(t)
		s.stop(t)
	}
}

// TestJob has a sidecar that ends with the applications: not before one has run,
// not while any runs, and not because of the sandbox or its own container.
func TestJob(t *testing.T) {
	// Pods of the second may have no sandbox: what init saw tells.
	for _, runtime := range []string{"cri-containerd-", "crio-"} {
		t.Run(runtime, func(t *testing.T) { job(t, runtime) })
	}
}

func job(t *testing.T, runtime string) {
	r := rig.New(t)
	far := r.Serve(t, netip.AddrPortFrom(rig.Far4, 8081), named("far"))
	p := newPodOf(t, r, r.App, runtime, serving(far, ""))
	if runtime == "crio-" {
		p.prepare(t)
	}
	s := p.sidecar(t, nil, "--exit-with-scope")
	beside := p.start(t, s.container, exec.Command("sleep", "1000"))
	apps := []*exec.Cmd{
		p.start(t, p.container(t), exec.Command("sleep", "1000")),
		p.start(t, p.container(t), exec.Command("sleep", "1000")),
	}
	for n, app := range apps {
		// Long enough for a sidecar that minds the wrong processes to go.
		time.Sleep(1500 * time.Millisecond)
		select {
		case <-s.ended:
			t.Fatalf("it ended while %d applications run: %v\n%s", len(apps)-n, s.err, s.log)
		default:
		}
		app.Process.Kill()
		app.Wait()
	}
	select {
	case <-s.ended:
	case <-time.After(rig.Limit):
		t.Fatalf("it does not end\n%s", s.log)
	}
	if s.err != nil {
		t.Errorf("it ended with %v", s.err)
	}
	if !strings.Contains(s.log.String(), "the applications have ended") {
		t.Errorf("it does not say why:\n%s", s.log)
	}
	if _, err := os.Stat(p.pins()); !os.IsNotExist(err) {
		t.Errorf("pins after the end: %v", err)
	}
	if beside.Process.Signal(unix.Signal(0)) != nil {
		t.Error("what ran in its own container is gone")
	}
}

// TestJobAtOnce has an application that is gone before anybody looks.
func TestJobAtOnce(t *testing.T) {
	r := rig.New(t)
	p := newPod(t, r, r.App, "")
	s := p.sidecar(t, nil, "--exit-with-scope")
	app := p.container(t)
	cmd := exec.Command("true")
	if err := (testutil.Place{NS: p.ns, Cgroup: app}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	if err := os.Remove(app.Path); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.ended:
	case <-time.After(rig.Limit):
		t.Fatalf("it does not end\n%s", s.log)
	}
	if s.err != nil {
		t.Errorf("it ended with %v", s.err)
	}
}

// TestDrainCut is the exit code of a sidecar that had to end a connection.
func TestDrainCut(t *testing.T) {
	r := rig.New(t)
	far := r.Serve(t, netip.AddrPortFrom(rig.Far4, 8081), named("far"))
	p := newPod(t, r, r.App, serving(far, ""))
	s := p.sidecar(t, nil, "--drain-timeout", "100ms")
	cmd := exec.Command("bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/%s/%d && read -r line <&3 && read -r line <&3", service.Addr(), service.Port()))
	p.start(t, p.container(t), cmd)
	testutil.Eventually(t, rig.Limit, func() bool {
		st, err := s.Status(t.Context())
		return err == nil && st.Live == 1
	}, "a connection is open")
	s.cmd.Process.Signal(unix.SIGTERM)
	<-s.ended
	if exitCode(s.err) != 75 || !strings.Contains(s.log.String(), "1 connection open still") {
		t.Errorf("it ended with %v\n%s", s.err, s.log)
	}
	cmd.Wait()
}

// TestHostNetwork has two pods and a process of the host in one network namespace:
// each application gets what its own sidecar says.
func TestHostNetwork(t *testing.T) {
	r := rig.New(t)
	a := r.Serve(t, netip.AddrPortFrom(rig.Far4, 8081), named("a"))
	b := r.Serve(t, netip.AddrPortFrom(rig.Far4, 8082), named("b"))
	host := r.Serve(t, service, named("host"))
	pods := map[string]*pod{
		"a": newPod(t, r, r.App, serving(a, "")),
		"b": newPod(t, r, r.App, serving(b, "")),
	}
	sidecars := map[string]*sidecar{}
	apps := map[string]*testutil.Cgroup{}
	for name, p := range pods {
		p.prepare(t)
		sidecars[name] = p.sidecar(t, nil)
		apps[name] = p.container(t)
	}
	for range 3 {
		for name, p := range pods {
			if got := p.ask(t, apps[name], host); got != name {
				t.Errorf("pod %s got %q", name, got)
			}
		}
		if got := pods["a"].ask(t, nil, host); got != "host" {
			t.Errorf("a process of the host got %q", got)
		}
	}
	for name, s := range sidecars {
		records := s.flows(t, 3)
		rig.Relayed(t, records)
		if len(records) != 3 {
			t.Errorf("sidecar of %s has %d connections, want 3", name, len(records))
		}
		s.conserved(t)
	}
	// One goes, the other stays as it is.
	sidecars["a"].stop(t)
	for name, want := range map[string]string{"a": "host", "b": "b"} {
		if got := pods[name].ask(t, apps[name], host); got != want {
			t.Errorf("without the sidecar of a, pod %s got %q, want %q", name, got, want)
		}
	}
}

// TestOtherNamespace captures nothing of a process in the pod that is in another
// network namespace than the sidecar.
func TestOtherNamespace(t *testing.T) {
	r := rig.New(t)
	far := r.Serve(t, netip.AddrPortFrom(rig.Far4, 8081), named("far"))
	host := r.Serve(t, service, named("host"))
	p := newPod(t, r, r.App, serving(far, ""))
	s := p.sidecar(t, nil)
	elsewhere := *p
	elsewhere.ns = r.World
	if got := elsewhere.ask(t, p.container(t), host); got != "host" {
		t.Errorf("in another namespace: %q", got)
	}
	if s.counters(t)["netns"] == 0 {
		t.Errorf("counters %v, want some by reason netns", s.counters(t))
	}
}

// TestSandboxRenewed makes a pod's network namespace anew, as a runtime does when
// the sandbox died: what was made for the old one is no hindrance.
func TestSandboxRenewed(t *testing.T) {
	r := rig.New(t)
	far := r.Serve(t, netip.AddrPortFrom(rig.Far4, 8081), named("far"))
	old := testutil.NewNS(t)
	p := newPod(t, r, old, serving(far, "on_failure: closed"))
	p.prepare(t)
	p.sandbox.Process.Kill()
	p.sandbox.Wait()
	p.ns = r.App
	p.start(t, p.container(t), exec.Command("sleep", "1000"))
	p.prepare(t)
	s := p.sidecar(t, nil)
	if got := p.ask(t, p.container(t), service); got != "far" {
		t.Errorf("answer %q", got)
	}
	rig.Relayed(t, s.flows(t, 1))
}

// TestDeleted sweeps what init left of a pod that is gone, and nothing of one that
// is not, whoever starts next.
func TestDeleted(t *testing.T) {
	r := rig.New(t)
	far := r.Serve(t, netip.AddrPortFrom(rig.Far4, 8081), named("far"))
	gone, stays := newPod(t, r, testutil.NewNS(t), serving(far, "")), newPod(t, r, testutil.NewNS(t), serving(far, ""))
	gone.prepare(t)
	stays.prepare(t)
	if err := gone.cgroup.Kill(); err != nil {
		t.Fatal(err)
	}
	gone.sandbox.Wait()
	removeAll(t, gone.cgroup.Path)
	next := newPod(t, r, r.App, serving(far, ""))
	next.prepare(t)
	if _, err := os.Stat(gone.pins()); !os.IsNotExist(err) {
		t.Errorf("pins of the pod that is gone: %v", err)
	}
	if _, err := os.Stat(stays.pins()); err != nil {
		t.Errorf("pins of the pod that is not: %v", err)
	}
}

func removeAll(t *testing.T, cgroup string) {
	t.Helper()
	children, err := filepath.Glob(filepath.Join(cgroup, "*.scope"))
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range append(children, cgroup) {
		if err := os.Remove(dir); err != nil {
			t.Fatal(err)
		}
	}
}

// TestProbes are the commands' and those over HTTP.
func TestProbes(t *testing.T) {
	r := rig.New(t)
	at := netip.MustParseAddrPort("127.0.0.1:15021")
	file := filepath.Join(t.TempDir(), "web.json")
	p := newPod(t, r, r.App, fmt.Sprintf("probes: %s\nservices: [{name: web, address: %q, discover: {file: %q}}]", at, service, file))
	get := func(path string) (code int) {
		t.Helper()
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: rig.Limit}
		p.ns.Do(t, func() error {
			c, err := dialHere(at)
			if err != nil {
				return err
			}
			client.Transport.(*http.Transport).DialContext = c
			return nil
		})
		resp, err := client.Get("http://pillion" + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	for _, probe := range []string{"ready", "live"} {
		if out, err := p.pillion(t, nil, probe, "--instance", p.name); exitCode(err) != 1 || out == "" {
			t.Errorf("%s before the start: %v, %q", probe, err, out)
		}
	}
	if err := os.WriteFile(file, []byte(`[{"targets": ["198.51.100.7:80"]}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	s := p.sidecar(t, nil)
	for _, probe := range []string{"ready", "live"} {
		if out, err := p.pillion(t, nil, probe); err != nil || out != "" {
			t.Errorf("%s: %v, %q, want success and silence", probe, err, out)
		}
		if code := get("/" + probe); code != http.StatusOK {
			t.Errorf("GET /%s: %d", probe, code)
		}
	}
	if code := get("/metrics"); code != http.StatusNotFound {
		t.Errorf("GET /metrics of the probes: %d", code)
	}
	// It lives, and nobody hears it.
	s.cmd.Process.Signal(unix.SIGSTOP)
	rig.Stopped(t, s.cmd.Process.Pid)
	if _, err := p.pillion(t, nil, "live", "--timeout", "200ms"); exitCode(err) != 1 {
		t.Errorf("live of a stopped sidecar: %v", err)
	}
	s.cmd.Process.Signal(unix.SIGCONT)
}

// TestUnready is what the probe says while a source has not told its endpoints.
func TestUnready(t *testing.T) {
	r := rig.New(t)
	p := newPod(t, r, r.App, fmt.Sprintf("services: [{name: web, address: %q, discover: {file: %q}}]", service, filepath.Join(t.TempDir(), "missing.json")))
	cmd := exec.Command(rig.Binary(t), "run", "--config", p.config, "--runtime-dir", p.Runtime)
	log := &rig.Log{}
	cmd.Stdout, cmd.Stderr = log, log
	p.start(t, p.container(t), cmd)
	testutil.Eventually(t, rig.Limit, func() bool {
		_, err := p.pillion(t, nil, "live")
		return err == nil
	}, "it lives\n", log)
	out, err := p.pillion(t, nil, "ready")
	if exitCode(err) != 1 || !strings.Contains(out, "not ready") {
		t.Errorf("ready: %v, %q", err, out)
	}
	cmd.Process.Signal(unix.SIGTERM)
	cmd.Wait()
}

// TestNoPod refuses to guess.
func TestNoPod(t *testing.T) {
	r := rig.New(t)
	p := newPod(t, r, r.App, "")
	for _, command := range []string{"run", "init"} {
		out, err := p.pillion(t, r.Scope, command)
		if exitCode(err) != 64 || !strings.Contains(out, filepath.Base(r.Scope.Path)) || !strings.Contains(out, "--cgroup PATH") {
			t.Errorf("%s outside of a pod: %v\n%s", command, err, out)
		}
		real := p.uid
		p.uid = "11111111-2222-3333-4444-555555555555"
		out, err = p.pillion(t, p.container(t), command)
		p.uid = real
		if exitCode(err) != 64 || !strings.Contains(out, "11111111-2222") {
			t.Errorf("%s in a pod of another uid: %v\n%s", command, err, out)
		}
	}
}
