package containers

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// jobLimit is how long a Job's sidecar may run on behind the last application. A
// busy machine is given more.
const jobLimit = 2 * time.Second

// job is a pod whose sidecar ends with the applications.
func job(t *testing.T, w *world) {
	p := w.newPod(t, podSpec{config: w.serving("")})
	p.prepare(t, w.minimal(initArgs...))
	s := p.sidecar(t, w.minimal(append(slices.Clone(runArgs), "--exit-with-scope")...))
	var last time.Time
	wait := p.run(t, "wait", application("wait"))
	for range 2 {
		c := p.run(t, "ask", application("ask", "3", service))
		c.wait(t)
		if n := strings.Count(c.output(t), service); n != 3 {
			t.Errorf("the Job had %d answers, want 3: %s", n, c.output(t))
		}
	}
	if st := s.status(t); st.state != stateRunning {
		t.Fatalf("it ended while an application runs\n%s", s.output(t))
	}
	last = wait.stop(t, 10).stopped
	st := s.wait(t)
	t.Logf("the sidecar ended %v after the last application, with %d", st.stopped.Sub(last).Round(time.Millisecond), st.code)
	if late := st.stopped.Sub(last); late > busyFactor*jobLimit {
		t.Errorf("the sidecar ended %v after the last application, want %v on an idle machine", late, jobLimit)
	}
	if out := s.output(t); !strings.Contains(out, "the applications have ended") {
		t.Errorf("it does not say why it ended:\n%s", out)
	}
	p.left(t, st, 0)
}

// beside is two pods that are told different things of one address, and one without
// Pillion: on one node each in a network of its own, and on one all in the node's.
func beside(t *testing.T, w *world) {
	host := w.view == viewUnified
	ports := map[string]int{"a": portA, "b": portB}
	pods := map[string]*pod{"host": w.newPod(t, podSpec{hostNetwork: host})}
	sidecars := map[string]*sidecar{}
	for name, port := range ports {
		config := fmt.Sprintf("services: [{name: web, address: %q, endpoints: [%q]}]", w.at(portHost), w.at(port))
		pods[name] = w.newPod(t, podSpec{hostNetwork: host, config: config})
		pods[name].prepare(t, w.minimal(initArgs...))
		sidecars[name] = pods[name].sidecar(t, w.minimal(runArgs...))
	}
	for name, p := range pods {
		want := strings.TrimSuffix(strings.Repeat(name+"\n", 3), "\n")
		var got []string
		for _, line := range p.ask(t, 3, w.at(portHost)) {
			first, _, _ := strings.Cut(line, " ")
			got = append(got, first)
		}
		if diff := cmp.Diff(want, strings.Join(got, "\n")); diff != "" {
			t.Errorf("pod %s: %s", name, diff)
		}
	}
	for name, s := range sidecars {
		if n := len(s.flows(t, 3)); n != 3 {
			t.Errorf("the sidecar of %s has %d records, want 3", name, n)
		}
		s.conserved(t)
	}
	// One goes, and the other stays as it is.
	if st := sidecars["a"].stop(t, 30); st.code != 0 {
		t.Errorf("it ended with %d", st.code)
	}
	for name, want := range map[string]string{"a": "host ", "b": "b "} {
		if got := pods[name].ask(t, 1, w.at(portHost)); !strings.HasPrefix(got[0], want) {
			t.Errorf("without the sidecar of a, pod %s got %q", name, got)
		}
	}
}

// renewed is a pod whose sandbox died, and its sidecar with it: what was made for the
// old network namespace is in nobody's way.
func renewed(t *testing.T, w *world) {
	p := w.newPod(t, podSpec{config: w.serving("on_failure: closed")})
	p.prepare(t, w.minimal(initArgs...))
	p.sidecar(t, w.minimal(runArgs...))
	p.stop(t)
	if !contains(p.pins(t), p.instance()) {
		t.Error("the sidecar was killed, and has no pins: what is in the way?")
	}
	p.sandbox(t)
	p.prepare(t, w.minimal(initArgs...))
	if got := p.ask(t, 1, service); !strings.HasPrefix(got[0], "refused true") {
		t.Errorf("between init and run: %q, want that it is refused", got)
	}
	s := p.sidecar(t, w.minimal(runArgs...))
	p.answers(t, 2, service)
	s.records(t, p, 2)
	s.conserved(t)
}

// envStarts is how many pods firstConnect starts on each node.
const envStarts = "PILLION_PODS"

// firstConnect has applications that connect first of all, in pods that start one
// after the other: nothing escapes.
func firstConnect(t *testing.T, w *world) {
	starts, _ := strconv.Atoi(os.Getenv(envStarts))
	for n := range max(starts, 3) {
		p := w.newPod(t, podSpec{config: w.serving("on_failure: closed")})
		p.prepare(t, w.minimal(initArgs...))
		s := p.sidecar(t, w.minimal(runArgs...))
		if got := p.answers(t, 1, service); got[0] != answer("a", p, service) && got[0] != answer("b", p, service) {
			t.Errorf("start %d: %q", n, got)
		}
		s.records(t, p, 1)
		s.conserved(t)
		p.remove(t)
	}
}

// deleted is what stays of pods that were deleted, their sidecars killed, and who
// removes it.
func deleted(t *testing.T, w *world) {
	p := w.newPod(t, podSpec{config: w.serving("")})
	p.prepare(t, w.minimal(initArgs...))
	p.sidecar(t, w.minimal(runArgs...))
	stays := w.newPod(t, podSpec{config: w.serving("")})
	stays.prepare(t, w.minimal(initArgs...))
	p.remove(t)
	if !contains(p.pins(t), p.instance()) {
		t.Error("the sidecar was killed, and has no pins: what is swept?")
	}
	next := w.newPod(t, podSpec{config: w.serving("")})
	_, out := next.prepare(t, w.minimal(initArgs...))
	if !strings.Contains(out, p.instance()) {
		t.Errorf("it does not say that it removed %s:\n%s", p.instance(), out)
	}
	want := []string{next.instance(), stays.instance()}
	got := p.pins(t)
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("pins on the node: %s", diff)
	}
}
