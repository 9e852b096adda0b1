package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/handover"
	"github.com/pillion-project/pillion/redirect/pace"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// socketEvery is how often the files of the admin socket and of that for takers are
// looked for.
const socketEvery = time.Second

// serveAdmin answers on the admin socket until ctx is done, and on a new one when
// somebody has removed it.
func (i *instance) serveAdmin(ctx context.Context) error {
	for {
		if err := i.serveSocket(ctx); err != nil || ctx.Err() != nil {
			return err
		}
		ln, err := i.renewSocket(ctx, "admin socket", func() (net.Listener, error) { return admin.Listen(i.socketPath()) })
		if err != nil {
			return nil // it ends
		}
		i.socketMu.Lock()
		i.socket = ln
		i.socketMu.Unlock()
		i.global.survival.keepSocket("admin", ln)
		i.log.Warn("made the admin socket again, which somebody had removed", "path", i.socketPath())
	}
}

// adminSocket is the one that is served now.
func (i *instance) adminSocket() net.Listener {
	i.socketMu.Lock()
	defer i.socketMu.Unlock()
	return i.socket
}

// serveSocket answers until ctx is done or the socket is gone.
func (i *instance) serveSocket(ctx context.Context) error {
	live, gone := context.WithCancel(ctx)
	defer gone()
	done := make(chan struct{})
	go i.watchSocket(live, gone, done)
	err := admin.Serve(live, i.adminSocket(), i.api())
	gone()
	<-done
	return err
}

// watchSocket calls gone when the socket is, until ctx is done.
func (i *instance) watchSocket(ctx context.Context, gone func(), done chan<- struct{}) {
	defer close(done)
	tick := time.NewTimer(pace.Next(socketEvery))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			tick.Reset(pace.Next(socketEvery))
		}
		if !handover.Bound(i.adminSocket(), i.socketPath()) {
			i.global.survival.dropSocket("admin")
			handover.Disown(i.adminSocket()) // the path may be another's by then
			gone()
			return
		}
	}
}

// takersSocket is the one that takers come to now; nil: there is none.
func (i *instance) takersSocket() net.Listener {
	i.socketMu.Lock()
	defer i.socketMu.Unlock()
	return i.takers
}

// renewTakers has takers find this process again, if they do not. It fails when ctx is
// done.
func (i *instance) renewTakers(ctx context.Context) error {
	path := i.takeoverPath()
	if handover.Bound(i.takersSocket(), path) {
		return nil
	}
	ln, err := i.renewSocket(ctx, "socket for takers", func() (net.Listener, error) { return handover.Listen(path) })
	if err != nil {
		return err
	}
	i.socketMu.Lock()
	before := i.takers
	i.takers = ln
	i.socketMu.Unlock()
	i.global.survival.dropSocket("takers")
	handover.Disown(before) // the file is the new one's
	before.Close()
	i.global.survival.keepSocket("takers", ln)
	i.log.Warn("made the socket for takers again, which somebody had removed", "path", path)
	return context.Cause(ctx)
}

// acceptWithin takes the next taker. It fails with [os.ErrDeadlineExceeded] when none
// comes within some d.
func acceptWithin(ln net.Listener, d time.Duration) (*handover.Conn, error) {
	if u, ok := ln.(*net.UnixListener); ok {
		if err := u.SetDeadline(time.Now().Add(pace.Next(d))); err != nil {
			return nil, err
		}
	}
	return handover.Accept(ln)
}

// renewSocket listens again, as soon as that is possible. It fails when ctx is
// done.
func (i *instance) renewSocket(ctx context.Context, what string, listen func() (net.Listener, error)) (net.Listener, error) {
	told := false
	for {
		ln, err := listen()
		if err == nil {
			return ln, nil
		}
		if !told {
			i.log.Error("cannot make a socket again", "socket", what, "error", err)
			told = true
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("make the %s again: %w", what, context.Cause(ctx))
		case <-time.After(socketEvery):
		}
	}
}

// closeFiles closes what listens, and what reads the ring of events.
func (i *instance) closeFiles() error {
	var errs []error
	for _, ln := range []net.Listener{i.adminSocket(), i.takersSocket(), i.public, i.probes} {
		if ln != nil {
			if err := ln.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
				errs = append(errs, err)
			}
		}
	}
	if i.collector != nil {
		errs = append(errs, i.collector.Close())
	}
	return errors.Join(errs...)
}
