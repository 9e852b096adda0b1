package l4

import (
	"math"
	"net/netip"
	"syscall"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream"
	"golang.org/x/sys/unix"
)

// begin takes up an accepted socket.
func (w *worker) begin(fd int32) {
	remote := w.peer.get()
	if remote.Addr().Is4() {
		w.counters.accepted4.Add(1)
	} else {
		w.counters.accepted6.Add(1)
	}
	if w.addr.local(fd) != 0 {
		w.refuse(fd)
		return
	}
	local := w.addr.get()
	if len(w.held) > 0 {
		if c := w.held[heldKey{remote, local}]; c != nil {
			w.arrive(c, fd)
			return
		}
	}
	target, err := w.relay.director.Direct(local, remote)
	if flow.ReasonOf(err) == flow.ReasonNotOurs {
		w.counters.unknown.Add(1)
		w.refuse(fd)
		return
	}
	if target.Downstream.Waits && w.registry != nil && err == nil {
		// The worker that answered it died before the application knew. Its SYN
		// comes again.
		discard(fd)
		return
	}
	c := w.start(target, err)
	w.keepConn(c)
	w.adopt(c, down, fd)
	fault(faultRegistered)
	c.sides[down].tuned = true // inherited from the listener
	if err == nil && !c.shared {
		err = errShare
	}
	if err != nil {
		w.end(c, flow.ReasonOf(err), true)
		return
	}
	// What the application has said already goes out with the dial.
	w.readFirst(c)
	if c.dead {
		return
	}
	w.dial(c)
	if !c.dead {
		w.follow(c, down)
	}
}

// start makes a connection that has no sockets yet. It counts as its container's
// (shared) if there is no error and the container may have one more.
func (w *worker) start(target Target, err error) *conn {
	c := w.slab.get()
	c.target = target
	if c.target.Terms == nil {
		c.target.Terms = &w.relay.terms
	}
	if c.expires() {
		w.expiring++
	}
	c.shared = err == nil && w.takeShare(target.Downstream.Group)
	c.opened, c.began, c.active = w.now, w.now, w.now
	c.index = int32(len(w.conns))
	w.conns = append(w.conns, c)
	w.relay.live.Add(1)
	return c
}

// takeShare counts a connection of a container, if it may have one more.
func (w *worker) takeShare(group uint64) bool {
	most := w.relay.options.MaxPerGroup
	return most == 0 || w.relay.shares.take(group, most)
}

// adopt makes fd the socket of side k.
func (w *worker) adopt(c *conn, k int, fd int32) {
	s := &c.sides[k]
	s.fd, s.gen = fd, w.nextGen()
	w.setFD(fd, c)
	w.keepFD(c, k, fd)
}

// refuse resets a socket that is no connection of ours.
func (w *worker) refuse(fd int32) {
	w.abort(fd)
	sysClose(fd)
}

func (w *worker) readFirst(c *conn) {
	s := &c.sides[down]
	w.reading(c, down)
	n, e := sysRead(s.fd, w.buf)
	w.hasRead(n)
	switch {
	case e == unix.EAGAIN:
	case e != 0:
		w.end(c, flow.ReasonDownstreamReset, true)
	case n == 0:
		s.eof = true
	default:
		// Not known to be all: the descriptor is not watched yet, so the
		// first event says whether there is more.
		fault(faultRead)
		w.saveRest(c, down, w.buf[:n])
	}
}

// dial tries endpoints until one is being dialed, or ends the connection. It waits
// with that until it is known whose the connection is.
func (w *worker) dial(c *conn) {
	if !w.undecided(c) {
		w.dialNow(c)
	}
}

func (w *worker) dialNow(c *conn) {
	for !c.dead && !w.dialOnce(c) {
	}
}

// dialOnce starts one attempt. It returns false if that failed at once, and
// then another may follow.
func (w *worker) dialOnce(c *conn) bool {
	to := c.target.Downstream.OrigDst.AddrPort
	c.endpoint = nil
	if c.target.Cluster != nil {
		e, why := w.pick(c)
		if e == nil {
			w.giveUp(c, why)
			return true
		}
		c.endpoint = e
		c.tried = append(c.tried, e)
		to = e.Addr
		e.Begin()
	}
	c.attempts = min(c.attempts, math.MaxUint8-1) + 1
	w.keepNames(c)
	c.round++
	w.dialing++
	c.dialing, c.endless = true, c.held != nil && c.target.Cluster == nil
	if c.endless {
		w.endless++
	}
	w.counters.dials.Add(1)
	if why := w.relay.director.Allowed(to); why != flow.ReasonNone {
		w.dialFailed(c, why)
		return true
	}
	// The batch's time is too old to measure a dial by.
	w.tick()
	c.dialed = w.now
	if e := w.connect(c, to); e != 0 {
		c.errno = uint16(e)
		return w.attemptFailed(c, reasonOf(e))
	}
	return true
}

// pick chooses the endpoint of the next attempt, or tells why there is none.
func (w *worker) pick(c *conn) (*upstream.Endpoint, flow.Reason) {
	if c.attempts > 0 {
		if why := w.relay.director.Again(&c.target); why != flow.ReasonNone {
			return nil, why
		}
	}
	cluster := c.target.Cluster
	e, err := cluster.Pick(cluster.Key(&c.target.Downstream), c.tried)
	switch {
	case err == nil:
		return e, flow.ReasonNone
	case c.last != flow.ReasonNone && c.last != flow.ReasonEndpointRemoved:
		return nil, c.last // which is why there is none left
	default:
		return nil, flow.ReasonOf(err)
	}
}

// connect opens the upstream socket. The errors are those of the dial.
func (w *worker) connect(c *conn, to netip.AddrPort) syscall.Errno {
	family := unix.AF_INET6
	if to.Addr().Is4() {
		family = unix.AF_INET
	}
	fd, e := sysSocket(family)
	if e != 0 {
		return e
	}
	fault(faultSocket)
	w.adopt(c, up, fd)
	abort(fd)
	if e := w.dress(fd, &c.target.Downstream, to.Addr()); e != 0 {
		return e
	}
	w.mirrorTCP(c, fd)
	w.addr.set(to)
	fault(faultConnecting)
	e = w.addr.connect(fd)
	fault(faultConnected)
	switch {
	case e != 0 && e != unix.EINPROGRESS:
		return e
	case c.held != nil && sysConnected(fd):
		// Towards this machine the answer is there already, and asking for it
		// is cheaper than waiting for the event. Not by a second connect: of
		// one that was reset since, that throws away what had come.
		w.established(c)
	}
	if e := w.sendFirst(c); e != 0 || c.dead {
		return e
	}
	return w.follow(c, up)
}

// follow puts side k into the loop. Room to write is reported only where
// somebody waits for it: it would be the first event of every socket, and wake
// the loop for nothing.
func (w *worker) follow(c *conn, k int) syscall.Errno {
	s := &c.sides[k]
	events := uint32(epollIn)
	s.armed = s.blocked || k == up && c.dialing
	if s.armed {
		events |= unix.EPOLLOUT
	}
	s.watched = true
	if e := w.control(unix.EPOLL_CTL_ADD, s.fd, events, s.gen); e == 0 {
		return 0
	}
	// The kernel has no memory, or the user no watches, left.
	if k == up && c.dialing {
		return unix.ENOMEM
	}
	w.end(c, flow.ReasonNoDescriptors, true)
	return 0
}

// sendFirst sends what the application has said already: on a local leg the
// handshake is over when connect returns.
func (w *worker) sendFirst(c *conn) syscall.Errno {
	s, d := &c.sides[up], &c.sides[down]
	if len(d.pending()) == 0 {
		return 0
	}
	n, e := sysSend(s.fd, d.pending())
	switch e {
	case 0:
		fault(faultSent)
		w.established(c)
		s.wrote = true
		w.took(c, down, n)
		w.pump(c, down)
		return 0
	case unix.EAGAIN:
		return 0
	case unix.ECONNRESET, unix.EPIPE:
		// It connected and was reset since, as in answered.
		w.established(c)
		w.broken(c, up)
		return 0
	default:
		return e
	}
}

// dress gives the upstream socket what the application's has.
func (w *worker) dress(fd int32, d *flow.Downstream, to netip.Addr) syscall.Errno {
	if exempt := w.relay.options.Exempt; exempt != nil {
		if err := exempt(int(fd)); err != nil {
			// Dialed all the same, the connection would come back to us.
			return unix.EPERM
		}
	}
	if d.TOS != 0 {
		// Refused for none but odd values, and never worth a connection.
		if to.Is4() {
			sysSetInt(fd, unix.IPPROTO_IP, unix.IP_TOS, int(d.TOS))
		} else {
			sysSetInt(fd, unix.IPPROTO_IPV6, unix.IPV6_TCLASS, int(d.TOS))
		}
	}
	if d.Priority != 0 {
		sysSetInt(fd, unix.SOL_SOCKET, unix.SO_PRIORITY, int(d.Priority))
	}
	if d.Mark != 0 {
		// The mark may choose the route: without it the bytes could leave by
		// the wrong one.
		if e := sysSetInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(d.Mark)); e != 0 {
			return e
		}
	}
	return w.bindSource(fd, d.BoundSource, to)
}

// bindSource leaves the source to the kernel when the application did, or when
// its choice makes no sense for this endpoint.
func (w *worker) bindSource(fd int32, source, to netip.Addr) syscall.Errno {
	if !source.IsValid() || source.Is4() != to.Is4() || source.IsLoopback() != to.IsLoopback() {
		return 0
	}
	sysSetInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	w.addr.set(netip.AddrPortFrom(source, 0))
	return w.addr.bind(fd)
}

// established notes that the dial was answered.
func (w *worker) established(c *conn) {
	w.tick()
	c.connected = time.Duration(w.now - c.dialed)
	c.active = w.now
	w.dialed(c)
	c.keepDialed()
	fault(faultEstablished)
	c.last = flow.ReasonNone
	if c.endpoint != nil {
		c.endpoint.Connected(c.connected)
	}
	w.tell(c, true)
	if c.held != nil {
		w.injected(w.queue.Finish(&c.held.Held))
	}
}

// dialed notes that the present dial is over.
func (w *worker) dialed(c *conn) {
	c.dialing = false
	w.dialing--
	w.limit(c)
}

// limit notes that the present dial has a time limit now, if it has not had one.
func (w *worker) limit(c *conn) {
	if c.endless {
		c.endless = false
		w.endless--
	}
}

// dialFailed ends the present attempt and makes another, or ends the
// connection.
func (w *worker) dialFailed(c *conn, why flow.Reason) {
	if !w.attemptFailed(c, why) {
		w.dial(c)
	}
}

// attemptFailed ends the present attempt. It returns false if another may be
// made, and has ended the connection otherwise.
func (w *worker) attemptFailed(c *conn, why flow.Reason) bool {
	w.counters.dialFailures.Add(1)
	c.last = why
	c.connected = 0
	w.dialed(c)
	last := c.endpoint
	fault(faultRefused)
	w.dropSide(c, up)
	c.sides[up] = side{fd: -1, pipe: noPipe}
	if last != nil {
		last.Failed(why)
	}
	l := c.target.Terms
	if last == nil || int(c.round) >= l.Attempts || w.now-c.began >= int64(l.DialBudget) ||
		why == flow.ReasonNoDescriptors || why == flow.ReasonLoop {
		w.giveUp(c, why)
		return true
	}
	last.End()
	c.endpoint = nil
	w.counters.retries.Add(1)
	return false
}

// answerOf names why a dial failed that had begun. What connect(2) gives at once for
// this machine's sake (EACCES: a firewall, a route) comes here from an ICMP error.
func answerOf(e syscall.Errno) flow.Reason {
	switch e {
	case unix.EACCES, unix.EPROTO, unix.ENOPROTOOPT, unix.EOPNOTSUPP, unix.ENONET: // icmp(7): net/ipv4/icmp.c, net/ipv6/icmp.c
		return flow.ReasonDialUnreachable
	default:
		return reasonOf(e)
	}
}

// reasonOf names why a dial failed.
func reasonOf(e syscall.Errno) flow.Reason {
	switch e {
	case unix.ECONNREFUSED:
		return flow.ReasonDialRefused
	case unix.ETIMEDOUT:
		return flow.ReasonDialTimeout
	case unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENETDOWN:
		return flow.ReasonDialUnreachable
	case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM:
		return flow.ReasonNoDescriptors
	default:
		return flow.ReasonDialFailed
	}
}
