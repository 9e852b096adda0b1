package model

import (
	"fmt"
	"strings"
	"time"
)

// The peers.
const (
	client = 0
	server = 1
)

var peerNames = [2]string{"client", "server"}

// kind is what an operation does.
type kind uint8

const (
	opMove kind = iota // write and read at the same time, and then perhaps end
	opFill             // write until there is no room
	opSend             // one send
	opRecv             // one recv
	opPeek             // one recv with MSG_PEEK
	opShut
	opClose
	opReset // close with SO_LINGER 0
	opLook  // poll, FIONREAD, getpeername
	opError // getsockopt(SO_ERROR)

	// Barriers: they wait until the kernel says so.
	opArrived // so many bytes wait to be read
	opEnd     // POLLRDHUP
	opHangUp  // POLLHUP
	opClosed  // the socket's state is CLOSE

	opConnect
	opPending // a connection waits to be accepted
	opAccept
	opListen
	opGone // the listener is closed
)

// Values of op.How of a connect.
const (
	inProgress = iota // non-blocking, and poll
	blocking
	again = 2 // on the same socket
)

var kindNames = [...]string{"move", "fill", "send", "recv", "peek", "shutdown", "close", "reset", "look", "SO_ERROR",
	"await bytes", "await end", "await hang-up", "await closed", "connect", "await connection", "accept", "listen", "stop listening"}

// Values of op.Read besides a number of bytes.
const (
	untilEnd = -1
	theRest  = -2 // all that the other has written and that was not read
)

// What of an operation's result plain TCP leaves open.
const (
	anyCount   = 1 << iota // how many bytes were read
	anyEnd                 // with what reading, writing, or the call ended
	anyRoom                // whether there is room to write
	anyWritten             // how many bytes were written
	anyAll     = anyCount | anyEnd | anyRoom | anyWritten
)

// op is one operation of one peer.
type op struct {
	Kind        kind
	How         int // of a shutdown
	Write, Read int
	Chunk       int  // bytes per send, and per recv
	Then        kind // opShut, opClose or opReset, after a move
	Nap         int  // ms that a move does not read at first
	Stillborn   bool // a connect that fails without a packet
	Loose       int  // what of the result is left open
}

func (o *op) String() string {
	var b strings.Builder
	b.WriteString(kindNames[o.Kind])
	switch o.Kind {
	case opMove:
		fmt.Fprintf(&b, " write %d read %s chunk %d", o.Write, readText(o.Read), o.Chunk)
	case opFill:
		fmt.Fprintf(&b, " at most %d chunk %d", o.Write, o.Chunk)
	case opSend:
		fmt.Fprintf(&b, " %d", o.Write)
	case opRecv, opPeek, opArrived:
		fmt.Fprintf(&b, " %d", o.Read)
	case opConnect:
		b.WriteString([]string{"", " blocking", " again", " again, blocking"}[o.How])
	case opShut:
		b.WriteString([]string{" RD", " WR", " RDWR"}[o.How])
	}
	if o.Nap != 0 {
		fmt.Fprintf(&b, " after a nap of %d ms", o.Nap)
	}
	if o.Then != 0 {
		b.WriteString(" then " + kindNames[o.Then])
	}
	for i, name := range []string{"count", "end", "room", "written"} {
		if o.Loose&(1<<i) != 0 {
			b.WriteString(" (any " + name + ")")
		}
	}
	return b.String()
}

func readText(n int) string {
	switch n {
	case untilEnd:
		return "until end"
	case theRest:
		return "the rest"
	default:
		return fmt.Sprint(n)
	}
}

// step is what happens next: an operation of one peer, or of both at once.
type step struct {
	Pause int // ms, before
	Ops   [2]*op
}

func (s step) String() string {
	var parts []string
	if s.Pause > 0 {
		parts = append(parts, fmt.Sprintf("pause %d ms", s.Pause))
	}
	for k, o := range s.Ops {
		if o != nil {
			parts = append(parts, peerNames[k]+" "+o.String())
		}
	}
	return strings.Join(parts, " | ")
}

// options are those of one peer's socket.
type options struct {
	Receive, Send int // SO_RCVBUF, SO_SNDBUF; 0 is the system's
	NoDelay       bool
}

// script is a whole conversation, from connect to the last close.
type script struct {
	Seed    uint64
	Six     bool
	Options [2]options
	Steps   []step
	Limit   time.Duration // of an operation that is bound to end; 0 is the usual
}

func (s *script) String() string {
	var b strings.Builder
	family := "IPv4"
	if s.Six {
		family = "IPv6"
	}
	fmt.Fprintf(&b, "script %d: %s", s.Seed, family)
	for k, o := range s.Options {
		fmt.Fprintf(&b, ", %s %+v", peerNames[k], o)
	}
	for i, st := range s.Steps {
		fmt.Fprintf(&b, "\n%3d %v", i, st)
	}
	return b.String()
}

// connects returns how many connections the script makes, or tries to.
func (s *script) connects() (n int) {
	for _, st := range s.Steps {
		if o := st.Ops[client]; o != nil && o.Kind == opConnect && !o.Stillborn {
			n++
		}
	}
	return n
}
