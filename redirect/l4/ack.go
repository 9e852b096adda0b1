package l4

import (
	"time"

	"golang.org/x/sys/unix"
)

// ackAfter is how long the application's bytes may stay without an
// acknowledgement.
//
// The kernel puts it off for 40 ms in the hope of an answer to send it with, and
// meanwhile the application's kernel may hold back the rest of the message: to
// Nagle's algorithm every write to the handler is a small one, with loopback's
// segments of 64 KiB, also one that would fill a segment of the way to the
// endpoint. To acknowledge every read was rejected: it is a packet more for
// every message that is answered soon.
const ackAfter = int64(time.Millisecond)

// owed is an acknowledgement that was put off: a socket, and since when.
type owed struct {
	fd  int32
	gen uint32
	at  int64
}

// owing is a queue of them, oldest first.
type owing struct {
	list []owed
	from int // what is before is done
}

func (q *owing) push(o owed) {
	if q.from > len(q.list)/2 {
		q.list = append(q.list[:0], q.list[q.from:]...)
		q.from = 0
	}
	q.list = append(q.list, o)
}

// owe notes that bytes of the application's were read. An answer acknowledges
// them, and then sets c.owed to 0.
func (w *worker) owe(c *conn) {
	if c.owed == 0 {
		c.owed = w.now
		s := &c.sides[down]
		w.owing.push(owed{fd: s.fd, gen: s.gen, at: w.now})
	}
}

// firstOwed returns the connection whose acknowledgement has been put off for
// longest, and forgets those that were answered or have ended.
func (w *worker) firstOwed() *conn {
	for q := &w.owing; q.from < len(q.list); q.from++ {
		o := &q.list[q.from]
		if c := w.byFD[o.fd]; c != nil && c.sides[down].fd == o.fd && c.sides[down].gen == o.gen && c.owed == o.at {
			return c
		}
	}
	w.owing.list, w.owing.from = w.owing.list[:0], 0
	return nil
}

// acknowledge sends what has been put off for long enough.
func (w *worker) acknowledge() {
	for c := w.firstOwed(); c != nil && w.now-c.owed >= ackAfter; c = w.firstOwed() {
		c.owed = 0
		sysSetInt(c.sides[down].fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1)
	}
}
