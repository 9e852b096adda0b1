package flowlog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
)

var update = flag.Bool("update", false, "write the golden file")

func record(cookie uint64) *flow.Record {
	return &flow.Record{
		Cookie:   cookie,
		Cgroup:   7,
		Source:   netip.MustParseAddrPort("192.0.2.7:40000"),
		OrigDst:  netip.MustParseAddrPort("[2001:db8::1]:443"),
		Service:  "web",
		Cluster:  "web",
		Endpoint: netip.MustParseAddrPort("127.0.0.1:8081"),
		Path:     flow.PathRelay,
		Reason:   flow.ReasonService,
		End:      flow.ReasonClosed,
		Attempts: 2,
		Start:    time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC),
		Duration: time.Second,
		Connect:  time.Millisecond,
		RTT:      100 * time.Microsecond,
		Sent:     100,
		Received: 1 << 40,
	}
}

// start opens a log and runs it. stop ends it and reports what Run did.
func start(t *testing.T, path string, queue int) (l *Log, stop func() error) {
	t.Helper()
	l, err := Open(path, queue)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	return l, func() error { cancel(); return <-done }
}

// read returns the records of the file, which must be whole lines.
func read(t *testing.T, path string) []flow.Record {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, b)
}

func parse(t *testing.T, b []byte) []flow.Record {
	t.Helper()
	var all []flow.Record
	for line := range bytes.Lines(b) {
		var r flow.Record
		if err := json.Unmarshal(line, &r); err != nil || !bytes.HasSuffix(line, []byte{'\n'}) {
			t.Fatalf("line %q: %v", line, err)
		}
		all = append(all, r)
	}
	return all
}

func size(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return -1
	}
	return info.Size()
}

func TestLine(t *testing.T) {
	const golden = "testdata/record.good.json"
	path := filepath.Join(t.TempDir(), "flows")
	l, stop := start(t, path, 0)
	l.Record(record(1))
	l.Record(&flow.Record{Path: flow.PathDeny, Reason: flow.ReasonDenied, End: flow.ReasonDenied})
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(golden, got, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(*record(1), read(t, path)[0], cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
		t.Errorf("read back: %s", diff)
	}
}

func TestOpen(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	path := filepath.Join(t.TempDir(), "flows")
	for i := range 2 {
		l, stop := start(t, path, 1)
		l.Record(record(uint64(i)))
		if err := errors.Join(stop(), l.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(read(t, path)); n != 2 {
		t.Errorf("%d lines: it was not appended to", n)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("mode %s, %v", info.Mode(), err)
	}
	if _, err := Open(filepath.Join(path, "below"), 0); err == nil {
		t.Error("opened below a file")
	}
	if _, err := Open(path, -1); err == nil {
		t.Error("a negative queue is accepted")
	}
}

// What a process leaves that was killed while it wrote spoils no other line.
func TestOpenTorn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "flows")
	const half = `{"cookie":7,"cgr`
	for _, before := range []string{"", "{}\n", half, "{}\n" + half} {
		if err := os.WriteFile(path, []byte(before), 0o600); err != nil {
			t.Fatal(err)
		}
		l, stop := start(t, path, 1)
		l.Record(record(1))
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		all, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		rest := strings.TrimPrefix(string(all), before)
		if torn := strings.HasSuffix(before, half); torn != strings.HasPrefix(rest, "\n") {
			t.Errorf("after %q comes %q", before, rest)
		}
		if got := parse(t, []byte(strings.TrimPrefix(rest, "\n"))); len(got) != 1 || got[0].Cookie != 1 {
			t.Errorf("after %q: %+v", before, got)
		}
	}
}

// A line is in the file when there is nothing more to come, without an end.
func TestIdleFlush(t *testing.T) {
	path := filepath.Join(t.TempDir(), "flows")
	l, stop := start(t, path, 0)
	for i := range 3 {
		l.Record(record(uint64(i)))
		testutil.Eventually(t, 10*time.Second, func() bool { return len(read(t, path)) == i+1 }, "line", i)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// Everything that was taken is written, from many goroutines and at the end.
func TestNothingVanishes(t *testing.T) {
	testutil.CheckLeaks(t)
	const writers, each = 8, 2000
	path := filepath.Join(t.TempDir(), "flows")
	l, stop := start(t, path, 1000)
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for i := range each {
				l.Record(record(uint64(w*each + i)))
			}
		})
	}
	all.Wait()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	seen := map[uint64]bool{}
	for _, r := range read(t, path) {
		seen[r.Cookie] = true
	}
	if got := uint64(len(seen)) + l.Dropped(); got != writers*each || l.Failed() != 0 {
		t.Errorf("%d lines, %d dropped, %d failed of %d", len(seen), l.Dropped(), l.Failed(), writers*each)
	}
	before := l.Dropped()
	l.Record(record(1))
	if l.Dropped() != before+1 {
		t.Error("a record after the end is not counted")
	}
}

func TestReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "flows")
	l, stop := start(t, path, 0)
	l.Record(record(1))
	testutil.Eventually(t, 10*time.Second, func() bool { return size(path) > 0 })
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	l.Record(record(2))
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if old, now := read(t, path+".1"), read(t, path); len(old) != 1 || len(now) != 1 || now[0].Cookie != 2 {
		t.Errorf("rotated %d lines, then %d", len(old), len(now))
	}
	if err := l.Reopen(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
}

// A rotation that goes wrong leaves the log where it was.
func TestReopenFails(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "flows")
	l, stop := start(t, path, 0)
	if err := os.Rename(dir, dir+".1"); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(); err == nil {
		t.Error("reopened in a directory that is gone")
	}
	l.Record(record(1))
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if n := len(read(t, filepath.Join(dir+".1", "flows"))); n != 1 {
		t.Errorf("%d lines", n)
	}
}

// disk is a file on a disk with little room.
type disk struct {
	mu      sync.Mutex
	room    int
	written bytes.Buffer
	closed  bool
	blocked chan struct{} // if not nil, writes wait for it
}

func (d *disk) Write(b []byte) (int, error) {
	if d.blocked != nil {
		<-d.blocked
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n := min(len(b), d.room)
	d.room -= n
	d.written.Write(b[:n])
	if n < len(b) {
		return n, syscall.ENOSPC
	}
	return n, nil
}

func (d *disk) Close() error { d.closed = true; return nil }

// captureLog sends the process's log to the returned buffer.
func captureLog(t *testing.T) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&b, nil)))
	t.Cleanup(func() { slog.SetDefault(old) })
	return &b
}

func TestFullDisk(t *testing.T) {
	logged := captureLog(t)
	var b bytes.Buffer
	l := &Log{path: "flows"}
	l.encode(&b, record(1))
	line := b.Len()
	d := &disk{room: line + 10}
	l.file = d
	l.encode(&b, record(2))
	l.encode(&b, record(3))

	l.write(&b) // one line and a bit
	for range 5 {
		l.encode(&b, record(4))
		l.write(&b) // nothing, not even the end of the line
	}
	if l.Failed() != 7 || b.Len() != 0 {
		t.Errorf("%d failed, want 7; %d bytes left", l.Failed(), b.Len())
	}
	if n := strings.Count(logged.String(), "cannot be written"); n != 1 {
		t.Errorf("logged %d times:\n%s", n, logged)
	}

	d.room = 10 * line
	l.encode(&b, record(5))
	l.write(&b)
	if !strings.Contains(logged.String(), "written again") {
		t.Errorf("not logged:\n%s", logged)
	}
	// The broken line is one line, and spoils no other.
	lines := bytes.SplitAfter(d.written.Bytes(), []byte{'\n'})
	if len(lines) != 4 || len(lines[1]) != 11 || len(lines[3]) != 0 {
		t.Fatalf("%d lines: %q", len(lines), lines)
	}
	if got := parse(t, append(lines[0], lines[2]...)); got[0].Cookie != 1 || got[1].Cookie != 5 {
		t.Errorf("%+v", got)
	}
	if err := l.Close(); err != nil || !d.closed {
		t.Errorf("closed %t, %v", d.closed, err)
	}
	l.encode(&b, record(6))
	l.write(&b)
	if l.Failed() != 8 {
		t.Errorf("%d failed: a write after the end is not counted", l.Failed())
	}
}

// The same with a real file that has no room.
func TestDevFull(t *testing.T) {
	captureLog(t)
	path := filepath.Join(t.TempDir(), "flows")
	if err := os.Symlink("/dev/full", path); err != nil {
		t.Fatal(err)
	}
	l, stop := start(t, path, 0)
	l.Record(record(1))
	testutil.Eventually(t, 10*time.Second, func() bool { return l.Failed() == 1 })
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	l.Record(record(2))
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if n := len(read(t, path)); n != 1 {
		t.Errorf("%d lines", n)
	}
}

// A disk that hangs stops the log and nobody else.
func TestHangingDisk(t *testing.T) {
	captureLog(t)
	const queue = 4
	path := filepath.Join(t.TempDir(), "flows")
	l, err := Open(path, queue)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	d := &disk{room: 1 << 20, blocked: make(chan struct{})}
	l.file = d
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	for i := range 1000 {
		l.Record(record(uint64(i)))
	}
	if l.Dropped() == 0 {
		t.Error("nothing was dropped")
	}
	close(d.blocked)
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := uint64(len(parse(t, d.written.Bytes()))) + l.Dropped(); got != 1000 {
		t.Errorf("%d written or dropped", got)
	}
}

// One that JSON cannot express costs itself only.
func TestUnencodable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "flows")
	l, stop := start(t, path, 0)
	r := record(1)
	r.Start = time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC)
	l.Record(r)
	l.Record(record(2))
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if got := read(t, path); len(got) != 1 || got[0].Cookie != 2 || l.Failed() != 1 {
		t.Errorf("%d lines, %d failed", len(got), l.Failed())
	}
}

// TestTornAndFull: what the disk has no room for is not kept, also where it ends in half
// a line.
func TestTornAndFull(t *testing.T) {
	captureLog(t)
	var b bytes.Buffer
	told := 0
	l := &Log{path: "flows", file: &disk{room: 10}}
	l.Written(func(*flow.Record) { told++ })
	for n := range 100 {
		l.encode(&b, record(uint64(n)))
		l.write(&b)
	}
	if told != 100 || len(l.batch) != 0 {
		t.Errorf("of 100 records %d were told of, and %d are kept", told, len(l.batch))
	}
}

// within fails the test if f takes longer than anything here may.
func within(t *testing.T, what string, f func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-time.After(20 * time.Second):
		t.Fatalf("%s does not end", what)
		return nil
	}
}

// TestPipe has a pipe in the file's place: one that nobody has open is refused, and one
// that nobody reads from holds up neither a reload nor the end.
func TestPipe(t *testing.T) {
	captureLog(t)
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := within(t, "to open a pipe", func() error { _, err := Open(path, 0); return err }); err == nil {
		t.Error("a pipe without a reader is opened")
	}
	reader, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	l, stop := start(t, path, 0)
	for n := range 4000 { // more than it holds
		l.Record(record(uint64(n)))
	}
	testutil.Eventually(t, 20*time.Second, func() bool { return len(l.queue) < 4000 })
	time.Sleep(10 * time.Millisecond)
	if err := within(t, "to reopen", l.Reopen); err == nil {
		t.Error("reopened, although the old one takes nothing")
	}
	if err := within(t, "the log", stop); err != nil {
		t.Error(err)
	}
	if l.Failed() == 0 {
		t.Error("nothing failed")
	}
}
