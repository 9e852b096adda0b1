package check

import (
	"context"
	"log/slog"
)

// Options is what a checker needs.
type Options struct {
	// Report is told of every change, of one at a time and of a target's in
	// their order. While it runs no other check can end, and Set waits: it is
	// quick, does not call Set, and takes no lock that a caller of Set holds.
	Report func(Change)
	// Exempt marks a socket as the handler's own before it connects, since this
	// process may itself be in the scope that is captured; nil does nothing.
	Exempt func(fd int) error
	// Log may be nil.
	Log *slog.Logger
	// Parallel is how many TCP and HTTP checks are under way at once, at most;
	// 0 is 128. Commands are at most an eighth of it. A check is one descriptor,
	// a command four.
	Parallel int
	// Random gives uniform bits; nil means the process's own. It is called by
	// one goroutine at a time.
	Random func() uint64
}

// Checker checks a set of targets. All methods are safe for concurrent use.
type Checker struct {
	o Options
}

// New returns a checker without targets. It starts nothing; Run does.
func New(o Options) *Checker { return &Checker{o: o} }

// Set makes targets the whole set, at any time. What stays, by cluster and
// address, keeps its state, and its timing unless its Spec has changed. What is
// new is checked first at a random moment of its interval. When Set returns,
// what is not in the set is not reported any more, and a check of it that is
// under way is being cancelled.
//
// All problems are in one error, and then nothing has changed: a Spec that is
// not valid, an address that is none, two targets of one cluster and address.
func (c *Checker) Set(targets []Target) error { return nil }

// Run checks until ctx is done, and then returns nil. Every goroutine and every
// process that it started has ended then, and nothing is reported any more. It
// is called once.
func (c *Checker) Run(ctx context.Context) error { <-ctx.Done(); return nil }

// States returns all targets, sorted by cluster and address. They are the
// caller's.
func (c *Checker) States() []Status { return nil }
