package l4

import (
	"time"
	"unsafe"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream"
)

// The sides of a connection.
const (
	down = 0 // the application's
	up   = 1 // the endpoint's
)

// maxAttempts is the most endpoints that one connection tries.
const maxAttempts = 8

// side is one socket of a connection, and what was read from it.
type side struct {
	fd  int32
	gen uint32 // tells events of this socket from those of an earlier one

	readable bool // may hold bytes that were not read
	eof      bool // everything was read, and a FIN
	fin      bool // epoll has seen a FIN: what is unread is the last
	urgent   bool // a short read says nothing: reads stop at the urgent mark
	// restUrgent is set when rest is an urgent byte.
	restUrgent bool
	done       bool // its end was passed on to the other side
	watched    bool // in the loop,
	armed      bool // for EPOLLOUT too
	blocked    bool // a write found no room: wait for EPOLLOUT
	queued     bool // in the worker's again
	tuned      bool // for more than one write
	chosen     bool // the application has chosen its congestion control
	wrote      bool
	splicing   bool
	full       uint8 // reads in a row that filled the buffer

	pipe   pipe // borrowed while bulk flows
	inPipe int  // bytes in it

	rest  []byte // of a read that the other side had no room for,
	from  int    // from here on
	moved uint64 // bytes read from here and written to the other side
}

// pending returns what was read and is not yet written to the other side.
func (s *side) pending() []byte { return s.rest[s.from:] }

// conn is a connection on its way through. It belongs to one worker.
type conn struct {
	sides      [2]side
	target     Target
	endpoint   *upstream.Endpoint // nil when the original destination is dialed
	tried      []*upstream.Endpoint
	triedSpace [3]*upstream.Endpoint

	held      *held // its handshake waits for the dial; see hold.go
	slot      *slot // in the registry; nil: there is none
	opened    int64 // ns of the worker's clock, like all below
	began     int64 // when the present round of dials did
	active    int64 // when bytes last moved
	owed      int64 // since when the application's are not acknowledged, or 0
	dialed    int64 // when the present dial began
	connected time.Duration
	last      flow.Reason // why the last dial failed
	index     int32       // in worker.conns
	errno     uint16      // of the last dial that failed
	attempts  uint8       // dials in all,
	round     uint8       // and in this round
	dialing   bool
	waiting   bool // it is not known yet whether a service names it; see undecided.go
	endless   bool // the dial has no time limit of ours
	mirrored  bool // it was held
	closing   bool // one side is broken; the rest is being saved
	lingers   bool // both sides have ended; bytes wait to be sent
	dead      bool
	shared    bool // counted as its container's
	kept      bool // keep-alive is on upstream too
}

// sideOf returns which side of c the descriptor is.
func (c *conn) sideOf(fd int32) int {
	if c.sides[up].fd == fd {
		return up
	}
	return down
}

// expires tells whether time alone may end c.
func (c *conn) expires() bool {
	return c.target.Terms.IdleTimeout > 0 || c.target.Terms.MaxLifetime > 0
}

// slab hands out conns, so that a connection costs no allocation.
type slab struct {
	free []*conn
}

// slabSize is how many fill a size class of the allocator, which adds a word of
// its own: one more would cost each a seventh.
const slabSize = (32<<10 - 8) / int(unsafe.Sizeof(conn{}))

func (s *slab) get() *conn {
	n := len(s.free)
	if n == 0 {
		chunk := make([]conn, slabSize)
		for i := range chunk {
			s.free = append(s.free, &chunk[i])
		}
		n = slabSize
	}
	c := s.free[n-1]
	s.free = s.free[:n-1]
	*c = conn{}
	c.sides[down].fd, c.sides[up].fd = -1, -1
	c.sides[down].pipe, c.sides[up].pipe = noPipe, noPipe
	c.tried = c.triedSpace[:0]
	return c
}

func (s *slab) put(c *conn) {
	// What it points to must not live on.
	c.target, c.endpoint, c.tried = Target{}, nil, nil
	c.triedSpace = [3]*upstream.Endpoint{}
	s.free = append(s.free, c)
}

// buffers keeps the memory for what a write left over.
type buffers struct {
	free [2][][]byte
}

// bufferSizes are the two sizes that buffers keeps; most left-overs are small.
var bufferSizes = [2]int{4 << 10, copySize}

// buffersKept is how many free buffers of a size stay.
const buffersKept = 32

// save copies b into a buffer of its own.
func (p *buffers) save(b []byte) []byte {
	size := 0
	if len(b) > bufferSizes[0] {
		size = 1
	}
	var buf []byte
	if n := len(p.free[size]); n > 0 {
		buf = p.free[size][n-1]
		p.free[size] = p.free[size][:n-1]
	} else {
		buf = make([]byte, bufferSizes[size])
	}
	buf = buf[:len(b)]
	copy(buf, b)
	return buf
}

// release takes back what save returned.
func (p *buffers) release(b []byte) {
	size := 0
	if cap(b) > bufferSizes[0] {
		size = 1
	}
	if b != nil && len(p.free[size]) < buffersKept {
		p.free[size] = append(p.free[size], b)
	}
}
