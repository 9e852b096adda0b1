package main

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"time"
)

func TestWatchdogEvery(t *testing.T) {
	own, other := strconv.Itoa(os.Getpid()), strconv.Itoa(os.Getpid()+1)
	tests := map[string]struct {
		usec, pid string
		want      time.Duration
		fails     bool
	}{
		"none":            {},
		"of this process": {usec: "10000000", pid: own, want: 5 * time.Second},
		"of any":          {usec: "10000000", want: 5 * time.Second},
		"of another":      {usec: "10000000", pid: other},
		"no number":       {usec: "10s", pid: own, fails: true},
		"nothing":         {usec: "0", pid: own, fails: true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Setenv("WATCHDOG_USEC", tt.usec)
			t.Setenv("WATCHDOG_PID", tt.pid)
			got, err := watchdogEvery(os.Getpid())
			if got != tt.want || (err != nil) != tt.fails {
				t.Errorf("%v, %v, want %v", got, err, tt.want)
			}
		})
	}
}

// TestWatchdog: systemd hears of a process that works, and nothing of one that is
// stuck.
func TestWatchdog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	t.Setenv("NOTIFY_SOCKET", path)
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close()
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	var stuck atomic.Bool
	asked := make(chan struct{}, 1)
	go func() {
		defer close(done)
		watchdog(ctx, time.Millisecond, func() error {
			select {
			case asked <- struct{}{}:
			default:
			}
			if stuck.Load() {
				return errors.New("stuck")
			}
			return nil
		}, func(err error) { t.Errorf("systemd was not told: %v", err) })
	}()
	hear := func() string {
		b := make([]byte, 64)
		n, err := systemd.Read(b)
		if err != nil {
			return err.Error()
		}
		return string(b[:n])
	}
	for range 3 {
		if got := hear(); got != "WATCHDOG=1" {
			t.Fatalf("systemd hears %q", got)
		}
	}
	stuck.Store(true)
	// One question may have been answered before; then two that were not.
	for range 3 {
		<-asked
	}
	for b := make([]byte, 64); ; {
		// What came before it was stuck is still there.
		systemd.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		if _, err := systemd.Read(b); err != nil {
			break
		}
	}
	for range 3 {
		<-asked
	}
	systemd.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
	if n, err := systemd.Read(make([]byte, 64)); err == nil {
		t.Errorf("systemd hears %d bytes of a process that is stuck", n)
	}
	stop()
	<-done
}

// TestWatchdogUnheard: systemd, which cannot be told for a while, hears again.
func TestWatchdogUnheard(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	t.Setenv("NOTIFY_SOCKET", path)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	said := make(chan error, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		watchdog(ctx, time.Millisecond, func() error { return nil }, func(err error) { said <- err })
	}()
	<-said
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close()
	systemd.SetReadDeadline(time.Now().Add(20 * time.Second))
	b := make([]byte, 64)
	if n, err := systemd.Read(b); err != nil || string(b[:n]) != "WATCHDOG=1" {
		t.Errorf("systemd hears %q, %v", b[:n], err)
	}
	stop()
	<-done
	if n := len(said); n > 0 {
		t.Errorf("it was said %d times more that systemd is not told", n)
	}
}
