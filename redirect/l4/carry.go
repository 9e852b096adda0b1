package l4

import (
	"bytes"
	"encoding/gob"
	"fmt"
	"net/netip"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

// CarryVersion is the number of what [Given.Encode] writes. It changes with the
// meaning of a field; a field that is new and may be missing changes nothing. Two
// processes compare it before either changes anything.
const CarryVersion = 1

// Given is what the workers of a relay carry: plain values, which another process
// can go on with.
type Given struct {
	// Workers is how many there are.
	Workers  int
	Conns    []Carried
	Refusals []CarriedRefusal

	ended []*slot // of a registry: records that nobody has
}

// Carried is one connection. Times are of CLOCK_MONOTONIC, in nanoseconds.
type Carried struct {
	// Worker is who has it. A handshake that waits is bound to the worker whose
	// ring told of it.
	Worker int
	// Down is the application's socket, Up the endpoint's.
	Down, Up CarriedSide

	Downstream flow.Downstream
	// Service and Cluster are names, and may be empty.
	Service, Cluster string
	// Endpoint is what the connection counts for. It is not valid if the original
	// destination is dialed, or nothing is at present.
	Endpoint netip.AddrPort
	// Tried are the endpoints that were dialed in this round, the last one last.
	Tried []netip.AddrPort

	Opened int64
	Began  int64 // the present round of dials
	Active int64 // when bytes last moved
	Dialed int64 // the present dial
	// Connected is how long the last dial took to be answered.
	Connected time.Duration
	// Last is why the last dial failed, Errno by which errno.
	Last  flow.Reason
	Errno uint16
	// Attempts is how many dials there were, Round how many in this round.
	Attempts, Round uint8

	// Dialing: Up is connecting. Waiting: nothing is dialed, since it is not known
	// yet whether a service names the destination.
	Dialing, Waiting bool
	// Mirrored: the application's handshake waited for the dial.
	Mirrored bool
	// Lingers: it has ended and is on record; bytes wait to be sent.
	Lingers bool
	// Kept: keep-alive is on upstream.
	Kept bool
	// Held is set while the handshake waits; Down has no socket then.
	Held *CarriedHeld
	// Released is the answer that the application may have missed, to be sent as
	// often as Repeats says; nil: it has it.
	Released *flow.Held
	Repeats  int
	// End, if set, is why it has to end, with a reset unless it is ReasonClosed. What
	// was sent before a reset is passed on as far as it can be, unless it is Torn:
	// some of it is missing.
	End  flow.Reason
	Torn bool

	slot *slot // it is in the registry already
}

// CarriedSide is one socket of a connection, and what was read from it.
type CarriedSide struct {
	// FD is -1 if there is none.
	FD int
	// Rest is what was read and is not yet written to the other side. RestUrgent
	// says that it is an urgent byte.
	Rest       []byte
	RestUrgent bool
	// PipeRead and PipeWrite are the ends of a pipe that holds InPipe bytes, read
	// after all of Rest; -1 if there is none.
	PipeRead, PipeWrite int
	InPipe              int
	// EOF: everything was read, and a FIN. Done: that was passed on.
	EOF, Done bool
	// FIN: a FIN was seen, what is unread is the last. Urgent: there was an urgent
	// mark, and a short read says nothing.
	FIN, Urgent bool
	// Tuned, Chosen, Wrote: see side.
	Tuned, Chosen, Wrote bool
	// Moved is how many bytes were read here and written to the other side.
	Moved uint64
}

// CarriedHeld is a handshake that waits for the dial.
type CarriedHeld struct {
	flow.Held
	// Silent: nobody answered, and the application's next SYN starts another dial.
	// Reset: the endpoint has reset the connection already.
	Silent, Reset bool
}

// CarriedRefusal is one that the application's kernel has missed so far.
type CarriedRefusal struct {
	Worker int
	Held   flow.Held
	Cookie uint64
	Errno  uint16
	Left   int
}

// fds calls f with every descriptor of a connection.
func (c *Carried) fds(f func(fd *int)) {
	for _, s := range []*CarriedSide{&c.Down, &c.Up} {
		for _, fd := range []*int{&s.FD, &s.PipeRead, &s.PipeWrite} {
			if *fd >= 0 {
				f(fd)
			}
		}
	}
}

// Encode returns g as bytes, and the descriptors that it names, which stay open.
// What is read from the bytes has, in place of each, its index in that list.
func (g *Given) Encode() (data []byte, fds []int, err error) {
	numbered := *g
	numbered.Conns = make([]Carried, len(g.Conns))
	for i := range g.Conns {
		numbered.Conns[i] = g.Conns[i]
		numbered.Conns[i].fds(func(fd *int) {
			fds = append(fds, *fd)
			*fd = len(fds) - 1
		})
	}
	var b bytes.Buffer
	if err := gob.NewEncoder(&b).Encode(&numbered); err != nil {
		return nil, nil, fmt.Errorf("encode connections: %w", err)
	}
	return b.Bytes(), fds, nil
}

// DecodeGiven is the reverse of [Given.Encode], with the reader's own descriptors.
func DecodeGiven(data []byte, fds []int) (*Given, error) {
	g := &Given{}
	if err := gob.NewDecoder(bytes.NewReader(data)).Decode(g); err != nil {
		return nil, fmt.Errorf("decode connections: %w", err)
	}
	named := 0
	var err error
	for i := range g.Conns {
		g.Conns[i].fds(func(fd *int) {
			if *fd != named || named >= len(fds) {
				err = fmt.Errorf("decode connections: descriptor %d of %d is named, %d is next", *fd, len(fds), named)
				return
			}
			*fd = fds[named]
			named++
		})
	}
	if err == nil && named != len(fds) {
		err = fmt.Errorf("decode connections: %d descriptors came, %d are named", len(fds), named)
	}
	if err != nil {
		return nil, err
	}
	return g, nil
}

// carry describes a connection. The buffers stay c's: they must be copied or written
// before it goes on.
func (w *worker) carry(c *conn, index int) Carried {
	r := &w.relay.base
	g := Carried{
		Worker: index, Down: carrySide(&c.sides[down]), Up: carrySide(&c.sides[up]),
		Downstream: c.target.Downstream, Service: c.target.Terms.Service,
		Opened: r.of(c.opened), Began: r.of(c.began), Active: r.of(c.active), Dialed: r.of(c.dialed),
		Connected: c.connected, Last: c.last, Errno: c.errno, Attempts: c.attempts, Round: c.round,
		Dialing: c.dialing && !c.waiting, Waiting: c.waiting, Mirrored: c.mirrored, Lingers: c.lingers, Kept: c.kept,
	}
	if c.target.Cluster != nil {
		g.Cluster = c.target.Cluster.Name
	}
	g.Endpoint = endpointOf(c)
	for _, e := range c.tried {
		g.Tried = append(g.Tried, e.Addr)
	}
	if h := c.held; h != nil {
		g.Held = &CarriedHeld{Held: h.Held, Silent: h.silent, Reset: h.reset}
	}
	return g
}

func carrySide(s *side) CarriedSide {
	g := CarriedSide{
		FD: int(s.fd), Rest: s.pending(), RestUrgent: s.restUrgent, PipeRead: -1, PipeWrite: -1,
		EOF: s.eof, Done: s.done, FIN: s.fin, Urgent: s.urgent,
		Tuned: s.tuned, Chosen: s.chosen, Wrote: s.wrote, Moved: s.moved,
	}
	if s.inPipe > 0 {
		g.PipeRead, g.PipeWrite, g.InPipe = int(s.pipe[0]), int(s.pipe[1]), s.inPipe
	}
	return g
}

// base is where a relay's clock begins, on CLOCK_MONOTONIC.
type base int64

// of makes a time of that clock one that another process understands; to is the
// reverse.
func (b base) of(t int64) int64 { return t + int64(b) }
func (b base) to(t int64) int64 { return t - int64(b) }
