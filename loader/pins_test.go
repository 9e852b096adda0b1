package loader

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
)

// TestOpenBeside takes an instance over and over while others look at it and sweep:
// these hold its pins for moments, which is not to be taken for a process that runs
// it. One that does is found in spite of them.
func TestOpenBeside(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	var others sync.WaitGroup
	var stop atomic.Bool
	defer func() {
		stop.Store(true)
		others.Wait()
		if !t.Failed() {
			p.unload(t, d)
		}
	}()
	look := func() error {
		_, err := List(p.bpffs, p.root)
		return err
	}
	sweep := func() error {
		_, err := Sweep(p.bpffs, p.root)
		return err
	}
	for _, do := range []func() error{look, sweep, look} {
		others.Go(func() {
			for !stop.Load() {
				if err := do(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for n := range 10 {
		err := p.do(t, "one", func(o Options) error {
			if _, err := Open(o); !errors.Is(err, ErrInUse) {
				t.Errorf("open what is open: %v, want %v", err, ErrInUse)
			}
			if err := d.Close(); err != nil {
				return err
			}
			again, err := Open(o)
			if err == nil {
				d = again
			}
			return err
		})
		if err != nil {
			_ = Remove(p.bpffs, p.root, "one")
			t.Fatalf("time %d: %v", n, err)
		}
	}
}
