package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"time"
)

// readiness hears a process say that it is ready, as systemd does. To ask it for
// its status would do too, and cost it the memory of answering.
type readiness struct{ conn *net.UnixConn }

// newReadiness makes the processes that are started from now on speak to path.
func newReadiness(path string) (*readiness, error) {
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	return &readiness{conn}, os.Setenv("NOTIFY_SOCKET", path)
}

func (r *readiness) close() {
	_ = os.Unsetenv("NOTIFY_SOCKET")
	r.conn.Close()
}

// wait returns when p is ready. That p has ended is an error.
func (r *readiness) wait(ctx context.Context, p *process) error {
	buf := make([]byte, 4096)
	for end := time.Now().Add(startLimit); time.Now().Before(end); {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s has ended: %w", p.name, p.err)
		default:
		}
		if err := r.conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			return err
		}
		// A deadline that passes says nothing.
		if n, err := r.conn.Read(buf); err == nil && strings.Contains(string(buf[:n]), "READY=1") {
			return nil
		}
	}
	return fmt.Errorf("%s is not ready after %v", p.name, startLimit)
}
