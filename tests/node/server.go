package node

import (
	"bufio"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
)

// Server answers on the node as tests/node/app does in a pod.
type Server struct {
	mu    sync.Mutex
	heard []string
	conns map[net.Conn]bool
}

// Serve starts a server. It gets the address, if the node does not have it. It
// ends with the test.
func (n *Node) Serve(t testing.TB, at netip.AddrPort, name string) *Server {
	t.Helper()
	ln, err := net.Listen("tcp", at.String())
	if err != nil {
		if err := give(netip.PrefixFrom(at.Addr(), 32)); err != nil {
			t.Fatal(err)
		}
		if ln, err = net.Listen("tcp", at.String()); err != nil {
			t.Fatal(err)
		}
	}
	s := &Server{conns: map[net.Conn]bool{}}
	var all sync.WaitGroup
	all.Go(func() { s.accept(ln, name, &all) })
	t.Cleanup(func() {
		ln.Close()
		s.cut()
		all.Wait()
	})
	return s
}

func (s *Server) accept(ln net.Listener, name string, all *sync.WaitGroup) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.conns[c] = true
		s.mu.Unlock()
		all.Go(func() { s.answer(c, name) })
	}
}

func (s *Server) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.Close()
	}
}

func (s *Server) answer(c net.Conn, name string) {
	defer func() {
		c.Close()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
	if _, err := io.WriteString(c, name+"\n"); err != nil {
		return
	}
	for in := bufio.NewReader(c); ; {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		if strings.HasPrefix(line, "bye ") {
			s.mu.Lock()
			s.heard = append(s.heard, strings.TrimSpace(line))
			s.mu.Unlock()
		}
		if _, err := io.WriteString(c, line); err != nil {
			return
		}
	}
}

// Byes are the last words that applications said to the server.
func (s *Server) Byes() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.heard...)
}
