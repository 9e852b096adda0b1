package failure

import (
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// noticeLimit is what the test holds the time to notice and to return to. The
// bound is half a second; a machine that runs everything else at the same time
// is let off ten times that.
const noticeLimit = 10 * 500 * time.Millisecond

// cell is one of the table's.
type cell struct {
	fault, setting, kind string
	open                 bool // connections that were there before
}

// figures are times of one fault.
type figures struct {
	notice, back time.Duration
	felt         int // connections that suffered on the way
}

// results are what was observed.
type results struct {
	mu      sync.Mutex
	cells   map[cell]tally
	figures map[string]figures // by fault and setting
}

func (r *results) put(c cell, seen tally) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cells[c] = seen
}

// TestMatrix breaks everything, in both settings of on_failure, and looks at
// every path.
func TestMatrix(t *testing.T) {
	r := &results{cells: map[cell]tally{}, figures: map[string]figures{}}
	all := table()
	t.Run("faults", func(t *testing.T) {
		for _, f := range all {
			for _, setting := range []string{onOpen, onClosed} {
				t.Run(f.name+"/"+setting, func(t *testing.T) {
					t.Parallel()
					f.test(t, setting, r)
				})
			}
		}
	})
	// All of it, and not a part that was asked for.
	if !t.Failed() && len(r.figures) == 2*len(all) {
		r.report(t, all)
	}
}

func (f *fault) test(t *testing.T, setting string, r *results) {
	s := newStage(t, f, setting)
	for _, kind := range kinds {
		s.tries(t, s.app, kind, usual(kind))
		for _, o := range s.do(t, order{Do: "open", Key: kind, To: s.to[kind], Count: openPer, Patience: patience}) {
			if o.Word != usual(kind) {
				t.Fatalf("%s: %s", kind, &o)
			}
		}
	}
	began := now()
	s.streams(t)
	w := window{from: now()}
	f.breaks(t, s)
	w.broken = now()
	if f.falls {
		s.becomes(t, w.broken, func(kind string) word { return byFailure(kind, setting) })
	}
	during := now()
	if !f.brief {
		s.look(t, r)
	}
	if f.check != nil {
		f.check(t, s)
	}
	w.mending = now()
	if f.mends != nil {
		f.mends(t, s)
	}
	w.mended = now()
	s.becomes(t, w.mended, usual)
	s.afterwards(t, r)
	if f.after != nil {
		f.after(t, s)
	}
	s.do(t, order{Do: "quiet"})
	r.mu.Lock()
	r.figures[f.name+"/"+setting] = s.judge(t, began, during, w)
	r.mu.Unlock()
	for _, kind := range kinds {
		s.do(t, order{Do: "close", Key: kind})
	}
	if f.lingers {
		testutil.Eventually(t, rig.Limit, func() bool { return s.status(t).Live == 0 }, "the handler has nothing open")
	}
}

// window is the time of a fault: from before it is made until it is, and from
// before it is mended until it is.
type window struct{ from, broken, mending, mended int64 }

// becomes waits until the stream to every kind comes out as wanted.
func (s *stage) becomes(t *testing.T, start int64, want func(kind string) word) {
	t.Helper()
	const enough = 10
	for _, kind := range kinds {
		var last []outcome
		testutil.Eventually(t, rig.Limit, func() bool {
			some := s.since(kind, start)
			if len(some) < enough {
				return false
			}
			last = some[len(some)-enough:]
			return !slices.ContainsFunc(last, func(o outcome) bool { return o.Word != want(kind) })
		}, kind, " becomes ", want(kind), &printed{&last}, "\n", &logged{s})
	}
}

// look observes while the fault lasts.
func (s *stage) look(t *testing.T, r *results) {
	t.Helper()
	for _, kind := range kinds {
		r.put(cell{s.fault.name, s.setting, kind, false}, s.tries(t, s.app, kind, s.fault.want(kind, s.setting)))
		want, limit := s.fault.wantOpen(kind), patience
		if want == waits {
			limit = quickly
		}
		for _, o := range s.asks(t, kind, limit) {
			if o.Word != want && (want != waits || o.Word != silent) {
				t.Errorf("open connection, %s: %s, want %s", kind, &o, want)
			}
		}
	}
}

// afterwards observes when it is over: all is as it was, but for what was reset.
func (s *stage) afterwards(t *testing.T, r *results) {
	t.Helper()
	for _, kind := range kinds {
		seen := s.tries(t, s.app, kind, usual(kind))
		if s.fault.brief {
			r.put(cell{s.fault.name, s.setting, kind, false}, seen)
		}
		want, open := s.fault.wantOpen(kind), tally{}
		for _, o := range s.asks(t, kind, patience) {
			if want == waits && o.Word == unaffected {
				o.Word = waits // it is now
			}
			if open[o.Word]++; o.Word != want {
				t.Errorf("open connection afterwards, %s: %s, want %s", kind, &o, want)
			}
		}
		r.put(cell{s.fault.name, s.setting, kind, true}, open)
	}
}

// mayBe tells what else becomes of new connections on account of the fault: what
// it says of them, also before and after we know, and what a second instance does
// when it ends.
func (s *stage) mayBe(kind string, is word) bool {
	_, ok := s.fault.news[kind]
	return ok && (is == s.fault.want(kind, s.setting) || is == byFailure(toUnnamed, s.setting))
}

// judge looks at every connection of the stream: when they began to go as they
// were to, and that none met what it must not.
func (s *stage) judge(t *testing.T, began, during int64, w window) figures {
	t.Helper()
	var f figures
	for _, kind := range kinds {
		lastOdd, lastAway := w.broken, w.mended
		for _, o := range s.since(kind, began) {
			fallen := byFailure(kind, s.setting)
			switch {
			case o.Start >= w.broken && o.Start < w.mending:
				if s.fault.falls && o.Word != fallen {
					lastOdd = max(lastOdd, o.Start+1)
				}
			case o.Start >= w.mended && o.Word != usual(kind):
				lastAway = max(lastAway, o.Start+1)
			}
			if o.Word == usual(kind) || o.Word == fallen || s.mayBe(kind, o.Word) && o.Done > w.from {
				continue
			}
			f.felt++
			switch touched := o.Start < during && o.Done > w.from || o.Start < w.mended+int64(noticeLimit) && o.Done > w.mending; {
			case usual(kind) != carried && !s.fault.escapes, o.Word == lost, !touched:
				t.Errorf("%s: %v after the fault: %s", kind, time.Duration(o.Start-w.broken), &o)
			}
		}
		f.notice, f.back = max(f.notice, time.Duration(lastOdd-w.broken)), max(f.back, time.Duration(lastAway-w.mended))
	}
	if s.fault.atOnce && f.notice > 0 {
		t.Errorf("connections that began %v after the listener was gone were sent there", f.notice)
	}
	if f.notice > noticeLimit || f.back > noticeLimit {
		t.Errorf("noticed after %v, back after %v: want at most %v", f.notice, f.back, noticeLimit)
	}
	t.Logf("noticed after %v, back after %v, %d connections felt it", f.notice.Round(time.Millisecond), f.back.Round(time.Millisecond), f.felt)
	return f
}
