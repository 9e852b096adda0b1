package kubelet

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/node"
	"golang.org/x/sys/unix"
)

// testGate has the kubelet wait for Pillion: while a source has not told, the
// startup probe fails and no application starts.
func testGate(t *testing.T, k *kubelet) {
	p := k.shipped(t, "sidecar.yaml", "gate", `
services: [{name: relayed, address: "10.96.0.12:80", discover: {file: /etc/pillion/endpoints.json}}]
`, "-first", relayed.String())
	p.start(t)
	g := p.until(t, "has its sidecar", func(g node.Pod) bool {
		c, ok := g.Container("pillion")
		return ok && c.State.Running != nil
	})
	first, _ := g.Container("pillion-init")
	if end := first.State.Terminated; end == nil || end.ExitCode != 0 {
		t.Errorf("the sidecar runs, and init is %+v", first)
	}
	k.Eventually(t, "Pillion says that it is not ready", func() bool {
		_, err := k.Exec(g, "pillion", "/pillion", "ready")
		return err != nil && strings.Contains(err.Error(), "not ready")
	})
	// Long enough for some probes.
	for start := time.Now(); time.Since(start) < 4*time.Second; time.Sleep(200 * time.Millisecond) {
		if g, ok := p.get(t); ok {
			if c, _ := g.Container("app"); c.State.Running != nil || c.State.Terminated != nil {
				t.Fatalf("the application was started before Pillion is ready: %+v", c)
			}
		}
	}
	k.Write(t, "config/gate/endpoints.json", `[{"targets": ["10.200.0.1:8081"]}]`)
	p.ready(t)
	if r := p.report(t); r.First != "far" {
		t.Errorf("the first connect got %q", r.First)
	}
	p.conserved(t)
	p.end(t)
}

// testLife is that of a pod with the recommended form: privileges, a sidecar that
// is killed, one that hangs, and the end.
func testLife(t *testing.T, k *kubelet) {
	p := k.shipped(t, "sidecar.yaml", "shop", services,
		"-first", relayed.String(), "-tick", relayed.String(), "-hold", direct.String(), "-bye", relayed.String())
	probe := p.object.At(t, "spec", "initContainers", "pillion", "livenessProbe")
	probe["periodSeconds"] = 1 // or it takes half a minute to be seen as hung
	start := time.Now()
	p.start(t)
	g := p.ready(t)
	t.Logf("from nothing to ready: %v", time.Since(start).Round(100*time.Millisecond))
	if r := p.report(t); r.First != "far" {
		t.Errorf("the first connect got %q", r.First)
	}
	p.more(t, 20)
	checkPrivileges(t, k.Pid(t, g, "pillion"), unix.CAP_BPF, unix.CAP_NET_ADMIN, unix.CAP_DAC_READ_SEARCH)
	p.conserved(t)

	for _, end := range []struct {
		what   string
		signal unix.Signal
	}{{"killed", unix.SIGKILL}, {"hung", unix.SIGSTOP}} {
		g, _ := p.get(t)
		before, restarts := p.report(t), sidecar(t, g).RestartCount
		start := time.Now()
		if err := unix.Kill(k.Pid(t, g, "pillion"), end.signal); err != nil {
			t.Fatal(err)
		}
		p.until(t, "has a new sidecar", func(g node.Pod) bool {
			c, _ := g.Container("pillion")
			return c.RestartCount > restarts && c.Ready && g.Ready()
		})
		t.Logf("%s, and another one ready after %v", end.what, time.Since(start).Round(100*time.Millisecond))
		now := p.more(t, 20)
		p.served(t, end.what, before, now)
		p.conserved(t)
	}

	// The application is ended first, and Pillion is there for its last words.
	p.end(t)
	byes := k.far.Byes()
	if len(byes) != 1 || !strings.HasPrefix(byes[0], "bye shop ") {
		t.Errorf("the endpoint heard %q, want the application's last words", byes)
	}
}

// served fails the test unless the application was served all the time: at most
// the connections of the very moment may have broken, and none went astray.
func (p *pod) served(t *testing.T, when string, before, now report) {
	t.Helper()
	failed := 0
	for answer, n := range now.Answers {
		switch more := n - before.Answers[answer]; {
		case answer == "escaped" && more > 0:
			t.Errorf("%s: %d connections escaped", when, more)
		case answer != "far":
			failed += more
		}
	}
	t.Logf("%s: %d new connections served, %d broken at that moment", when, now.Answers["far"]-before.Answers["far"], failed)
	// One that the handler carried, and one whose SYN was on its way.
	if failed > 2 {
		t.Errorf("%s: answers %v, before %v", when, now.Answers, before.Answers)
	}
	if now.Broken != before.Broken || now.HeldBy != "far" {
		t.Errorf("%s: the direct connection to %s broke %d times", when, now.HeldBy, now.Broken-before.Broken)
	}
}

// checkPrivileges holds a running sidecar to what docs/deploy.md says it has.
func checkPrivileges(t *testing.T, pid int, caps ...uint) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	var set uint64
	for _, c := range caps {
		set |= 1 << c
	}
	want := map[string]string{"Seccomp": "2", "NoNewPrivs": "1", "Uid": "0"}
	for _, key := range []string{"CapEff", "CapPrm", "CapBnd"} {
		want[key] = fmt.Sprintf("%016x", set)
	}
	seen := 0
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if w, ok := want[key]; ok {
			seen++
			if got := strings.Fields(value)[0]; got != w {
				t.Errorf("%s is %s, want %s", key, got, w)
			}
		}
	}
	if seen != len(want) {
		t.Errorf("%d of %d found in\n%s", seen, len(want), b)
	}
}

// testClosed kills the sidecar of a pod that is closed without it: new
// connections are refused until the next one is there, and none escapes.
func testClosed(t *testing.T, k *kubelet) {
	p := k.shipped(t, "sidecar.yaml", "closed", "on_failure: closed"+services,
		"-first", relayed.String(), "-tick", relayed.String(), "-hold", direct.String())
	p.start(t)
	g := p.ready(t)
	before := p.more(t, 20)
	if err := unix.Kill(k.Pid(t, g, "pillion"), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	p.until(t, "has a new sidecar", func(g node.Pod) bool {
		c, _ := g.Container("pillion")
		return c.RestartCount > 0 && c.Ready
	})
	now := p.more(t, 20)
	if n := now.Answers["ECONNREFUSED"] - before.Answers["ECONNREFUSED"]; n == 0 {
		t.Errorf("answers %v, want some that were refused", now.Answers)
	}
	if now.Answers["escaped"] > 0 || now.Broken != before.Broken {
		t.Errorf("report %+v, want no escape and the direct connection whole", now)
	}
	p.conserved(t)
}

// testTwoContainers is the form for older clusters: nothing orders the
// containers, and yet nothing escapes.
func testTwoContainers(t *testing.T, k *kubelet) {
	p := k.shipped(t, "two-containers.yaml", "pair", "on_failure: closed"+services,
		"-first", relayed.String(), "-tick", relayed.String(), "-hold", direct.String())
	p.start(t)
	p.ready(t)
	now := p.more(t, 20)
	t.Logf("the first connect got %q", now.First)
	if now.First != "far" && now.First != "ECONNREFUSED" || now.Answers["escaped"] > 0 {
		t.Errorf("report %+v, want no escape", now)
	}
	p.conserved(t)
	p.end(t)
}

// testJobs has pods that complete.
func testJobs(t *testing.T, k *kubelet) {
	for _, tt := range []struct {
		name, file, policy string
		app, more          []string
		failures           int
	}{
		{name: "never", file: "sidecar.yaml", policy: "Never"},
		{name: "on-failure", file: "sidecar.yaml", policy: "OnFailure", app: []string{"-once", "/run/once/done"}, failures: 1},
		{name: "two-containers", file: "two-containers.yaml", policy: "Never", more: []string{"--exit-with-scope"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := k.shipped(t, tt.file, "job-"+tt.name, services, append([]string{"-first", relayed.String(), "-job"}, tt.app...)...)
			spec := p.object.At(t, "spec")
			spec["restartPolicy"] = tt.policy
			spec["volumes"] = append(spec["volumes"].([]any), map[string]any{"name": "once", "emptyDir": map[string]any{}})
			p.app["volumeMounts"] = []any{map[string]any{"name": "once", "mountPath": "/run/once"}}
			if len(tt.more) > 0 {
				c := p.object.At(t, "spec", "containers", "pillion")
				for _, a := range tt.more {
					c["args"] = append(c["args"].([]any), a)
				}
			}
			p.start(t)
			g := p.until(t, "has completed", func(g node.Pod) bool { return g.Status.Phase == "Succeeded" || g.Status.Phase == "Failed" })
			app, _ := g.Container("app")
			if g.Status.Phase != "Succeeded" || app.RestartCount != tt.failures {
				t.Fatalf("the job has %s after %d restarts", g.Status.Phase, app.RestartCount)
			}
			end := sidecar(t, g).State.Terminated
			if end == nil || app.State.Terminated == nil {
				t.Fatalf("completed, and the sidecar is %+v, the application %+v", end, app.State)
			}
			t.Logf("%s after the application, with %d", end.FinishedAt.Sub(app.State.Terminated.FinishedAt), end.ExitCode)
			if end.ExitCode != 0 || end.FinishedAt.Before(app.State.Terminated.FinishedAt) {
				t.Errorf("the sidecar's end: %+v, the application's: %+v", end, app.State.Terminated)
			}
			if log, err := k.Logs(g, "app"); err != nil || !strings.Contains(log, "first: far\n") {
				t.Errorf("the application says %v, %q", err, log)
			}
			p.end(t)
		})
	}
}

// envStarts is how many pods testFirstConnect starts.
const envStarts = "PILLION_PODS"

// testFirstConnect starts many pods whose applications connect before they do
// anything else: none escapes.
func testFirstConnect(t *testing.T, k *kubelet) {
	const wave = 10
	starts, _ := strconv.Atoi(os.Getenv(envStarts))
	starts = max(starts, wave)
	served, refused := 0, 0
	for n := 0; n < starts; n += wave {
		var pods []*pod
		for i := n; i < min(n+wave, starts); i++ {
			p := k.shipped(t, "sidecar.yaml", fmt.Sprintf("first-%d", i), "on_failure: closed"+services, "-first", relayed.String())
			p.start(t)
			pods = append(pods, p)
		}
		for _, p := range pods {
			p.ready(t)
			r := p.report(t)
			switch r.First {
			case "far":
				served++
			case "ECONNREFUSED": // as configured, where the handler has no turn of the processor
				refused++
			default:
				t.Errorf("%s: the first connect got %q", p.name, r.First)
			}
			p.conserved(t)
		}
		for _, p := range pods {
			if err := os.Remove(k.Path("manifests/" + p.name + ".json")); err != nil {
				t.Fatal(err)
			}
		}
		for _, p := range pods {
			p.remove(t)
		}
		pods[0].gone(t, "pod/")
	}
	t.Logf("%d of %d first connects were served, %d refused", served, starts, refused)
	if refused > starts/5 {
		t.Errorf("%d of %d first connects were refused: the application was started too early", refused, starts)
	}
}
