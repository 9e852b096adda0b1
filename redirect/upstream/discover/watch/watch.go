package watch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// pace is how long a watcher waits.
type pace struct {
	// quiet is how long nothing has to happen until a writer is taken to be
	// done, if he closed the file or replaced it, and open if he did not: half
	// of a list may be a list too.
	quiet, open time.Duration
	// latest bounds both: a file that is written all the time is read too.
	latest time.Duration
	// poll is the time between two looks at the file where the kernel tells of
	// changes, blind where it does not. Even where it tells, it does not tell of
	// a file system that is mounted over a directory, or of what a server did
	// to a file of its.
	poll, blind time.Duration
}

func usualPace() pace {
	return pace{
		quiet: 50 * time.Millisecond, open: time.Second, latest: 5 * time.Second,
		poll: 30 * time.Second, blind: 2 * time.Second,
	}
}

// File calls changed once when it has begun to watch, and then after every change
// of the file that path leads to: of its content, of a symbolic link or a
// directory on the way, when it appears and when it vanishes. It waits until the
// writer seems to be done, and a burst of changes is one call. There may be calls
// without a change, so changed compares what it reads. Where the kernel cannot
// tell (no inotify instances left, a network file system) the file is looked at
// every few seconds.
//
// It returns nil when ctx is done. changed is called by the goroutine of File,
// which waits for it. It returns an error only if path is empty.
func File(ctx context.Context, path string, changed func()) error {
	return newWatcher(path, usualPace()).run(ctx, changed)
}

// watcher watches one file.
type watcher struct {
	path string
	pace pace
	in   *notifier // nil where the kernel has none for us
	seen trail     // the way to the file as it was last

	// since is when the first change came that was not told yet, last when the
	// last one did; zero if there is none. writing tells whether somebody has
	// written and not closed the file.
	since, last time.Time
	writing     bool
	looked      time.Time // when seen was found
}

func newWatcher(path string, p pace) *watcher { return &watcher{path: path, pace: p} }

func (w *watcher) run(ctx context.Context, changed func()) error {
	if w.path == "" {
		return errors.New("watch a file: no path")
	}
	if !filepath.IsAbs(w.path) {
		dir, err := os.Getwd()
		if err != nil {
			return fmt.Errorf("watch %s: %w", w.path, err)
		}
		// Not Join or Abs: what they clean away may be the parent of a link's
		// target.
		w.path = dir + "/" + w.path
	}
	// Without a notifier only the polls are left, and those suffice.
	w.in, _ = openNotifier()
	defer w.in.close()
	// A read that waits cannot be interrupted otherwise.
	stop := context.AfterFunc(ctx, w.in.close)
	defer stop()

	w.look()
	w.since = time.Time{}
	changed()
	for ctx.Err() == nil {
		events, err := w.wait(ctx)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			// It does not come back by itself; what it missed is found by
			// the next look.
			w.in.close()
			w.in = nil
		default:
			w.take(events)
		}
		if !w.since.IsZero() && !time.Now().Before(w.due()) && ctx.Err() == nil {
			w.since, w.writing = time.Time{}, false
			changed()
		}
	}
	return nil
}

// due is when the pending change is told.
func (w *watcher) due() time.Time {
	quiet := w.pace.quiet
	if w.writing {
		quiet = w.pace.open
	}
	at := w.last.Add(quiet)
	if latest := w.since.Add(w.pace.latest); latest.Before(at) {
		return latest
	}
	return at
}

// wait returns the next events, or none when it is time to look.
func (w *watcher) wait(ctx context.Context) ([]event, error) {
	every := w.pace.poll
	if w.in == nil || !w.seen.watched {
		every = w.pace.blind
	}
	until := w.looked.Add(every)
	if due := w.due(); !w.since.IsZero() && due.Before(until) {
		until = due
	}
	if w.in != nil {
		return w.in.read(until)
	}
	t := time.NewTimer(time.Until(until))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
	return nil, nil
}

// take looks at the file, and notes a change if there was one.
func (w *watcher) take(events []event) {
	touched := false
	for _, e := range events {
		switch {
		case e.everything:
			touched = true
		case w.in.names(e.dir, e.name):
			touched = true
			// The entry of a directory or a link says that it is complete; so
			// does the close of a file.
			w.writing = e.written || w.writing && !e.closed
		default:
		}
	}
	if !touched && len(events) > 0 {
		return // somebody else's files
	}
	before := w.seen.identity
	w.look()
	if touched || w.seen.identity != before {
		w.last = time.Now()
		if w.since.IsZero() {
			w.since = w.last
		}
	}
}

// look walks the way to the file and watches all of it. What changes between the
// walk and the watch is found by walking again.
func (w *watcher) look() {
	const tries = 10
	for range tries {
		w.looked = time.Now()
		t := walk(w.path)
		t.watched = w.in.watch(t.entries)
		same := t.identity == w.seen.identity
		w.seen = t
		if same {
			return
		}
	}
}
