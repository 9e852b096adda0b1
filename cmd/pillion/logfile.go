package main

import (
	"errors"
	"io"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// logPatience is how long a line waits for who reads the log, if the one before did
	// not have to wait for nothing.
	logPatience = 200 * time.Millisecond
	// logPiece is what may be written where poll(2) says that something may be, without
	// waiting: a pipe has room for a page then.
	logPiece = 4096
)

// logFile is where the log goes. Whoever reads it may be slow, or hang: that costs lines,
// which are counted, and holds nothing up. The file is not made non-blocking for that: it
// is shared with those who gave it. Its Write is called by one goroutine at a time.
type logFile struct {
	fd int
	// told tells how many lines were lost, by a Write of its own.
	told func(lines int)

	lost int
	torn bool // the last line that was begun has no end
}

// newLogFile returns what writes to a descriptor, which stays the caller's. form makes the
// handler of what it tells itself.
func newLogFile(fd int, form func(io.Writer) slog.Handler) *logFile {
	l := &logFile{fd: fd}
	own := slog.New(form(writerFunc(l.put)))
	l.told = func(lines int) { own.Warn("nobody read the log: lines are lost", "lines", lines) }
	return l
}

// writerFunc is an [io.Writer].
type writerFunc func(b []byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// Write implements [io.Writer]. It takes all that it is given.
func (l *logFile) Write(b []byte) (int, error) {
	if l.lost > 0 && l.writable(0) {
		n := l.lost
		l.lost = 0
		l.told(n)
	}
	return l.put(b)
}

func (l *logFile) put(b []byte) (int, error) {
	if l.torn {
		b = append([]byte{'\n'}, b...)
	}
	patience := logPatience
	if l.lost > 0 {
		patience = 0
	}
	left := b
	for len(left) > 0 {
		if !l.writable(patience) {
			l.lost++
			break
		}
		n, err := unix.Write(l.fd, left[:min(len(left), logPiece)])
		if errors.Is(err, unix.EAGAIN) { // not blocking after all
			l.lost++
			break
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			break // nobody will ever read it
		}
		left = left[max(n, 0):]
	}
	if done := len(b) - len(left); done > 0 {
		l.torn = b[done-1] != '\n'
	}
	return len(b), nil
}

// writable waits until something can be written, or it is known that nothing ever can.
func (l *logFile) writable(patience time.Duration) bool {
	for end := time.Now().Add(patience); ; {
		p := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLOUT}}
		n, err := unix.Poll(p, int(max(time.Until(end), 0)/time.Millisecond))
		if !errors.Is(err, unix.EINTR) {
			return n > 0 || err != nil
		}
	}
}
