package live

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// resets are what an application sees of a connection that is ended, by path: of
// one that the handler carries, and of its own socket.
var resets = map[string]string{"relay": "ECONNRESET", "direct": "ECONNABORTED"}

// TestOnRemove removes an endpoint to which there are connections, by the file of
// the configuration and by that of a source.
func TestOnRemove(t *testing.T) {
	t.Parallel()
	for _, by := range []string{"configuration", "source"} {
		t.Run(by, func(t *testing.T) {
			t.Parallel()
			onPaths(t, func(t *testing.T, path string) { onRemove(t, by, path) })
		})
	}
}

// fates are the services of onRemove, by number.
var fates = map[int]string{
	1: "on_remove: keep",
	2: "on_remove: reset",
	3: "on_remove: close, remove_after: 1s",
	4: "on_remove: close, remove_after: 1h",
}

func onRemove(t *testing.T, by, path string) {
	r := rig.New(t)
	serve(t, r, 1, 2)
	file := filepath.Join(t.TempDir(), "endpoints.yaml")
	of := func(endpoints ...int) string {
		text := "services:\n"
		for n := 1; n <= len(fates); n++ {
			// The load of what is open must not decide who gets what is new.
			more := "policy: random, path: " + path + ", " + fates[n]
			if by == "source" {
				text += service(n, fmt.Sprintf("%s, discover: {file: %q}", more, file))
			} else {
				text += service(n, more, endpoints...)
			}
		}
		return text
	}
	put(t, file, list(1))
	s := newStage(t, r, of(1))
	set := func(endpoints ...int) {
		t.Helper()
		if by == "source" {
			put(t, file, list(endpoints...))
		} else {
			put(t, s.file, of(endpoints...))
		}
		var want []string
		for _, n := range endpoints {
			want = append(want, fmt.Sprint(n))
		}
		for n := range fates {
			s.has(t, fmt.Sprintf("s%d", n), want...)
		}
	}
	open := func(id string, want int) {
		t.Helper()
		for n := range fates {
			if got := s.Open(t, fmt.Sprint(id, n), vip(n)); got != far(want).String() {
				t.Fatalf("connected to %s, want endpoint %d", got, want)
			}
		}
	}
	open("old", 1)
	set(1, 2)
	for n := range fates {
		s.goes(t, n, 1, 2)
	}
	set(2)
	open("new", 2)
	for _, n := range []int{2, 3} {
		if got := s.EndOf(t, fmt.Sprint("old", n)); got != resets[path] {
			t.Errorf("%s: the connection ended by %s, want %s", fates[n], got, resets[path])
		}
	}
	lives := func(id string, n int) {
		t.Helper()
		if got := s.Talk(t, fmt.Sprint(id, n)); got != "" {
			t.Errorf("%s: the connection %s ended: %s", fates[n], id, got)
		}
	}
	lives("old", 1)
	lives("old", 4)
	for n := range fates {
		lives("new", n)
	}
	// What is no endpoint any more is listed for as long as it has connections.
	for n, want := range map[int]int64{1: 1, 2: 0, 3: 0, 4: 1} {
		testutil.Eventually(t, rig.Limit, func() bool {
			live := int64(0)
			for _, e := range s.service(t, fmt.Sprintf("s%d", n)).Endpoints {
				if e.State == admin.EndpointRemoved && e.Address == far(1).String() {
					live += e.Live
				}
			}
			return live == want
		}, fates[n], ": connections to the endpoint that is gone: ", want)
	}
	set(1, 2)
	set(1, 2)
	for n := range fates {
		lives("new", n)
	}
	lives("old", 4)
}

// TestBackInTime has an endpoint come back before its connections are ended, also
// under another name of its service.
func TestBackInTime(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		serve(t, r, 1, 2, 3)
		more := "path: " + path + ", on_remove: close, remove_after: 2s"
		s := newStage(t, r, "services:\n"+service(1, more, 1)+service(2, more, 1))
		for n := 1; n <= 2; n++ {
			if got := s.Open(t, fmt.Sprint(n), vip(n)); got != far(1).String() {
				t.Fatal(got)
			}
		}
		s.reload(t, "services:\n"+service(1, more, 2)+service(2, more, 2))
		renamed := fmt.Sprintf("  - {name: other, address: %q, endpoints: %s, %s}\n", vip(1), list(1, 2), more)
		s.reload(t, "services:\n"+renamed+service(2, more, 3))
		// When the one that did not come back is ended, the other would be too.
		if got := s.EndOf(t, "2"); got != resets[path] {
			t.Errorf("ended by %s, want %s", got, resets[path])
		}
		time.Sleep(100 * time.Millisecond) // it would have been ended before: by name
		if got := s.Talk(t, "1"); got != "" {
			t.Errorf("it came back, and its connection was ended: %s", got)
		}
	})
}

// TestBackAtOnce has an endpoint go whose connections are to be reset, and come back at
// once: those from before may be, and none that began when it was back.
func TestBackAtOnce(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		const times = 8
		r := rig.New(t)
		serve(t, r, 1, 2)
		more := "path: " + path + ", on_remove: reset"
		s := newStage(t, r, "services:\n"+service(1, more, 1))
		open := func(n int) {
			t.Helper()
			if got := s.Open(t, fmt.Sprint(n), vip(1)); got != far(1).String() {
				t.Fatal(got)
			}
		}
		open(0)
		for n := range times {
			s.reload(t, "services:\n"+service(1, more, 2))
			s.reload(t, "services:\n"+service(1, more, 1))
			open(n + 1)
		}
		// What goes is looked for once more after a second.
		time.Sleep(1500 * time.Millisecond)
		if got := s.Talk(t, fmt.Sprint(times)); got != "" {
			t.Errorf("it began when the endpoint was back, and was ended: %s", got)
		}
	})
}

// TestRenameKeepsConnections renames, moves and redirects a service whose
// connections are to be reset when their endpoint goes, which it does not.
func TestRenameKeepsConnections(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		serve(t, r, 1, 2)
		more := "path: " + path + ", on_remove: reset"
		named := func(name string, at int, more string) string {
			return fmt.Sprintf("services:\n  - {name: %s, address: %q, %s}\n", name, vip(at), more)
		}
		fixed := more + ", endpoints: " + list(1)
		s := newStage(t, r, named("a", 1, fixed))
		if got := s.Open(t, "c", vip(1)); got != far(1).String() {
			t.Fatal(got)
		}
		file := filepath.Join(t.TempDir(), "endpoints.json")
		other := filepath.Join(t.TempDir(), "other.json")
		put(t, file, list(1))
		found := func(file string) string { return more + fmt.Sprintf(", discover: {file: %q}", file) }
		for _, text := range []string{
			named("b", 1, fixed), named("b", 2, fixed), named("b", 1, fixed),
			named("b", 1, found(file)),  // the same, found
			named("b", 1, found(other)), // nobody knows yet: those before stay
		} {
			s.reload(t, text)
			if got := s.Talk(t, "c"); got != "" {
				t.Fatalf("after %s: %s", text, got)
			}
		}
		s.goes(t, 1, 1)
		if !s.service(t, "b").Source.Stale {
			t.Errorf("%+v", s.service(t, "b").Source)
		}
		put(t, other, list(2))
		if got := s.EndOf(t, "c"); got != resets[path] {
			t.Errorf("the endpoint is gone, and the connection ended by %s", got)
		}
		s.goes(t, 1, 2)
	})
}

// TestNobodyStays has a source tell that there are no endpoints, and another one take
// its place that cannot tell: there are none still.
func TestNobodyStays(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		serve(t, r, 1)
		dir := t.TempDir()
		file, never := filepath.Join(dir, "file.json"), filepath.Join(dir, "never.json")
		put(t, file, list(1))
		of := func(f string) string {
			return "services:\n" + service(1, fmt.Sprintf("path: %s, no_endpoint: EHOSTUNREACH, discover: {file: %q}", path, f))
		}
		s := newStage(t, r, of(file))
		s.goes(t, 1, 1)
		put(t, file, list())
		nobody := func() bool { return strings.Contains(s.Dial(t, vip(1)), "EHOSTUNREACH") }
		testutil.Eventually(t, rig.Limit, nobody, "nobody is there")
		s.reload(t, of(never))
		for range 20 {
			if !nobody() {
				t.Fatalf("connected: %s", s.Dial(t, vip(1)))
			}
		}
	})
}

// TestNotTheNext moves a service, and has a new one at its address, whose source cannot
// tell yet: that one does not have the endpoints of the other.
func TestNotTheNext(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		serve(t, r, 1)
		s := newStage(t, r, "services:\n"+service(1, "path: "+path, 1))
		s.goes(t, 1, 1)
		moved := fmt.Sprintf("  - {name: s1, address: %q, path: %s, endpoints: %s}\n", vip(2), path, list(1))
		next := fmt.Sprintf("  - {name: next, address: %q, path: %s, on_failure: closed, discover: {file: %q}}\n", vip(1), path, filepath.Join(t.TempDir(), "never.json"))
		s.reload(t, "services:\n"+moved+next)
		s.goes(t, 2, 1)
		nobody := func(when string) {
			t.Helper()
			for range 20 {
				if got := s.Dial(t, vip(1)); !strings.Contains(got, "ECONNREFUSED") {
					t.Fatalf("%s: a connection to the next one: %s", when, got)
				}
			}
		}
		nobody("after a reload")
		s.reload(t, "services:\n"+service(1, "path: "+path, 1))
		s.goes(t, 1, 1)
		other := filepath.Join(t.TempDir(), "other.yaml")
		put(t, other, "services:\n"+moved+next)
		s.Succeeded(t, s.Successor(t, rig.Binary(t), "--config", other))
		s.goes(t, 2, 1)
		nobody("after another process took over")
	})
}

// TestTakenOverLongAgo has another process take over, and a source change its mind since:
// what the process before knew is of no use any more when that source is replaced by one
// that cannot tell.
func TestTakenOverLongAgo(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		serve(t, r, 1, 2)
		dir := t.TempDir()
		file, never := filepath.Join(dir, "file.json"), filepath.Join(dir, "never.json")
		put(t, file, list(1))
		of := func(f string) string {
			return "services:\n" + service(1, fmt.Sprintf("path: %s, on_remove: reset, discover: {file: %q}", path, f))
		}
		s := newStage(t, r, of(file))
		s.goes(t, 1, 1)
		s.Replace(t, rig.Binary(t))
		s.goes(t, 1, 1)
		put(t, file, list(2))
		s.has(t, "s1", "2")
		if got := s.Open(t, "c", vip(1)); got != far(2).String() {
			t.Fatal(got)
		}
		s.reload(t, of(never))
		s.goes(t, 1, 2)
		if got := s.Talk(t, "c"); got != "" {
			t.Errorf("its endpoint is there, and the connection ended: %s", got)
		}
	})
}

// TestSourceUnderLoad changes where the endpoints of a service come from: no
// connect fails meanwhile.
func TestSourceUnderLoad(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		serve(t, r, 1, 2, 3)
		dir := t.TempDir()
		a, b, never := filepath.Join(dir, "a.json"), filepath.Join(dir, "b.yaml"), filepath.Join(dir, "never.json")
		put(t, a, list(2))
		put(t, b, list(3))
		of := func(more string) string { return "services:\n" + service(1, "path: "+path+", "+more) }
		file := func(f string) string { return fmt.Sprintf("discover: {file: %q}", f) }
		s := newStage(t, r, of("endpoints: "+list(1)))
		s.load(t, 2, 0, vip(1))
		for range 3 {
			s.reload(t, of(file(a)))
			s.has(t, "s1", "2")
			s.reload(t, of(file(never)))
			s.has(t, "s1", "2")
			s.reload(t, of(file(b)))
			s.has(t, "s1", "3")
			s.reload(t, of("endpoints: "+list(1)))
			s.has(t, "s1", "1")
		}
		if l := s.unload(t); len(l.Names) != 3 {
			t.Errorf("connects %v, want all three", l.Names)
		}
	})
}

// TestSwap adds, removes, renames and swaps services under load: connects that
// are to succeed do, and at an endpoint of theirs.
func TestSwap(t *testing.T) {
	t.Parallel()
	onPaths(t, func(t *testing.T, path string) {
		r := rig.New(t)
		serve(t, r, 1, 2, 3)
		at := func(name string, n int, endpoints ...int) string {
			return fmt.Sprintf("  - {name: %s, address: %q, path: %s, endpoints: %s, on_remove: keep}\n", name, vip(n), path, list(endpoints...))
		}
		first := "services:\n" + at("a", 1, 1) + at("b", 2, 2)
		s := newStage(t, r, first)
		s.load(t, 2, 4, vip(1), vip(2))
		for range 10 {
			s.reload(t, "services:\n"+at("a", 2, 1)+at("b", 1, 2)) // swapped
			s.goes(t, 1, 2)
			s.goes(t, 2, 1)
			s.reload(t, "services:\n"+at("b", 2, 1)+at("a", 1, 2)) // so are the names
			s.goes(t, 1, 2)
			s.reload(t, "services:\n"+at("c", 2, 1)+at("d", 1, 2)+at("e", 3, 3))
			s.goes(t, 3, 3)
			s.reload(t, first)
			s.goes(t, 1, 1)
			s.goes(t, 2, 2)
		}
		l := s.unload(t)
		if len(l.Names) != 2 || l.Rounds == 0 {
			t.Errorf("connects %v, want at 1 and 2 only, and rounds %d", l.Names, l.Rounds)
		}
		testutil.Eventually(t, rig.Limit, func() bool { return s.service(t, "e").Name == "" }, "e is gone")
	})
}
