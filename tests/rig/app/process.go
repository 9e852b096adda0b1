package app

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"sync/atomic"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"golang.org/x/sys/unix"
)

const (
	// Env makes this process the application: it listens for orders at the path of a
	// unix socket, or with - reads them from its stdin.
	Env = "PILLION_TEST_APP"
	// EnvFirst is where the application connects before anything else.
	EnvFirst = "PILLION_TEST_APP_FIRST"
	// EnvLast is where it does when it is told to end.
	EnvLast = "PILLION_TEST_APP_LAST"
	hurry   = 5 * time.Second // for these two
)

// order is what the application is told to do, one line of JSON each.
type order struct {
	Do action
	To netip.AddrPort
	// Patience is how long a connect may take.
	Patience time.Duration
	// ID names a connection that stays open.
	ID   string
	Load *Load
}

// action is what an order is.
type action string

const (
	actFirst  action = "first"
	actDial   action = "dial"
	actOpen   action = "open"
	actTalk   action = "talk"
	actEnded  action = "ended"
	actClose  action = "close"
	actLoad   action = "load"
	actTurn   action = "turn"
	actUnload action = "unload"
)

// answer is what became of it.
type answer struct {
	// Name is what the server called itself, Errno why there is none.
	Name, Errno string
	Report      *Report
}

// Main is the application, if the process was started as one: it does not return
// then. Call it first in TestMain.
func Main() {
	where := os.Getenv(Env)
	if where == "" {
		return
	}
	p := &player{conns: map[string]*side{}}
	if to := os.Getenv(EnvFirst); to != "" {
		var c net.Conn
		if c, p.first = connect(netip.MustParseAddrPort(to), hurry); c != nil {
			c.Close()
		}
	}
	if to := os.Getenv(EnvLast); to != "" {
		told := make(chan os.Signal, 1)
		signal.Notify(told, unix.SIGTERM)
		go last(told, netip.MustParseAddrPort(to))
	}
	if where == "-" {
		p.obey(os.Stdin, os.Stdout)
		os.Exit(0)
	}
	fmt.Println(p.listen(where))
	os.Exit(1)
}

// last connects when the application is told to end.
func last(told <-chan os.Signal, to netip.AddrPort) {
	<-told
	_, r := connect(to, hurry)
	fmt.Println("last:", r.Name+r.Errno)
	os.Exit(0)
}

// player does what the application is told to.
type player struct {
	first answer
	conns map[string]*side
	ids   uint32 // how many of these have talked
	right atomic.Int64
	load  *load
}

func (p *player) listen(path string) error {
	_ = os.Remove(path)
	ln, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		p.obey(c, c)
		c.Close()
	}
}

func (p *player) obey(from io.Reader, to io.Writer) {
	in, out := json.NewDecoder(from), json.NewEncoder(to)
	for {
		var o order
		if in.Decode(&o) != nil || out.Encode(p.do(&o)) != nil {
			return
		}
	}
}

func (p *player) do(o *order) answer {
	switch o.Do {
	case actFirst:
		return p.first
	case actDial:
		c, a := connect(o.To, o.Patience)
		if c != nil {
			c.Close()
		}
		return a
	case actOpen:
		c, a := connect(o.To, o.Patience)
		if c != nil {
			p.conns[o.ID] = appSide(c, head{Kind: Echo}, &p.right)
		}
		return a
	case actTalk:
		return answer{Errno: errnoOf(p.talk(o.ID))}
	case actEnded:
		return answer{Errno: errnoOf(p.ended(o.ID))}
	case actClose:
		for id, c := range p.conns {
			if o.ID == "" || o.ID == id {
				c.Close()
				delete(p.conns, id)
			}
		}
	case actLoad:
		p.load = start(o.Load, o.Patience)
	case actTurn:
		return answer{Report: p.load.turn(false)}
	case actUnload:
		return answer{Report: p.load.unload()}
	}
	return answer{}
}

// talk sends a message on an open connection, of which every byte has to come back.
func (p *player) talk(id string) error {
	s, ok := p.conns[id]
	if !ok {
		return errors.New("there is no such connection")
	}
	s.SetDeadline(time.Now().Add(rig.Limit))
	if s.out.at == 0 {
		p.ids++
		s.head.ID = ^p.ids // none of a load's
		s.out, s.in = s.streams()
		if _, err := s.Write(s.head.bytes()); err != nil {
			return err
		}
	}
	return s.exchange(TalkSize)
}

// ended waits for the end of an open connection.
func (p *player) ended(id string) error {
	s, ok := p.conns[id]
	if !ok {
		return errors.New("there is no such connection")
	}
	defer s.Close()
	delete(p.conns, id)
	s.SetReadDeadline(time.Now().Add(rig.Limit))
	if _, err := io.Copy(io.Discard, s.TCPConn); err != nil {
		return err
	}
	return io.EOF
}

// connect connects and hears the server's name.
func connect(to netip.AddrPort, patience time.Duration) (net.Conn, answer) {
	c, err := net.DialTimeout("tcp", to.String(), patience)
	if err != nil {
		return nil, answer{Errno: errnoOf(err)}
	}
	name, err := hear(c)
	if err != nil {
		c.Close()
		return nil, answer{Errno: "connected, then " + errnoOf(err)}
	}
	return c, answer{Name: name}
}

// hear reads the line in which the server says its name.
func hear(c net.Conn) (string, error) {
	c.SetReadDeadline(time.Now().Add(rig.Limit))
	var name []byte
	// Byte by byte: what comes behind the line is for others.
	for b := make([]byte, 1); ; name = append(name, b[0]) {
		if _, err := c.Read(b); err != nil {
			return "", fmt.Errorf("read the server's name: %w", err)
		}
		if b[0] == '\n' {
			return string(name), c.SetReadDeadline(time.Time{})
		}
	}
}

func errnoOf(err error) string {
	var errno unix.Errno
	switch {
	case err == nil:
		return ""
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "EOF"
	default:
		return err.Error()
	}
}
