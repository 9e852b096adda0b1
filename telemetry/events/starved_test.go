package events

import (
	"encoding/binary"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

// joined fails the test unless one record came out, of both halves.
func (b *bench) joined(t *testing.T, cookie uint64) {
	t.Helper()
	got := b.sink.taken()
	if diff := cmp.Diff([]uint64{cookie}, cookies(got)); diff != "" {
		t.Fatal(diff)
	}
	if got[0].Service != "web" || got[0].Duration != time.Second {
		t.Errorf("joined: %+v", got[0])
	}
	if n := b.Losses().Unmatched; n != 0 {
		t.Errorf("%d unmatched", n)
	}
}

// none fails the test if a record came out.
func (b *bench) none(t *testing.T) {
	t.Helper()
	if got := b.sink.taken(); len(got) != 0 {
		t.Errorf("%d has not been waited for: %+v", got[0].Cookie, got)
	}
}

// A collector that got no processor for long gives nobody up for that: who has the
// other half may have got none either.
func TestWaitsWithoutProcessor(t *testing.T) {
	t.Parallel()
	b := newBench(Options{})
	ctx := t.Context()
	b.ring.put(raw(event(1, flow.PathRelay, bpf.EndingClosed)))
	b.Flush(ctx)
	for n := range 3 {
		b.now = func() time.Time { return epoch.Add(time.Duration(n+1) * time.Hour) }
		b.Flush(ctx)
	}
	b.none(t)
	b.handler.end(handled(1))
	b.Flush(ctx)
	b.joined(t, 1)
}

// What lies behind an event that is being written could not be read.
func TestWaitsForTheRing(t *testing.T) {
	t.Parallel()
	b := newBench(Options{})
	ctx := t.Context()
	b.Flush(ctx)
	b.ring.busy = true
	b.handler.end(handled(1))
	b.ring.put(raw(event(1, flow.PathRelay, bpf.EndingClosed)))
	b.waits(ctx, untoldMax-interval)
	b.none(t)
	b.ring.busy = false
	b.waits(ctx, interval)
	b.joined(t, 1)

	// Not for ever.
	b.ring.busy = true
	b.handler.end(handled(2))
	b.waits(ctx, untoldMax)
	got := b.sink.taken()
	if len(got) != 1 || got[0].Cookie != 2 || b.Losses().Unmatched != 1 {
		t.Errorf("behind a ring that stays as it is: %+v, %+v", got, b.Losses())
	}
}

// A handler that does not answer in time may carry anything.
func TestWaitsForTheHandler(t *testing.T) {
	t.Parallel()
	b := newBench(Options{})
	ctx := t.Context()
	b.ring.put(raw(event(1, flow.PathRelay, bpf.EndingClosed)))
	b.waits(ctx, patience)
	b.handler.hangs = true
	b.waits(ctx, 3*interval)
	b.none(t)
	b.handler.hangs = false
	b.handler.end(handled(1))
	b.waits(ctx, interval)
	b.joined(t, 1)
}

// A ring tells whether an event that is being written was in the way.
func TestRingBusy(t *testing.T) {
	page := os.Getpagesize()
	fd, err := unix.MemfdCreate("ring", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "ring")
	defer f.Close()
	if err := f.Truncate(int64(4 * page)); err != nil { // positions, and the data twice
		t.Fatal(err)
	}
	write := func(at int, b []byte) {
		t.Helper()
		if _, err := f.WriteAt(b, int64(at)); err != nil {
			t.Fatal(err)
		}
	}
	conn, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	w, err := openWindow(conn, page)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	r := &ring{window: w}
	read := func() (n int, all bool) {
		t.Helper()
		all, err := r.read(func([]byte) { n++ })
		if err != nil {
			t.Fatal(err)
		}
		return n, all
	}
	const record = 16 // with its header
	head := binary.NativeEndian.AppendUint32(nil, 8)
	write(page, binary.NativeEndian.AppendUint64(nil, 3*record))
	write(2*page, head)
	write(2*page+record, binary.NativeEndian.AppendUint32(nil, 8|unix.BPF_RINGBUF_BUSY_BIT))
	write(2*page+2*record, head)
	if n, all := read(); n != 1 || all {
		t.Errorf("before one that is being written: %d, all: %t", n, all)
	}
	if n, all := read(); n != 0 || all {
		t.Errorf("once more: %d, all: %t", n, all)
	}
	write(2*page+record, head)
	if n, all := read(); n != 2 || !all {
		t.Errorf("when it is written: %d, all: %t", n, all)
	}
	if n, all := read(); n != 0 || !all {
		t.Errorf("of nothing: %d, all: %t", n, all)
	}
}
