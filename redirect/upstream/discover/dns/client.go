package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// client asks servers. It is safe for concurrent use.
type client struct {
	exempt func(fd int) error
	limit  chan struct{} // as in [Options]
	turn   atomic.Uint32 // whose turn it is to be asked first, with rotate
}

// ask asks r's servers until one answers, or says that there is nothing. An
// answer that leads on is followed.
func (c *client) ask(ctx context.Context, r *resolver, q question) (*answer, error) {
	asked := q
	ttl := time.Duration(1 << 62)
	for range maxChain {
		a, err := c.askServers(ctx, r, asked)
		if m, ok := errors.AsType[*missing](err); ok {
			return nil, &missing{question: q, name: m.name, ttl: m.ttl}
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", q, err)
		}
		ttl = min(ttl, a.ttl)
		if a.next == "" {
			a.ttl = ttl
			return a, nil
		}
		asked.name = a.next
	}
	return nil, fmt.Errorf("%s: %w", q, errLoop)
}

// askServers asks each server in turn, as often as r says.
func (c *client) askServers(ctx context.Context, r *resolver, q question) (*answer, error) {
	first := 0
	if r.rotate {
		first = int(c.turn.Add(1))
	}
	n := len(r.servers)
	failed := make([]string, n) // what each said last
	for range r.attempts {
		for i := range n {
			server := r.servers[(first+i)%n]
			a, err := c.askServer(ctx, r, server, q)
			if _, ok := errors.AsType[*missing](err); err == nil || ok {
				return a, err
			}
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			failed[i] = fmt.Sprintf("%s: %v", server, err)
		}
	}
	return nil, errors.New(strings.Join(failed, "; "))
}

// askServer asks one server: by TCP where the answer has no room in a datagram,
// without EDNS0 where the server does not know it.
func (c *client) askServer(ctx context.Context, r *resolver, server netip.AddrPort, q question) (*answer, error) {
	edns := true
	tcp := r.tcp
	for {
		a, err := c.exchange(ctx, server, q, edns, tcp, r.timeout)
		why, refused := errors.AsType[refusal](err)
		switch {
		case errors.Is(err, errTruncated) && !tcp:
			tcp = true
		case refused && edns && (dnsmessage.RCode(why) == dnsmessage.RCodeFormatError || dnsmessage.RCode(why) == dnsmessage.RCodeNotImplemented):
			edns = false
		default:
			return a, err
		}
	}
}

// exchange sends one question and waits for its answer.
func (c *client) exchange(ctx context.Context, server netip.AddrPort, q question, edns, tcp bool, timeout time.Duration) (*answer, error) {
	if c.limit != nil {
		select {
		case c.limit <- struct{}{}:
			defer func() { <-c.limit }()
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	// A new socket has a port that nobody else knows, and the kernel lets
	// nobody but the server answer to it.
	d := net.Dialer{Timeout: timeout, Control: c.control}
	d.SetMultipathTCP(false)
	network := "udp"
	if tcp {
		network = "tcp"
	}
	id := uint16(rand.Uint32())
	msg, err := pack(q, id, edns)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(timeout)
	conn, err := d.DialContext(ctx, network, server.String())
	if err != nil {
		return nil, brief(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, fmt.Errorf("set deadline: %w", err)
	}
	// Nothing else ends a read before its time.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if tcp {
		return stream(conn, q, id, msg)
	}
	return datagram(conn, q, id, msg)
}

// datagram waits for the one answer that is to q, whatever else comes.
func datagram(conn net.Conn, q question, id uint16, msg []byte) (*answer, error) {
	if _, err := conn.Write(msg); err != nil {
		return nil, brief(err)
	}
	buf := make([]byte, 4096)
	var strange error
	for {
		n, err := conn.Read(buf)
		if err != nil {
			if strange != nil {
				return nil, fmt.Errorf("%w (and what came was %w)", brief(err), strange)
			}
			return nil, brief(err)
		}
		if n == len(buf) {
			// The rest of it is lost.
			return nil, errTruncated
		}
		a, err := unpack(buf[:n], q, id)
		if err == nil || isAnswer(err) {
			return a, err
		}
		strange = err
	}
}

// isAnswer tells errors that a server says from those of a message that somebody
// else may have sent.
func isAnswer(err error) bool {
	_, none := errors.AsType[*missing](err)
	_, refused := errors.AsType[refusal](err)
	return none || refused || errors.Is(err, errTruncated) || errors.Is(err, errLame) || errors.Is(err, errLoop)
}

// stream asks by TCP.
func stream(conn net.Conn, q question, id uint16, msg []byte) (*answer, error) {
	framed := binary.BigEndian.AppendUint16(nil, uint16(len(msg)))
	if _, err := conn.Write(append(framed, msg...)); err != nil {
		return nil, brief(err)
	}
	var head [2]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return nil, brief(err)
	}
	buf := make([]byte, binary.BigEndian.Uint16(head[:]))
	if _, err := io.ReadFull(conn, buf); err != nil {
		return nil, brief(err)
	}
	return unpack(buf, q, id)
}

// control tags a socket before it is used.
func (c *client) control(_, _ string, raw syscall.RawConn) error {
	if c.exempt == nil {
		return nil
	}
	var err error
	if cerr := raw.Control(func(fd uintptr) { err = c.exempt(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// brief is an error of the network without the addresses: who was asked is said
// around it.
func brief(err error) error {
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		return errors.New("no answer in time")
	}
	if e, ok := errors.AsType[*net.OpError](err); ok {
		return e.Err
	}
	return err
}
