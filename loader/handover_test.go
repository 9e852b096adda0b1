package loader

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"golang.org/x/sys/unix"
)

// dup is what another process has of a descriptor.
func dup(t *testing.T, fd int) int {
	t.Helper()
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return own
}

// TestHandover has one datapath go on with another's instance. Until it takes that,
// nothing has changed, and the first goes on; then the first changes nothing any more,
// and its end takes nothing away.
func TestHandover(t *testing.T) {
	p := newPlace(t)
	first := p.create(t, "one")
	setRules(t, first, plain)
	if _, err := first.Queues(2); err != nil {
		t.Fatal(err)
	}
	p.handler(t, first)
	p.attach(t, first)
	join := func() *Datapath {
		t.Helper()
		h := first.Handover()
		for i, fd := range h.Rings {
			h.Rings[i] = dup(t, fd)
		}
		var d *Datapath
		err := p.do(t, "one", func(o Options) (err error) {
			o.Own = 42 // which Take writes
			d, err = Join(o, h)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	settings := func() (s bpf.Settings) {
		t.Helper()
		if err := first.maps.Settings.Lookup(uint32(0), &s); err != nil {
			t.Fatal(err)
		}
		return s
	}

	before := settings()
	second := join()
	if got := settings(); got != before {
		t.Errorf("joining has changed the settings: %+v, they were %+v", got, before)
	}
	if len(second.Joined()) != len(first.queues) || second.frameTag != first.frameTag || !second.Adopted() {
		t.Errorf("%d queues, tag %x, adopted %v", len(second.Joined()), second.frameTag, second.Adopted())
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	// It came to nothing: the first goes on.
	end := first.Freeze()
	tidied := make(chan error, 1)
	go func() { tidied <- first.tidy() }()
	select {
	case err := <-tidied:
		t.Fatalf("it is tidied although nothing is to change: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	end(false)
	if err := <-tidied; err != nil {
		t.Error(err)
	}
	setRules(t, first, Rules{Default: plain.Default, Workers: 1, MaxConns: 7})
	if got := settings(); got.LiveMax != 7 {
		t.Errorf("settings of the first: %+v", got)
	}

	second = join()
	end = first.Freeze()
	lock := os.NewFile(uintptr(dup(t, first.Lock())), "pins")
	end(true)
	if err := p.App.Run(func() error { return second.Take(lock) }); err != nil {
		t.Fatal(err)
	}
	if got := settings(); got.OwnGroup != 42 {
		t.Errorf("settings of the second: %+v", got)
	}
	p.attach(t, second)
	// The first has lost its routes' care, and its end ends nothing.
	if err := p.App.Run(func() error { return errors.Join(first.tidy(), first.mendNothing()) }); err != nil {
		t.Error(err)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	err := p.do(t, "one", func(o Options) error { _, err := Open(o); return err })
	if !errors.Is(err, ErrInUse) {
		t.Errorf("a third: %v, want %v: the lock has moved", err, ErrInUse)
	}
	if _, err := second.LockPins(20 * time.Millisecond); !errors.Is(err, ErrInUse) {
		t.Errorf("the lock while somebody has it: %v", err)
	}
	mended, err := second.Reattach()
	if err != nil || len(mended) > 0 {
		t.Errorf("what had to be attached again: %v, %v", mended, err)
	}
	p.unload(t, second)
	p.clean(t)
}

// mendNothing wants nothing done by who has left.
func (d *Datapath) mendNothing() error {
	synced, err := d.Sync()
	attached, err2 := d.Reattach()
	if len(synced)+len(attached) > 0 {
		err = errors.Join(err, errors.New("it still mends"))
	}
	return errors.Join(err, err2)
}
