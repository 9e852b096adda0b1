package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/pillion-project/pillion/cmd/pillion/handover"
	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/l4"
	"golang.org/x/sys/unix"
)

// A worker that is killed while it takes an instance over leaves to the next one what it
// was given. Whose that is only the process that gives it knows: until it has said so the
// next worker touches nothing, and asks. giving.go is the other side of this.

// noteTaking has the next worker know how far it is.
func (s *survival) noteTaking(conn *handover.Conn, how l4.Taking) {
	switch {
	case s == nil:
	case conn == nil:
		s.registry.SetTaking(how, -1)
	default:
		_ = conn.FD(func(fd int) { s.registry.SetTaking(how, fd) })
	}
}

// keep writes down what is given, before the other process hears that it is here.
func (s *survival) keep(g *l4.Given) {
	if s != nil {
		s.registry.Keep(g)
	}
}

// ours tells whether what the worker before left was its own. It forgets what it was
// given where nobody can have been told that it was here.
func (s *survival) ours() bool {
	how, _ := s.registry.Taking()
	switch {
	case s.registry.Charged():
		s.registry.SetTaking(l4.TakingNothing, -1)
	case how == l4.TakingBegun:
		s.registry.Forsake()
		s.registry.SetTaking(l4.TakingNothing, -1)
	default:
	}
	return how == l4.TakingNothing || s.registry.Charged()
}

// took ends the conversation of a worker that was killed when it had everything. From
// then on the instance is this process's, or nothing of it is.
func (s *survival) took(p *plan) {
	if !s.revived() || s.registry.Charged() {
		return
	}
	how, fd := s.registry.Taking()
	if how == l4.TakingNothing {
		return
	}
	conn, err := handover.Open(fd)
	if err == nil {
		s.noteTaking(conn, how) // it has another number
		err = s.isOurs(conn, how, p)
		conn.Close()
	}
	if err != nil {
		before := s.registry.Names()
		s.registry.Forsake()
		for fd := range s.registry.Names() {
			delete(before, fd)
		}
		for fd := range before {
			unix.Close(fd)
		}
		p.log.Warn("nothing was taken over: the worker that was to was killed", "instance", p.name, "why", err)
	} else {
		s.registry.SetCharged()
		p.log.Info("taken over, by a worker that was killed", "instance", p.name)
	}
	s.registry.SetTaking(l4.TakingNothing, -1)
}

// isOurs hears what the other process says. An error says why it goes on.
func (s *survival) isOurs(conn *handover.Conn, how l4.Taking, p *plan) error {
	conn.Within(commitLimit)
	if how == l4.TakingHas {
		// It may have been said already, and is then left unread.
		if err := conn.Send(handover.KindHave, nil, nil); err != nil && !hungUp(err) {
			return err
		}
	}
	f, err := conn.Receive()
	switch {
	case err == nil:
		defer f.Close()
		// The farewell comes after the commit, which was heard then.
		if f.Kind == handover.KindCommit || f.Kind == handover.KindFarewell {
			return nil
		}
		return fmt.Errorf("%w: it was said before that worker was killed, or is now", handover.ErrRefused)
	case errors.Is(err, io.EOF):
		// It has ended, or said all to the worker before. While it has the instance it
		// has the lock, of which this process may have a copy.
		s.clean()
		return loader.Await(p.global.bpffs, p.name, deathLimit)
	default:
		return unlessOurs(conn, err)
	}
}
