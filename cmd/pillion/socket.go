package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/handover"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// socketEvery is how often the admin socket is looked for.
const socketEvery = time.Second

// serveAdmin answers on the admin socket until ctx is done, and on a new one when
// somebody has removed it.
func (i *instance) serveAdmin(ctx context.Context) error {
	for {
		if err := i.serveSocket(ctx); err != nil || ctx.Err() != nil {
			return err
		}
		ln, err := i.renewSocket(ctx)
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
	tick := time.NewTicker(socketEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if _, err := os.Lstat(i.socketPath()); errors.Is(err, fs.ErrNotExist) {
			i.global.survival.dropSocket("admin")
			handover.Disown(i.adminSocket()) // the path may be another's by then
			gone()
			return
		}
	}
}

// renewSocket listens again, as soon as that is possible. It fails when ctx is
// done.
func (i *instance) renewSocket(ctx context.Context) (net.Listener, error) {
	told := false
	for {
		ln, err := admin.Listen(i.socketPath())
		if err == nil {
			return ln, nil
		}
		if !told {
			i.log.Error("cannot make the admin socket again", "error", err)
			told = true
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("make the admin socket again: %w", context.Cause(ctx))
		case <-time.After(socketEvery):
		}
	}
}

// closeFiles closes what listens, and what reads the ring of events.
func (i *instance) closeFiles() error {
	var errs []error
	for _, ln := range []net.Listener{i.adminSocket(), i.takers, i.public, i.probes} {
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
