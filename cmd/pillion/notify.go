package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// notifyLimit is how long systemd's queue may be full.
const notifyLimit = 5 * time.Second

// notify tells systemd of a change of state, if it asked for that: one datagram
// to the socket that it named (sd_notify(3)).
func notify(state string) error { return notifyWith(state) }

// notifyWith is notify with descriptors, which stay the caller's.
func notifyWith(state string, fds ...int) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("tell systemd %s: %w", state, err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(notifyLimit))
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	raw, err := conn.SyscallConn()
	if err == nil {
		// Not WriteMsgUnix, which wants a socket that is not connected.
		write := raw.Write(func(fd uintptr) bool {
			err = unix.Sendmsg(int(fd), []byte(state), rights, nil, unix.MSG_NOSIGNAL)
			return !errors.Is(err, unix.EAGAIN)
		})
		err = errors.Join(write, err)
	}
	if err != nil {
		return fmt.Errorf("tell systemd %s: %w", state, err)
	}
	return nil
}

// notifyBarrier waits until systemd has taken note of what it was told before
// (sd_notify_barrier(3)).
func notifyBarrier(limit time.Duration) error {
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("wait for systemd: %w", err)
	}
	defer r.Close()
	err = notifyWith("BARRIER=1", int(w.Fd()))
	w.Close()
	if err != nil {
		return err
	}
	// It closes its copy, and then there is none.
	r.SetReadDeadline(time.Now().Add(limit))
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("wait for systemd: %w", err)
	}
	return nil
}

// watchdogEvery is how often systemd is to be told that this process works: twice in
// the time after which it takes it for dead (sd_watchdog_enabled(3)). 0: it does not
// want to know. main is the process that systemd started.
func watchdogEvery(main int) (time.Duration, error) {
	text := os.Getenv("WATCHDOG_USEC")
	if text == "" {
		return 0, nil
	}
	if pid := os.Getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(main) {
		return 0, nil // it is about another process
	}
	usec, err := strconv.ParseInt(text, 10, 64)
	if err != nil || usec <= 1 {
		return 0, fmt.Errorf("WATCHDOG_USEC=%s is no number of microseconds", text)
	}
	return time.Duration(usec) * time.Microsecond / 2, nil
}

// watchdog tells systemd every so often that the process works, until ctx is done. It
// says nothing while stuck does: then only a new process helps. unheard is called when
// systemd cannot be told, and could before.
func watchdog(ctx context.Context, every time.Duration, stuck func() error, unheard func(error)) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	heard := true
	for {
		if stuck() == nil {
			err := notify("WATCHDOG=1")
			if err != nil && heard {
				unheard(err)
			}
			heard = err == nil
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// beWatched lets systemd's watchdog watch the instance, also while it drains.
func (i *instance) beWatched(ctx context.Context) {
	every, err := watchdogEvery(i.global.survival.mainPID())
	untold := func(err error) { i.log.Error("systemd's watchdog is not told", "error", err) }
	if err != nil {
		untold(err)
	}
	if err != nil || every == 0 {
		return
	}
	begun := false // it stays so when it drains, and is not ready any more
	watchdog(ctx, every, func() error {
		if begun = begun || i.ready.Load(); !begun {
			return nil // it has no heartbeat yet, if it takes over or goes on
		}
		return i.stuck()
	}, untold)
}
