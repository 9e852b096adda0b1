package watch

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// limit is how long a change has to be seen. It is reached in failures only.
const limit = 30 * time.Second

// seen is what a watched file led to at each call.
type seen struct {
	t     *testing.T
	read  chan struct{} // the file was read for the first time
	calls chan string
	last  string
}

// start watches path until the test ends. What polls are there is for pace to
// say: with the longest ones only the kernel's events are left.
func start(t *testing.T, path string, p pace) *seen {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s := &seen{t: t, read: make(chan struct{}), calls: make(chan string)}
	ended := make(chan error, 1)
	w := newWatcher(path, p)
	go run(ctx, w, s, ended)
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return s
}

func run(ctx context.Context, w *watcher, s *seen, ended chan<- error) {
	first := sync.OnceFunc(func() { close(s.read) })
	ended <- w.run(ctx, func() {
		b, err := os.ReadFile(w.path)
		text := string(b)
		if err != nil {
			text = "none"
		}
		first()
		select {
		case s.calls <- text:
		case <-ctx.Done():
		}
	})
}

// want waits until the file is read with that text.
func (s *seen) want(text string) {
	s.t.Helper()
	end := time.After(limit)
	for {
		select {
		case s.last = <-s.calls:
			if s.last == text {
				return
			}
		case <-end:
			s.t.Fatalf("read %q, never %q", s.last, text)
		}
	}
}

// onlyEvents is a pace in which polls find nothing.
func onlyEvents() pace {
	p := usualPace()
	p.poll, p.blind = time.Hour, time.Hour
	return p
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func do(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// configMap makes a directory as the kubelet does: name -> ..data/name, and ..data
// -> a directory by time.
func configMap(t *testing.T, dir, version, text string) {
	t.Helper()
	fresh := ".." + version
	do(t, os.MkdirAll(filepath.Join(dir, fresh), 0o755))
	write(t, filepath.Join(dir, fresh, "f"), text)
	data, temp := filepath.Join(dir, "..data"), filepath.Join(dir, "..data_tmp")
	old, _ := os.Readlink(data)
	do(t, os.Symlink(fresh, temp), os.Rename(temp, data))
	if old == "" {
		do(t, os.Symlink("..data/f", filepath.Join(dir, "f")))
		return
	}
	do(t, os.RemoveAll(filepath.Join(dir, old)))
}

func TestFile(t *testing.T) {
	for _, tt := range []struct {
		name string
		// path is the file, in the test's directory.
		path   string
		before func(t *testing.T, dir string)
		first  string
		// Each step changes the file, and then it reads want.
		steps []step
	}{
		{"in place", "f", func(t *testing.T, dir string) { write(t, dir+"/f", "a") }, "a", []step{
			{"b", func(t *testing.T, dir string) { write(t, dir+"/f", "b") }},
			{"c", func(t *testing.T, dir string) { write(t, dir+"/f", "c") }},
		}},
		{"atomic rename", "f", func(t *testing.T, dir string) { write(t, dir+"/f", "a") }, "a", []step{
			{"b", replaceBy("b")}, {"c", replaceBy("c")},
		}},
		{"comes and goes", "f", nil, "none", []step{
			{"a", func(t *testing.T, dir string) { write(t, dir+"/f", "a") }},
			{"none", func(t *testing.T, dir string) { do(t, os.Remove(dir+"/f")) }},
			{"b", replaceBy("b")},
			{"none", func(t *testing.T, dir string) { do(t, os.Rename(dir+"/f", dir+"/g")) }},
			{"b", func(t *testing.T, dir string) { do(t, os.Link(dir+"/g", dir+"/f")) }},
		}},
		{"directory comes later", "sub/deep/f", nil, "none", []step{
			{"a", func(t *testing.T, dir string) {
				do(t, os.MkdirAll(dir+"/sub/deep", 0o755))
				write(t, dir+"/sub/deep/f", "a")
			}},
			{"none", func(t *testing.T, dir string) { do(t, os.RemoveAll(dir+"/sub")) }},
			{"b", func(t *testing.T, dir string) {
				do(t, os.MkdirAll(dir+"/sub/deep", 0o755))
				write(t, dir+"/sub/deep/f", "b")
			}},
		}},
		{"directory replaced", "sub/f", func(t *testing.T, dir string) { tree(t, dir+"/sub", "a") }, "a", []step{
			{"none", func(t *testing.T, dir string) { do(t, os.Rename(dir+"/sub", dir+"/old")) }},
			{"b", func(t *testing.T, dir string) {
				tree(t, dir+"/new", "b")
				do(t, os.Rename(dir+"/new", dir+"/sub"))
			}},
			{"c", func(t *testing.T, dir string) {
				write(t, dir+"/old/f", "not this one")
				write(t, dir+"/sub/f", "c")
			}},
		}},
		{"directory above replaced", "a/b/f", func(t *testing.T, dir string) { tree(t, dir+"/a/b", "a") }, "a", []step{
			{"b", func(t *testing.T, dir string) {
				tree(t, dir+"/new/b", "b")
				do(t, os.Rename(dir+"/a", dir+"/old"), os.Rename(dir+"/new", dir+"/a"))
			}},
		}},
		{"ConfigMap", "map/f", func(t *testing.T, dir string) { configMap(t, dir+"/map", "1", "a") }, "a", []step{
			{"b", func(t *testing.T, dir string) { configMap(t, dir+"/map", "2", "b") }},
			{"c", func(t *testing.T, dir string) { configMap(t, dir+"/map", "3", "c") }},
		}},
		{"link to a ConfigMap", "link", func(t *testing.T, dir string) {
			configMap(t, dir+"/map", "1", "a")
			do(t, os.Symlink("map/f", dir+"/link"))
		}, "a", []step{
			{"b", func(t *testing.T, dir string) { configMap(t, dir+"/map", "2", "b") }},
			{"x", func(t *testing.T, dir string) {
				write(t, dir+"/other", "x")
				do(t, os.Symlink(dir+"/other", dir+"/link2"), os.Rename(dir+"/link2", dir+"/link"))
			}},
			{"y", func(t *testing.T, dir string) { write(t, dir+"/other", "y") }},
		}},
		{"link that leads nowhere", "link", func(t *testing.T, dir string) {
			do(t, os.Symlink(dir+"/not/there", dir+"/link"))
		}, "none", []step{
			{"a", func(t *testing.T, dir string) {
				do(t, os.Mkdir(dir+"/not", 0o755))
				write(t, dir+"/not/there", "a")
			}},
		}},
		{"link that leads to itself", "link", func(t *testing.T, dir string) {
			do(t, os.Symlink("link", dir+"/link"))
		}, "none", []step{
			{"a", func(t *testing.T, dir string) {
				do(t, os.Remove(dir+"/link"))
				write(t, dir+"/link", "a")
			}},
		}},
		{"link to the parent", "link/../f", func(t *testing.T, dir string) {
			tree(t, dir+"/far", "a")
			do(t, os.Mkdir(dir+"/far/sub", 0o755), os.Symlink("far/sub", dir+"/link"))
		}, "a", []step{
			{"b", func(t *testing.T, dir string) { write(t, dir+"/far/f", "b") }},
		}},
		{"permission", "f", func(t *testing.T, dir string) { write(t, dir+"/f", "a") }, "a", []step{
			{"a", func(t *testing.T, dir string) { do(t, os.Chmod(dir+"/f", 0o600)) }},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if tt.before != nil {
				tt.before(t, dir)
			}
			// Not Join, which would clean the path.
			s := start(t, dir+"/"+tt.path, onlyEvents())
			s.want(tt.first)
			for _, st := range tt.steps {
				st.change(t, dir)
				s.want(st.want)
			}
		})
	}
}

type step struct {
	want   string
	change func(t *testing.T, dir string)
}

// tree makes a directory with the file f in it.
func tree(t *testing.T, dir, text string) {
	t.Helper()
	do(t, os.MkdirAll(dir, 0o755))
	write(t, dir+"/f", text)
}

// replaceBy writes another file and renames it.
func replaceBy(text string) func(t *testing.T, dir string) {
	return func(t *testing.T, dir string) {
		t.Helper()
		write(t, dir+"/f.tmp", text)
		do(t, os.Rename(dir+"/f.tmp", dir+"/f"))
	}
}

// A file that is written in pieces is not read before its writer is done.
func TestWriterAtWork(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "f")
	write(t, path, "old")
	p := onlyEvents()
	p.open, p.latest = time.Hour, time.Hour
	s := start(t, path, p)
	s.want("old")
	f, err := os.Create(path)
	do(t, err)
	for i := range 20 {
		_, err := fmt.Fprintf(f, "line %d\n", i)
		do(t, err)
		time.Sleep(p.quiet / 5)
	}
	do(t, f.Close())
	got := <-s.calls
	if want, err := os.ReadFile(path); err != nil || got != string(want) {
		t.Errorf("the first read is of %q: the writer was at work", got)
	}
}

// One who never closes the file is read when he is quiet, or never quiet.
func TestWriterNeverCloses(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "f")
	p := onlyEvents()
	p.open, p.latest = 100*time.Millisecond, 500*time.Millisecond
	s := start(t, path, p)
	s.want("none")
	f, err := os.Create(path)
	do(t, err)
	defer f.Close()
	_, err = f.WriteString("a")
	do(t, err)
	s.want("a")

	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go scribble(ctx, f, ended)
	first := <-s.calls
	s.last = first
	cancel()
	do(t, <-ended)
	if len(first) < 2 {
		t.Errorf("read %q", first)
	}
}

func scribble(ctx context.Context, f *os.File, ended chan<- error) {
	for ctx.Err() == nil {
		if _, err := f.WriteString("x"); err != nil {
			ended <- err
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	ended <- nil
}

// Events that the kernel lost are made up for by a look.
func TestOverflow(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "f")
	write(t, path, "a")
	n, err := openNotifier()
	do(t, err)
	w := newWatcher(path, onlyEvents())
	w.in = n
	defer n.close()
	w.look()
	w.since = time.Time{}
	events := decode([]byte{
		255, 255, 255, 255, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // wd -1, IN_Q_OVERFLOW
	}, func(int32) bool { return false })
	if len(events) != 1 || !events[0].everything {
		t.Fatalf("an overflow is %+v", events)
	}
	w.take(events)
	if w.since.IsZero() {
		t.Error("an overflow is no change")
	}
}

// TestQueueFull lets the kernel's own queue run over, while nobody reads.
func TestQueueFull(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	write(t, path, "a")
	s := start(t, path, onlyEvents())
	<-s.read
	b, err := os.ReadFile("/proc/sys/fs/inotify/max_queued_events")
	do(t, err)
	var room int
	if _, err := fmt.Sscan(string(b), &room); err != nil {
		t.Fatal(err)
	}
	// Equal events in a row are one, so two names take turns. The change that
	// matters comes when there is no room for it.
	for i := range room + 100 {
		name := fmt.Sprintf("%s/noise%d", dir, i%2)
		if i < 2 {
			write(t, name, "")
		}
		do(t, os.Chmod(name, os.FileMode(0o600+i/2%2)))
	}
	write(t, path, "b")
	s.want("a")
	s.want("b")
}

// Without inotify the file is looked at.
func TestPoll(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := newWatcher(filepath.Join(dir, "f"), usualPace())
	w.pace.blind = 5 * time.Millisecond
	if w.in.watch([]entry{{dir: "/", name: "etc"}}) {
		t.Error("no notifier, and it watches")
	}
	w.look()
	if w.seen.watched {
		t.Error("no notifier, and the way is watched")
	}
	for _, text := range []string{"a", "bb"} {
		write(t, w.path, text)
		testutil.Eventually(t, limit, func() bool {
			_, err := w.wait(context.Background())
			do(t, err)
			w.take(nil)
			told := !w.since.IsZero()
			w.since = time.Time{}
			return told
		}, text)
	}
}

// A safety look finds what no event told.
func TestSafetyLook(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	write(t, path, "a")
	p := usualPace()
	p.poll = 10 * time.Millisecond
	w := newWatcher(path, p)
	var err error
	w.in, err = openNotifier()
	do(t, err)
	defer w.in.close()
	w.look()
	w.since = time.Time{}
	w.in.watch(nil) // no events any more
	write(t, path, "bb")
	testutil.Eventually(t, limit, func() bool {
		events, err := w.wait(context.Background())
		do(t, err)
		w.take(events)
		return !w.since.IsZero()
	}, "a look")
	if len(w.in.dirs) == 0 {
		t.Error("a look that watches nothing")
	}
}

func TestNoise(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	write(t, path, "a")
	s := start(t, path, onlyEvents())
	s.want("a")
	for i := range 50 {
		write(t, fmt.Sprintf("%s/other%d", dir, i), "x")
	}
	// At once: between being emptied and written it could be read.
	write(t, path+".new", "b")
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	// The first call is about b: the others' files are none.
	if got := <-s.calls; got != "b" {
		t.Errorf("called with %q", got)
	}
}

// What is written in the directories above is not even told.
func TestQuietAbove(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "f")
	tree(t, filepath.Dir(path), "a")
	write(t, dir+"/noise", "a")
	n, err := openNotifier()
	do(t, err)
	defer n.close()
	w := newWatcher(path, onlyEvents())
	w.in = n
	w.look()
	for range 10 {
		f, err := os.OpenFile(dir+"/noise", os.O_WRONLY|os.O_APPEND, 0)
		do(t, err)
		_, err = f.WriteString("b")
		do(t, err, f.Close())
	}
	write(t, path, "b")
	for deadline, told := time.Now().Add(limit), false; !told; {
		events, err := n.read(deadline)
		do(t, err)
		if len(events) == 0 {
			t.Fatal("no event of the file")
		}
		for _, e := range events {
			told = told || e.name == "f"
			// Others may come and go in the directory of all temporary ones.
			if e.name == "noise" {
				t.Errorf("event %+v", e)
			}
		}
	}
}

func TestNoPath(t *testing.T) {
	t.Parallel()
	if err := File(context.Background(), "", func() {}); err == nil {
		t.Error("a watch of nothing")
	}
}

// The end of the context ends a wait at once, also with a change pending.
func TestEnd(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "f")
	p := onlyEvents()
	p.quiet, p.open, p.latest = time.Hour, time.Hour, time.Hour
	s := start(t, path, p)
	s.want("none")
	write(t, path, "a")
}
