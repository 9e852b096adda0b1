package file

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
)

// limit is how long a change has to be seen. It is reached in failures only.
const limit = 30 * time.Second

// start runs the source of a file until the test ends.
func start(t *testing.T, path string) <-chan discover.Snapshot {
	t.Helper()
	s, err := New(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	out := make(chan discover.Snapshot)
	ended := make(chan error, 1)
	go drive(ctx, s, out, ended)
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return out
}

func drive(ctx context.Context, s *Source, out chan<- discover.Snapshot, ended chan<- error) {
	ended <- s.Run(ctx, out)
}

func next(t *testing.T, out <-chan discover.Snapshot) discover.Snapshot {
	t.Helper()
	select {
	case s := <-out:
		return s
	case <-time.After(limit):
		t.Fatal("no snapshot")
		return discover.Snapshot{}
	}
}

// wantSet waits for a set. Errors before it are those of a file half-way.
func wantSet(t *testing.T, out <-chan discover.Snapshot, want ...discover.Endpoint) {
	t.Helper()
	for {
		s := next(t, out)
		if s.Err != nil {
			continue
		}
		if diff := cmp.Diff(want, s.Endpoints, equal); diff != "" {
			t.Fatalf("(-want +got)\n%s", diff)
		}
		return
	}
}

func wantError(t *testing.T, out <-chan discover.Snapshot, text string) {
	t.Helper()
	s := next(t, out)
	for s.Err != nil && !strings.Contains(s.Err.Error(), text) {
		s = next(t, out) // the error before, told again
	}
	if s.Err == nil || s.Endpoints != nil {
		t.Fatalf("got %+v, want an error with %q", s, text)
	}
}

// put replaces a file as a careful writer does.
func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".tmp", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		t.Fatal(err)
	}
}

func TestRun(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f.yaml")
	out := start(t, path)
	wantError(t, out, "no such file")

	one, two := endpoint("192.0.2.1:80", 1, ""), endpoint("192.0.2.2:80", 2, "a")
	put(t, path, "- 192.0.2.1:80\n")
	wantSet(t, out, one)
	put(t, path, "- {address: 192.0.2.2:80, weight: 2, zone: a}\n- 192.0.2.1:80\n")
	wantSet(t, out, one, two)

	put(t, path, "- 192.0.2.1\n")
	wantError(t, out, path+":1:3: ")
	// The error is over also if the set is the old one.
	put(t, path, "- 192.0.2.1:80\n- {address: 192.0.2.2:80, weight: 2, zone: a}\n")
	wantSet(t, out, one, two)

	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	wantError(t, out, "empty")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	wantError(t, out, "no such file")
	put(t, path, "[]\n")
	wantSet(t, out)

	// What is no change is not told: the next snapshot is that of the next one.
	put(t, path, "# still nobody\n[]\n")
	put(t, path, "- 192.0.2.1:80\n")
	if s := next(t, out); s.Err != nil || len(s.Endpoints) != 1 {
		t.Errorf("got %+v", s)
	}
}

// A pipe without a writer is an error and no hang.
func TestPipe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f.json")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	out := start(t, path)
	wantError(t, out, "no regular file")
	put(t, path, `["192.0.2.1:80"]`)
	wantSet(t, out, endpoint("192.0.2.1:80", 1, ""))
}

func TestDirectory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f.json")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	wantError(t, start(t, path), "no regular file")
}
