package main

import (
	"context"
	"os"
	"os/signal"
	"slices"

	"golang.org/x/sys/unix"
)

// A command that does not ask for signals is ended by them, whatever it waits for. Those
// that have something to undo ask.

// heeding returns a context that ends when this process is told to end. The second time
// it is ended.
func heeding(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(ctx, minded(unix.SIGINT, unix.SIGTERM, unix.SIGHUP)...)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// minded are those of some signals that whoever started this process did not have
// ignored, as nohup does. What is asked for once is not ignored any more.
func minded(all ...os.Signal) []os.Signal {
	return slices.DeleteFunc(all, signal.Ignored)
}

// outliveLog has this process go on when whoever reads its log is gone: the next line
// would end it, and with it connections. The signal is asked for and not ignored, since
// what is ignored is so for the processes that this one starts, too.
func outliveLog() (undo func()) {
	nobody := make(chan os.Signal, 1)
	signal.Notify(nobody, unix.SIGPIPE)
	return func() { signal.Stop(nobody) }
}
