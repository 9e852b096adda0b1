package flowlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

const (
	// defaultQueue is how many records wait for the disk.
	defaultQueue = 8192
	// bufferSize is how many bytes are written at once, at least, when there is
	// more to come.
	bufferSize = 64 << 10
)

// Log is a file of flow records. Its methods are safe for concurrent use.
type Log struct {
	path  string
	queue chan flow.Record

	ended   atomic.Bool
	dropped atomic.Uint64
	failed  atomic.Uint64
	// failing is set from a failed write to the next good one.
	failing atomic.Bool

	// reopens has room for one: who asks does not wait for a disk that hangs.
	reopens chan chan error
	// begin guards running: from then on all that is done with the file is done by Run.
	begin   sync.Mutex
	running bool

	// mu guards file. It is not held while something is written, which may take for
	// ever.
	mu   sync.Mutex
	file io.WriteCloser // nil once closed
	// What follows is of whoever writes: of Run.

	// torn is set while the file ends in half a line.
	torn bool

	wrote func(*flow.Record) // see Written
	batch []flow.Record      // what is encoded and not yet written, for that
}

// Open opens the file at path to append to, and makes it with mode 0640 if it is
// missing. queue is how many records may wait to be written, 8192 if 0. Run
// writes them and closes the file; if Run is not called, Close must be.
func Open(path string, queue int) (*Log, error) {
	if queue < 0 {
		return nil, fmt.Errorf("queue of %d records: negative", queue)
	}
	if queue == 0 {
		queue = defaultQueue
	}
	f, err := open(path)
	if err != nil {
		return nil, err
	}
	return &Log{path: path, queue: make(chan flow.Record, queue), reopens: make(chan chan error, 1), file: f, torn: isTorn(path)}, nil
}

// isTorn tells whether a file ends in half a line, as a process leaves it that was killed
// while it wrote. What is no file, or may not be read, does not.
func isTorn(path string) bool {
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
		return false
	}
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	var last [1]byte
	_, err = f.ReadAt(last[:], info.Size()-1)
	return err == nil && last[0] != '\n'
}

func open(path string) (*os.File, error) {
	// Not blocking: a pipe that nobody reads would hold us up for ever.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NONBLOCK, 0o640)
	if errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("open flow log: %s is a pipe or a socket that nobody reads", path)
	}
	if err != nil {
		return nil, fmt.Errorf("open flow log: %w", err)
	}
	return f, nil
}

// Written has f called with each record when it is in the file, or could not be
// written. Call it before Run.
func (l *Log) Written(f func(*flow.Record)) { l.wrote = f }

// Record takes a copy of r. It never blocks: when the queue is full, r is
// dropped and counted.
func (l *Log) Record(r *flow.Record) {
	if l.ended.Load() {
		l.dropped.Add(1)
		return
	}
	select {
	case l.queue <- *r:
	default:
		l.dropped.Add(1)
	}
}

// Dropped counts the records that found the queue full, or came when Run
// had ended.
func (l *Log) Dropped() uint64 { return l.dropped.Load() }

// Failed counts the records that could not be written, for example to a full
// disk.
func (l *Log) Failed() uint64 { return l.failed.Load() }

// Failing tells whether the last record could not be written.
func (l *Log) Failing() bool { return l.failing.Load() }

// endLimit is how long what still waits may take to be written in the end, to a pipe whose
// reader takes nothing. A disk has no such limit.
const endLimit = time.Second

// Run writes records until ctx is done, then what still waits, and closes the
// file. End the sources of records before, so that their last ones are in it. A
// failed write is counted, and logged when it is the first of its kind; Run goes
// on, since the disk may have room again.
func (l *Log) Run(ctx context.Context) error {
	l.runs(true)
	defer l.runs(false)
	stop := context.AfterFunc(ctx, l.hurry)
	defer stop()
	var b bytes.Buffer
	for {
		select {
		case r := <-l.queue:
			l.encode(&b, &r)
			l.drain(&b)
		case answer := <-l.reopens:
			answer <- l.reopen()
			if ctx.Err() != nil {
				l.hurry() // the new one
			}
		case <-ctx.Done():
			l.ended.Store(true)
			l.drain(&b)
			return l.Close()
		}
	}
}

func (l *Log) runs(yes bool) {
	l.begin.Lock()
	defer l.begin.Unlock()
	l.running = yes
}

// hurry ends writes that wait for a reader.
func (l *Log) hurry() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f, ok := l.file.(interface{ SetWriteDeadline(time.Time) error }); ok {
		_ = f.SetWriteDeadline(time.Now().Add(endLimit)) // files on disks have none
	}
}

// drain writes b and everything that waits now, so that nothing is held back when
// there is nothing more to come.
func (l *Log) drain(b *bytes.Buffer) {
	// Not until the queue is empty: under a flood it never is.
	for range len(l.queue) {
		r := <-l.queue
		l.encode(b, &r)
		if b.Len() >= bufferSize {
			l.write(b)
		}
	}
	l.write(b)
}

// encode appends one line to b.
func (l *Log) encode(b *bytes.Buffer, r *flow.Record) {
	line, err := appendRecord(b.AvailableBuffer(), r)
	if err != nil {
		// A time that JSON cannot express; it is no fault of the others.
		l.failed.Add(1)
		return
	}
	b.Write(append(line, '\n'))
	if l.wrote != nil {
		l.batch = append(l.batch, *r)
	}
}

// write writes the lines in b and empties it.
func (l *Log) write(b *bytes.Buffer) {
	defer b.Reset()
	if b.Len() == 0 {
		return
	}
	l.mu.Lock()
	file := l.file
	l.mu.Unlock()
	if file != nil && l.mend(file) {
		n, err := file.Write(b.Bytes())
		l.note(b.Bytes()[:n], b.Bytes()[n:], err)
	} else {
		l.failed.Add(countLines(b.Bytes()))
	}
	for i := range l.batch {
		l.wrote(&l.batch[i])
	}
	l.batch = l.batch[:0]
}

// mend ends the half line that a failed write left, so that it spoils no other.
func (l *Log) mend(file io.Writer) bool {
	if !l.torn {
		return true
	}
	_, err := file.Write([]byte{'\n'})
	l.torn = err != nil
	return !l.torn
}

// note takes note of a write: what went out, what did not, and why.
func (l *Log) note(out, left []byte, err error) {
	if err == nil {
		if l.failing.Swap(false) {
			slog.Info("flow log is written again", "path", l.path, "failed", l.failed.Load())
		}
		return
	}
	l.torn = len(out) > 0 && out[len(out)-1] != '\n'
	l.failed.Add(countLines(left))
	if !l.failing.Swap(true) {
		// Once: a full disk stays full for many lines, and the log of the
		// process may be on the same one.
		slog.Error("flow log cannot be written", "path", l.path, "error", err)
	}
}

func countLines(b []byte) uint64 { return uint64(bytes.Count(b, []byte{'\n'})) }

// reopenLimit is how long Reopen waits for a disk, or for who reads a pipe.
const reopenLimit = time.Second

// Reopen opens the file at the path again, after a rotation has moved it away.
// If that fails, the old file stays. Lines that are on their way go to either. Where
// the old file cannot be written for a second, it fails, and is done as soon as it can.
func (l *Log) Reopen() error {
	l.begin.Lock()
	if !l.running {
		defer l.begin.Unlock()
		return l.reopen()
	}
	l.begin.Unlock()
	answer := make(chan error, 1)
	limit := time.NewTimer(reopenLimit)
	defer limit.Stop()
	select {
	case l.reopens <- answer:
	default:
		return errHangs
	}
	select {
	case err := <-answer:
		return err
	case <-limit.C:
		return errHangs
	}
}

// errHangs means that nothing can be done with the file at present.
var errHangs = errors.New("reopen flow log: what was written before is not taken yet")

func (l *Log) reopen() error {
	f, err := open(l.path)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return errors.Join(fmt.Errorf("reopen flow log: %w", os.ErrClosed), f.Close())
	}
	old := l.file
	l.file, l.torn = f, isTorn(l.path)
	if err := old.Close(); err != nil {
		return fmt.Errorf("close rotated flow log: %w", err)
	}
	return nil
}

// Close closes the file. Run does it. A second call does nothing.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	f := l.file
	l.file = nil
	if err := f.Close(); err != nil {
		return fmt.Errorf("close flow log: %w", err)
	}
	return nil
}
