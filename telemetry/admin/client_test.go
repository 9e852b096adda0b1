package admin

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"testing"
)

// breaking answers every question but each cuts-th in the middle, and counts them.
func breaking(t *testing.T, cuts int64) (path string, asked *atomic.Int64) {
	t.Helper()
	path, asked = filepath.Join(t.TempDir(), "admin.sock"), &atomic.Int64{}
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			// Sometimes before the answer, sometimes in its middle, and sometimes with
			// a question that nobody has read.
			switch n := asked.Add(1); {
			case n%cuts == 0:
				http.ReadRequest(bufio.NewReader(c))
				fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{\"generation\":7}")
			case n%3 == 0:
			case n%3 == 1:
				http.ReadRequest(bufio.NewReader(c))
			default:
				http.ReadRequest(bufio.NewReader(c))
				fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{\"gen")
			}
			c.Close()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
	return path, asked
}

// TestBrokenOff wants a question asked again whose answer breaks off, and not for ever.
func TestBrokenOff(t *testing.T) {
	path, asked := breaking(t, tries)
	for n := range int64(3) {
		r, err := Dial(path).Reload(context.Background())
		if err != nil || r.Generation != 7 {
			t.Errorf("%+v, %v", r, err)
		}
		if got, want := asked.Load(), (n+1)*tries; got != want {
			t.Errorf("asked %d times, want %d", got, want)
		}
	}
	path, asked = breaking(t, 1000)
	err := Dial(path).Live(context.Background())
	if _, broke := errors.AsType[brokenOff](err); !broke || asked.Load() != tries {
		t.Errorf("%v, after %d questions", err, asked.Load())
	}
}
