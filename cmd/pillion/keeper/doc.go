// Package keeper keeps a worker's descriptors while the worker is killed and started
// again: `survive: crash`.
//
// The keeper is this same program, entered before the Go runtime: a few dozen lines
// of assembly that clone a worker, wait for it, and clone the next one when it was
// killed. Keeper and workers have one table of descriptors in common (CLONE_FILES),
// so whatever a worker opens is the keeper's in that moment, and nothing is closed
// when the worker dies. To send descriptors to a keeper by SCM_RIGHTS was rejected:
// it costs 45 us per connection, and leaves a window. Memory is not in common: a
// worker is a Go process like any other, and what it is to leave to the next one
// it writes to the memfd that the keeper made.
//
// A program that was built without the keeper's entry point (see the Makefile) works
// but for this.
package keeper
