package traps

import (
	"bytes"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"
)

// naive is a proxy as it should not be, which shows that the traps close.
const naive system = "naive"

// caught are the traps that naive falls into.
var caught = []int{3, 7, 11, 20, 21, 22}

// TestTrapsClose lays traps for a proxy that must fall into them.
func TestTrapsClose(t *testing.T) {
	for _, tr := range traps() {
		if !slices.Contains(caught, tr.number) {
			continue
		}
		t.Run(tr.title, func(t *testing.T) {
			if r := tr.fall(t, naive); r.verdict != fail {
				t.Errorf("a proxy that should not pass: %s", r.verdict)
			}
		})
	}
}

// startNaive listens where HAProxy would.
func (s *site) startNaive() {
	s.t.Helper()
	var all sync.WaitGroup
	s.t.Cleanup(all.Wait)
	for _, endpoint := range s.endpoints {
		var ln net.Listener
		s.App.Do(s.t, func() (err error) {
			ln, err = net.Listen("tcp", s.to(endpoint).String())
			return err
		})
		s.t.Cleanup(func() { ln.Close() })
		all.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				all.Go(func() { s.carryBadly(c, endpoint.String()) })
			}
		})
	}
}

// carryBadly waits for what the application says first, though not for long,
// adds a header to what looks like HTTP, keeps what it reads until it can be
// sent, and resets both directions when one ends.
func (s *site) carryBadly(c net.Conn, endpoint string) {
	defer c.Close()
	first := make([]byte, 64<<10)
	c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	n, err := c.Read(first)
	if err != nil {
		return
	}
	c.SetReadDeadline(time.Time{})
	first = bytes.Replace(first[:n], []byte("\r\n\r\n"), []byte("\r\nTraceparent: 00\r\n\r\n"), 1)
	var up net.Conn
	if s.App.Run(func() (err error) { up, err = net.Dial("tcp", endpoint); return err }) != nil {
		return
	}
	defer up.Close()
	both := sync.OnceFunc(func() { abort(c); abort(up) })
	s.t.Cleanup(both)
	var out bytes.Buffer
	out.Write(first)
	var mu sync.Mutex
	more := make(chan bool, 1)
	more <- true
	go func() {
		defer close(more)
		for b := make([]byte, 64<<10); ; {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			mu.Lock()
			out.Write(b[:n])
			mu.Unlock()
			select {
			case more <- true:
			default:
			}
		}
	}()
	go func() {
		io.Copy(c, up)
		both()
	}()
	for range more {
		mu.Lock()
		b := bytes.Clone(out.Bytes())
		out.Reset()
		mu.Unlock()
		if _, err := up.Write(b); err != nil {
			break
		}
	}
	both()
	for range more {
	}
}
