package rig

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
)

// Server is one in the world that can go away and come back.
type Server struct {
	// At is its address.
	At    netip.AddrPort
	rig   *Rig
	serve func(net.Conn)
	ln    net.Listener
	conns sync.Map
	ended atomic.Bool // no connection may stay
	all   sync.WaitGroup
}

// Server has serve answer every connection to addr in the world, until it is
// stopped, at the latest at the end of the test. The address is as in [Rig.Listen].
func (r *Rig) Server(t testing.TB, addr netip.AddrPort, serve func(net.Conn)) *Server {
	t.Helper()
	s := &Server{At: addr, rig: r, serve: serve}
	s.Start(t)
	t.Cleanup(s.Stop)
	return s
}

// Start opens the port, again after [Server.Refuse] or [Server.Stop].
func (s *Server) Start(t testing.TB) {
	t.Helper()
	ln := s.rig.Listen(t, s.At)
	s.ended.Store(false)
	s.At, s.ln = ln.Addr().(*net.TCPAddr).AddrPort(), ln
	s.all.Go(func() { s.accept(ln) })
}

func (s *Server) accept(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		s.conns.Store(c, nil)
		s.all.Go(func() {
			defer s.conns.Delete(c)
			defer c.Close()
			if !s.ended.Load() { // else nobody has closed it
				s.serve(c)
			}
		})
	}
}

// Refuse closes the port; open connections go on.
func (s *Server) Refuse() { s.ln.Close() }

// Stop closes the port, and ends all connections.
func (s *Server) Stop() {
	s.ended.Store(true)
	s.ln.Close()
	s.conns.Range(func(c, _ any) bool { c.(net.Conn).Close(); return true })
	s.all.Wait()
}
