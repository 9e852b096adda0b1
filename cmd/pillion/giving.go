package main

import (
	"errors"
	"log/slog"

	"github.com/pillion-project/pillion/cmd/pillion/handover"
	"github.com/pillion-project/pillion/redirect/l4"
)

// A worker that is killed while it gives the instance away leaves the conversation to
// the next worker, with the taker still at the other end: who has the connections is
// what that has said, and nobody may guess.

// errKilled is what a taker is told whose giver was killed.
var errKilled = errors.New("the process that gave it was killed meanwhile, and another one goes on")

// noteGiving has the next worker know how far it is.
func (s *survival) noteGiving(conn *handover.Conn, how l4.Giving) {
	switch {
	case s == nil:
	case how == l4.GivingNothing:
		s.registry.SetGiving(how, -1)
	default:
		_ = conn.FD(func(fd int) { s.registry.SetGiving(how, fd) })
	}
}

// gaveAway ends the conversation of a worker that was killed in it. It tells whether the
// instance is another process's.
func (s *survival) gaveAway(log *slog.Logger) bool {
	if !s.revived() {
		return false
	}
	how, fd := s.registry.Giving()
	if how == l4.GivingNothing {
		return false
	}
	conn, err := handover.Open(fd)
	if err == nil {
		defer conn.Close()
		s.noteGiving(conn, how) // it has another number
		conn.Within(haveWithin(s.registry.Used()))
		switch how {
		case l4.GivingSent:
			if _, err = conn.Expect(handover.KindHave); err == nil {
				s.noteGiving(conn, l4.GivingGone)
				// Nobody has said it before: who does not hear it has given up.
				if err = conn.Send(handover.KindCommit, nil, nil); err == nil {
					log.Info("handed over, by a worker that was killed")
					return true
				}
			}
		case l4.GivingGone:
			// It may have been said already, and is then taken for a farewell.
			err = conn.Send(handover.KindCommit, nil, nil)
		default:
		}
	}
	if how == l4.GivingGone {
		log.Info("handed over, by a worker that was killed", "error", err)
		return true
	}
	if err == nil {
		_ = abort(conn, errKilled)
	}
	s.registry.SetGiving(l4.GivingNothing, -1)
	log.Warn("nothing was handed over: the worker that was to was killed", "why", err)
	return false
}
