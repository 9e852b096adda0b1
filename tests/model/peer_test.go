package model

import (
	"encoding/gob"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// argPeer makes the test binary a peer: it does what it is told on stdin, and
// tells on stdout what came of it.
const argPeer = "peer"

// order is an operation for the connection of one lane. A lane has one
// connection at a time.
type order struct {
	Lane    int
	Op      op
	Seed    uint64
	Side    int
	Six     bool
	Options options
	To      netip.AddrPort // of a connect and of a listen
	Limit   time.Duration
}

// peer is one process of the two.
type peer struct {
	mu      sync.Mutex // orders results
	results *gob.Encoder
}

// runPeer serves orders until stdin ends.
func runPeer() error {
	p := &peer{results: gob.NewEncoder(os.Stdout)}
	lanes := map[int]chan order{}
	var all sync.WaitGroup
	orders := gob.NewDecoder(os.Stdin)
	for {
		var o order
		if err := orders.Decode(&o); err != nil {
			break
		}
		ch := lanes[o.Lane]
		if ch == nil {
			ch = make(chan order, 1)
			lanes[o.Lane] = ch
			all.Go(func() { p.serveLane(ch) })
		}
		ch <- o
	}
	for _, ch := range lanes {
		close(ch)
	}
	all.Wait()
	return nil
}

// lane is what a peer has of one lane.
type lane struct {
	socket
	listeners [2]int // IPv4, IPv6
}

func (p *peer) serveLane(orders <-chan order) {
	l := &lane{socket: socket{fd: -1}, listeners: [2]int{-1, -1}}
	for o := range orders {
		r := result{Lane: o.Lane}
		l.limit = o.Limit
		l.do(&o, &r)
		p.mu.Lock()
		err := p.results.Encode(&r)
		p.mu.Unlock()
		if err != nil {
			break
		}
	}
	l.close()
	for _, fd := range l.listeners {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

func (l *lane) do(o *order, r *result) {
	family := 0
	if o.Six {
		family = 1
	}
	switch o.Op.Kind {
	case opListen:
		l.listen(family, o, r)
	case opGone:
		r.ReadError = errno(unix.Close(l.listeners[family]))
		l.listeners[family] = -1
	case opConnect:
		l.connect(o, r)
	case opPending:
		r.Events, r.Trouble = wait(l.listeners[family], unix.POLLIN, l.limit)
	case opAccept:
		l.begin(o)
		fd, _, err := unix.Accept4(l.listeners[family], unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		r.ReadError = errno(err)
		if err == nil {
			l.fd = fd
			noDelay(fd, o.Options)
		}
	default:
		if l.fd < 0 {
			r.Trouble = "no connection"
			return
		}
		l.socket.do(&o.Op, r)
	}
}

// begin makes the lane one of a new connection.
func (l *lane) begin(o *order) {
	l.close()
	l.out = stream{phase: o.Seed*2 + uint64(o.Side)*77777}
	l.in = stream{phase: o.Seed*2 + uint64(1-o.Side)*77777}
}

// listen opens the listener of a family: again before each connection, which
// inherits its options. It tells the port.
func (l *lane) listen(family int, o *order, r *result) {
	if old := l.listeners[family]; old >= 0 {
		unix.Close(old)
		l.listeners[family] = -1
	}
	sa, af := sockaddr(o.To)
	fd, err := unix.Socket(af, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err == nil {
		l.listeners[family] = fd
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err == nil {
		err = buffers(fd, o.Options)
	}
	if err == nil {
		err = unix.Bind(fd, sa)
	}
	if err == nil {
		err = unix.Listen(fd, 16)
	}
	if err == nil {
		sa, err = unix.Getsockname(fd)
	}
	if r.ReadError = errno(err); err == nil {
		r.Port = int(addrOf(sa).Port())
	}
}

// buffers sets what a connection inherits from its listener, or has before it
// connects. 0 leaves it to the kernel, which then lets it grow.
func buffers(fd int, o options) error {
	for option, size := range map[int]int{unix.SO_RCVBUF: o.Receive, unix.SO_SNDBUF: o.Send} {
		if size == 0 {
			continue
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, size); err != nil {
			return err
		}
	}
	return nil
}

func noDelay(fd int, o options) {
	if o.NoDelay {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
}

func (l *lane) connect(o *order, r *result) {
	sa, af := sockaddr(o.To)
	if o.Op.How&again == 0 {
		l.begin(o)
		fd, err := unix.Socket(af, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			r.WriteError = errno(err)
			return
		}
		l.fd = fd
		if r.WriteError = errno(buffers(fd, o.Options)); r.WriteError != 0 {
			return
		}
		noDelay(fd, o.Options)
	}
	err := unix.SetNonblock(l.fd, o.Op.How&blocking == 0)
	if err == nil {
		err = unix.Connect(l.fd, sa)
	}
	r.WriteError = errno(err)
	if r.WriteError == unix.EINPROGRESS {
		if _, r.Trouble = wait(l.fd, unix.POLLOUT, l.limit); r.Trouble != "" {
			return
		}
		n, err := unix.GetsockoptInt(l.fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			r.Trouble = "SO_ERROR: " + err.Error()
		}
		r.ReadError = unix.Errno(n)
	}
	if err := unix.SetNonblock(l.fd, true); err != nil {
		r.Trouble = err.Error()
	}
}

// do is an operation of a connection that exists.
func (s *socket) do(o *op, r *result) {
	switch o.Kind {
	case opMove:
		s.move(o, r)
		if o.Then != 0 && r.Trouble == "" && r.WriteError == 0 {
			s.do(&op{Kind: o.Then, How: unix.SHUT_WR}, r)
		}
	case opFill:
		s.fill(o, r)
	case opSend:
		r.Written, r.WriteError = s.send(o.Write)
	case opRecv:
		r.Read, r.ReadError, r.Trouble = s.recv(o.Read, 0)
	case opPeek:
		r.Read, r.ReadError, r.Trouble = s.recv(o.Read, unix.MSG_PEEK)
	case opShut:
		r.WriteError = errno(unix.Shutdown(s.fd, o.How))
	case opReset:
		r.WriteError = errno(unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
		s.close()
	case opClose:
		s.close()
	case opLook:
		s.look(r)
	case opError:
		n, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
		r.ReadError, r.WriteError = unix.Errno(n), errno(err)
	case opArrived:
		s.awaitBytes(o.Read, r)
		r.Events = 0
	case opEnd:
		_, r.Trouble = wait(s.fd, unix.POLLRDHUP, s.limit)
	case opHangUp:
		r.Trouble = waitHangUp(s.fd, s.limit)
	case opClosed:
		s.awaitClosed(r)
	default:
		r.Trouble = fmt.Sprintf("unknown operation %d", o.Kind)
	}
}
