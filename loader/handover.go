package loader

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Handover is what a process needs of the one that runs an instance, to go on with it
// without an interruption. The descriptors are the receiver's own.
type Handover struct {
	// FrameTag is what the programs know our own frames by. With another one, those
	// of handshakes that wait would be nobody's.
	FrameTag uint64
	// Rings are those of the workers, in order; none where handshakes are not held.
	// They remember what was read.
	Rings []int
}

// Handover returns what another process needs. The descriptors stay the datapath's.
func (d *Datapath) Handover() Handover {
	h := Handover{FrameTag: d.frameTag}
	for _, q := range d.queues {
		h.Rings = append(h.Rings, q.ring.FD())
	}
	return h
}

// Lock returns the descriptor of the pin directory. The lock on it is of the open
// file, so it lasts for as long as any process has that.
func (d *Datapath) Lock() int { return int(d.dir.file.Fd()) }

// Freeze has the datapath change nothing until the returned function is called with
// false; with true, it never does again, since another process has the instance. What
// the caller's own goroutines do is theirs.
func (d *Datapath) Freeze() (end func(left bool)) {
	d.mu.Lock()
	d.sets.mu.Lock()
	d.linkMu.Lock()
	return func(left bool) {
		d.left.Store(left)
		d.linkMu.Unlock()
		d.sets.mu.Unlock()
		d.mu.Unlock()
	}
}

// Join prepares to go on with an instance that another process runs. It loads the
// programs of this build over its maps, and writes nothing: see [Datapath.Take]. The
// rings are its own from now on, also on an error. The errors are those of [Open],
// but for ErrInUse.
func Join(o Options, h Handover) (*Datapath, error) {
	d, err := join(o, &h)
	if err != nil {
		for _, fd := range h.Rings {
			unix.Close(fd)
		}
		return nil, fmt.Errorf("join instance %s: %w", o.Name, err)
	}
	return d, nil
}

func join(o Options, h *Handover) (*Datapath, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	path := pinDir(o.BPFFS, o.Name)
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	d := newDatapath(o)
	d.dir, d.adopted, d.frameTag = &dir{path: path}, true, h.FrameTag
	d.relays.Store(true) // by rules of the earlier process, perhaps
	err := d.prepare()
	for len(h.Rings) > 0 && err == nil {
		var q *Queue
		// Both close the descriptor when they fail.
		var ring *ebpf.Map
		fd := h.Rings[0]
		h.Rings = h.Rings[1:]
		if ring, err = ebpf.NewMapFromFD(fd); err == nil {
			q, err = d.joinQueue(len(d.queues), ring)
		}
		if err == nil {
			d.queues = append(d.queues, q)
		}
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// Joined returns the queues of the rings that [Join] or [Resume] was given.
func (d *Datapath) Joined() []*Queue { return d.queues }

// Take makes the datapath of [Join] the one that runs the instance, which nobody else
// does any more. lock is the locked pin directory, and the datapath's from now on.
func (d *Datapath) Take(lock *os.File) error {
	d.dir.file = lock
	if !same(lock, d.dir.path) {
		return fmt.Errorf("take over instance %s: what is locked are not its pins", d.options.Name)
	}
	d.disown()
	if err := d.takeCharge(); err != nil {
		return fmt.Errorf("take over instance %s: %w", d.options.Name, err)
	}
	return nil
}

// LockPins locks the pins of an instance whose process has died, for Take. One that
// lives has the lock, and that is [ErrInUse]; a dying one may have it for a moment.
func (d *Datapath) LockPins(patience time.Duration) (*os.File, error) {
	l, err := lockWithin(d.dir.path, patience)
	if err != nil {
		return nil, err
	}
	return l.file, nil
}

// Await waits until no process has an instance, which is [ErrInUse] if that takes longer
// than patience. One that does not exist nobody has.
func Await(bpffs, name string, patience time.Duration) error {
	l, err := lockWithin(pinDir(bpffs, name), patience)
	switch {
	case errors.Is(err, ErrNotFound):
		return nil
	case err != nil:
		return err
	default:
		l.unlock()
		return nil
	}
}

func lockWithin(path string, patience time.Duration) (*dir, error) {
	for end := time.Now().Add(patience); ; time.Sleep(lockRetry) {
		l, err := lockDir(path, false)
		if !errors.Is(err, ErrInUse) || time.Now().After(end) {
			return l, err
		}
	}
}

// lockRetry is how soon it is tried again.
const lockRetry = 10 * time.Millisecond
