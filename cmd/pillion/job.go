package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

const (
	// outliveEvery is how often the scope is looked at.
	outliveEvery = 250 * time.Millisecond
	// outliveQuiet is how long nothing has to run until that is the end: one
	// container may end before the next one is made.
	outliveQuiet = time.Second
)

// outlived waits until applications have run in the scope and none does any more.
// It tells whether that came before ctx was done.
func (i *instance) outlived(ctx context.Context) bool {
	active := i.applications()
	tick := time.NewTicker(outliveEvery)
	defer tick.Stop()
	ran := i.connected()
	var quiet time.Time // since when; zero: something runs
	for {
		switch now, err := active(); {
		case err != nil && !errors.Is(err, os.ErrNotExist):
			i.log.Error("cannot see whether the applications have ended", "error", err)
		case now:
			ran, quiet = true, time.Time{}
		case quiet.IsZero():
			quiet = time.Now()
		case ran && time.Since(quiet) >= outliveQuiet:
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
}

// endWithScope calls end when the applications have ended.
func (i *instance) endWithScope(ctx context.Context, end func()) {
	if i.outlived(ctx) {
		i.log.Info("the applications have ended")
		end()
	}
}

// listen has the births of the pod's containers heard from now on, which is before
// programs are loaded: applications may run, and end, while that takes seconds. The
// caller calls what it returns when nobody wants to know any more.
func (p *plan) listen() (close func()) {
	if p.pod == nil {
		return func() {}
	}
	births, err := p.pod.Births()
	if err != nil {
		p.log.Error("cannot see applications that end at once", "error", err)
		return func() {}
	}
	p.births = births
	return func() { births.Close() }
}

// applications returns what tells whether an application runs in the scope, or did
// since it was asked last.
func (i *instance) applications() (active func() (bool, error)) {
	if i.pod == nil {
		return func() (bool, error) { return i.scope.Populated(), nil }
	}
	sandbox := i.pod.Sandbox
	if sandbox == 0 {
		// What only an init container could know.
		sandbox = i.datapath.Sandbox()
	}
	if sandbox == 0 {
		i.log.Warn("it is not known which container is the pod's sandbox, if it has one: run pillion init before the applications")
	}
	if i.births == nil {
		return func() (bool, error) { return i.pod.Active(sandbox) }
	}
	return func() (bool, error) {
		born, err := i.births.Any()
		runs, err2 := i.pod.Active(sandbox)
		return born || runs, errors.Join(err, err2)
	}
}

// connected tells whether an application has connected since the programs are
// attached, which pillion init did before any could run: it may have ended before
// births were listened for.
func (i *instance) connected() bool {
	s, err := i.datapath.Stats()
	if err != nil {
		i.log.Error("cannot see whether applications have connected", "error", err)
		return false
	}
	for r, n := range s.Reasons {
		if n > 0 && flow.Reason(r) != flow.ReasonSelf && flow.Reason(r) != flow.ReasonNetns {
			return true
		}
	}
	return false
}

// canOutlive fails where this process itself keeps the scope from being empty.
func (i *instance) canOutlive() error {
	if i.pod == nil && i.inScope() {
		return usage(fmt.Errorf("--exit-with-scope: this process is itself in %s", i.scope.Path))
	}
	return nil
}
