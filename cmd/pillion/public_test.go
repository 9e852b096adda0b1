package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"
)

// serving runs serveHTTP until the returned function is called, which waits for it.
func serving(t *testing.T, h http.HandlerFunc) (addr string, end func()) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serveHTTP(ctx, ln, h) }()
	return ln.Addr().String(), func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestBounded has many connect and say nothing. Who asks is answered all the same, and few
// of the others are left.
func TestBounded(t *testing.T) {
	addr, end := serving(t, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok") })
	defer end()
	const many = 4 * publicMost
	var all []net.Conn
	for range many {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		all = append(all, c)
	}
	resp, err := http.Get("http://" + addr)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	gone := 0
	for _, c := range all {
		c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		var timeout net.Error
		if _, err := c.Read(make([]byte, 1)); !errors.As(err, &timeout) || !timeout.Timeout() {
			gone++
		}
	}
	if gone < many-publicMost {
		t.Errorf("of %d connections %d were ended", many, gone)
	}
}

// TestServeEnds has a handler at work when the server ends: what it reads is there until
// it is done.
func TestServeEnds(t *testing.T) {
	begun, release := make(chan struct{}), make(chan struct{})
	var over atomic.Bool
	addr, end := serving(t, func(http.ResponseWriter, *http.Request) {
		close(begun)
		<-release
		over.Store(true)
	})
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		if resp, err := http.Get("http://" + addr); err == nil {
			resp.Body.Close()
		}
	}()
	<-begun
	time.AfterFunc(50*time.Millisecond, func() { close(release) })
	end()
	<-asked
	if !over.Load() {
		t.Error("the server has ended, and its handler is at work")
	}
}
