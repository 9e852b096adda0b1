package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// limit is how long a client of a test waits for an answer that comes; short is
// for one that does not.
const (
	limit = 30 * time.Second
	short = 50 * time.Millisecond
)

// asked is one question that came to a fake server.
type asked struct {
	dnsmessage.Message
	tcp bool
}

func (a asked) edns() bool { return len(a.Additionals) > 0 }

// reply is the message that would be a proper answer.
func (a asked) reply(answers ...dnsmessage.Resource) dnsmessage.Message {
	return dnsmessage.Message{
		Header: dnsmessage.Header{
			ID: a.ID, Response: true, RecursionDesired: true, RecursionAvailable: true,
		},
		Questions: a.Questions,
		Answers:   answers,
	}
}

// fake is a name server that sends whatever answer returns, by UDP and TCP on one
// port.
type fake struct {
	t      *testing.T
	addr   netip.AddrPort
	answer func(a asked) [][]byte
	count  atomic.Int32
	all    sync.WaitGroup
}

func newFake(t *testing.T, answer func(a asked) [][]byte) *fake {
	t.Helper()
	f := &fake{t: t, answer: answer}
	var pc net.PacketConn
	var ln net.Listener
	// The port that one protocol gives may be taken in the other.
	for range 100 {
		var err error
		if pc, err = net.ListenPacket("udp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		f.addr = pc.LocalAddr().(*net.UDPAddr).AddrPort()
		if ln, err = net.Listen("tcp", f.addr.String()); err == nil {
			break
		}
		pc.Close()
	}
	if ln == nil {
		t.Fatal("no port for UDP and TCP")
	}
	f.all.Go(func() { f.serveUDP(pc) })
	f.all.Go(func() { f.serveTCP(ln) })
	t.Cleanup(func() {
		pc.Close()
		ln.Close()
		f.all.Wait()
	})
	return f
}

func (f *fake) serveUDP(pc net.PacketConn) {
	buf := make([]byte, 4096)
	for {
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		for _, b := range f.handle(buf[:n], false) {
			_, _ = pc.WriteTo(b, from)
		}
	}
}

func (f *fake) serveTCP(ln net.Listener) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		var head [2]byte
		if _, err := io.ReadFull(conn, head[:]); err == nil {
			b := make([]byte, binary.BigEndian.Uint16(head[:]))
			if _, err := io.ReadFull(conn, b); err == nil {
				for _, r := range f.handle(b, true) {
					_, _ = conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(r))), r...))
				}
			}
		}
		conn.Close()
	}
}

func (f *fake) handle(b []byte, tcp bool) [][]byte {
	f.count.Add(1)
	a := asked{tcp: tcp}
	if err := a.Unpack(b); err != nil || len(a.Questions) != 1 {
		f.t.Errorf("the question cannot be read: %v", err)
		return nil
	}
	return f.answer(a)
}

// conf is a resolver that asks fakes.
func conf(timeout time.Duration, fakes ...*fake) *resolver {
	r := &resolver{ndots: 1, timeout: timeout, attempts: 1}
	for _, f := range fakes {
		r.servers = append(r.servers, f.addr)
	}
	return r
}

var web = question{"web.example.", dnsmessage.TypeA}

// good answers everything with 192.0.2.1.
func good(t testing.TB) func(a asked) [][]byte {
	return func(a asked) [][]byte {
		return [][]byte{must(t, a.reply(recA(a.Questions[0].Name.String(), 60, "192.0.2.1")))}
	}
}

func refuses(t testing.TB, code dnsmessage.RCode) func(a asked) [][]byte {
	return func(a asked) [][]byte {
		m := a.reply()
		m.RCode = code
		return [][]byte{must(t, m)}
	}
}

func silent(asked) [][]byte { return nil }

func wantAddrs(t *testing.T, a *answer, err error, addrs ...string) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(a.addrs), fmt.Sprint(addrs); got != want {
		t.Errorf("addresses %s, want %s", got, want)
	}
}

func wantText(t *testing.T, err error, text string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("error %v, want one with %q", err, text)
	}
}

// What an outsider could have sent does not end the wait for the real answer.
func TestForeignAnswers(t *testing.T) {
	t.Parallel()
	evil := func(a asked) dnsmessage.Message { return a.reply(recA("web.example.", 60, "192.0.2.66")) }
	f := newFake(t, func(a asked) [][]byte {
		id, name, kind, query := evil(a), evil(a), evil(a), evil(a)
		id.ID ^= 0x5555
		name.Questions = []dnsmessage.Question{{Name: dnsName("other.example."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}
		kind.Questions = []dnsmessage.Question{{Name: dnsName("web.example."), Type: dnsmessage.TypeAAAA, Class: dnsmessage.ClassINET}}
		query.Response = false
		garbage := must(t, evil(a))
		cut := garbage[:len(garbage)-3]
		return [][]byte{
			{}, {1, 2, 3}, cut, must(t, id), must(t, name), must(t, kind), must(t, query),
			must(t, a.reply(recA("web.example.", 60, "192.0.2.1"))),
		}
	})
	c := &client{}
	a, err := c.ask(t.Context(), conf(limit, f), web)
	wantAddrs(t, a, err, "192.0.2.1")
	if n := f.count.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

// Nothing but foreign answers is no answer, and the error says what came.
func TestOnlyForeignAnswers(t *testing.T) {
	t.Parallel()
	f := newFake(t, func(a asked) [][]byte {
		m := a.reply(recA("web.example.", 60, "192.0.2.66"))
		m.ID++
		return [][]byte{must(t, m)}
	})
	_, err := (&client{}).ask(t.Context(), conf(time.Second, f), web)
	wantText(t, err, "no answer in time")
	wantText(t, err, errNotOurs.Error())
}

func TestTruncated(t *testing.T) {
	t.Parallel()
	var byTCP atomic.Int32
	f := newFake(t, func(a asked) [][]byte {
		if !a.tcp {
			m := a.reply(recA("web.example.", 60, "192.0.2.66"))
			m.Truncated = true
			return [][]byte{must(t, m)}
		}
		byTCP.Add(1)
		m := a.reply()
		for i := range 1000 {
			m.Answers = append(m.Answers, recA("web.example.", 60, fmt.Sprintf("10.0.%d.%d", i/250, i%250+1)))
		}
		return [][]byte{must(t, m)}
	})
	a, err := (&client{}).ask(t.Context(), conf(limit, f), web)
	if err != nil || len(a.addrs) != 1000 || byTCP.Load() != 1 {
		t.Errorf("%v, by TCP %d times", err, byTCP.Load())
	}
}

// A datagram larger than was asked for is cut off by nobody who says so.
func TestOversized(t *testing.T) {
	t.Parallel()
	f := newFake(t, func(a asked) [][]byte {
		m := a.reply()
		n := 1
		if !a.tcp {
			n = 400
		}
		for i := range n {
			m.Answers = append(m.Answers, recA("web.example.", 60, fmt.Sprintf("10.0.%d.%d", i/250, i%250+1)))
		}
		return [][]byte{must(t, m)}
	})
	a, err := (&client{}).ask(t.Context(), conf(limit, f), web)
	wantAddrs(t, a, err, "10.0.0.1")
}

func TestTruncatedByTCP(t *testing.T) {
	t.Parallel()
	f := newFake(t, func(a asked) [][]byte {
		m := a.reply()
		m.Truncated = true
		return [][]byte{must(t, m)}
	})
	_, err := (&client{}).ask(t.Context(), conf(limit, f), web)
	wantText(t, err, errTruncated.Error())
	if n := f.count.Load(); n != 2 {
		t.Errorf("asked %d times", n)
	}
}

func TestWithoutEDNS(t *testing.T) {
	t.Parallel()
	for _, code := range []dnsmessage.RCode{dnsmessage.RCodeFormatError, dnsmessage.RCodeNotImplemented} {
		f := newFake(t, func(a asked) [][]byte {
			if a.edns() {
				return refuses(t, code)(a)
			}
			return good(t)(a)
		})
		a, err := (&client{}).ask(t.Context(), conf(limit, f), web)
		wantAddrs(t, a, err, "192.0.2.1")
	}
}

func TestUseVC(t *testing.T) {
	t.Parallel()
	f := newFake(t, func(a asked) [][]byte {
		if !a.tcp {
			t.Error("asked by UDP")
		}
		return good(t)(a)
	})
	r := conf(limit, f)
	r.tcp = true
	a, err := (&client{}).ask(t.Context(), r, web)
	wantAddrs(t, a, err, "192.0.2.1")
}

// Servers that fail are passed over; one that says that there is nothing is not.
func TestServers(t *testing.T) {
	t.Parallel()
	lame := newFake(t, func(a asked) [][]byte {
		m := a.reply()
		m.RecursionAvailable = false
		m.Authorities = []dnsmessage.Resource{recNS("example.")}
		return [][]byte{must(t, m)}
	})
	broken, refused, mute := newFake(t, refuses(t, dnsmessage.RCodeServerFailure)), newFake(t, refuses(t, dnsmessage.RCodeRefused)), newFake(t, silent)
	none, fine := newFake(t, refuses(t, dnsmessage.RCodeNameError)), newFake(t, good(t))
	absent := &fake{addr: netip.MustParseAddrPort("127.0.0.1:1")}

	a, err := (&client{}).ask(t.Context(), conf(limit, absent, lame, broken, refused, fine), web)
	wantAddrs(t, a, err, "192.0.2.1")
	a, err = (&client{}).ask(t.Context(), conf(short, mute, fine), web)
	if err == nil { // a busy machine may be slower than the fine one's time
		wantAddrs(t, a, err, "192.0.2.1")
	}
	_, err = (&client{}).ask(t.Context(), conf(limit, broken, none, fine), web)
	if m, ok := errors.AsType[*missing](err); !ok || !m.name {
		t.Errorf("error %v, want NXDOMAIN", err)
	}
	_, err = (&client{}).ask(t.Context(), conf(time.Second, absent, broken, mute), web)
	for _, text := range []string{"A of web.example", "connection refused", "SERVFAIL", "no answer in time", absent.addr.String()} {
		wantText(t, err, text)
	}
}

func TestAttempts(t *testing.T) {
	t.Parallel()
	var n atomic.Int32
	f := newFake(t, func(a asked) [][]byte {
		if n.Add(1) < 3 {
			return refuses(t, dnsmessage.RCodeServerFailure)(a)
		}
		return good(t)(a)
	})
	r := conf(limit, f)
	r.attempts = 3
	a, err := (&client{}).ask(t.Context(), r, web)
	wantAddrs(t, a, err, "192.0.2.1")
}

func TestRotate(t *testing.T) {
	t.Parallel()
	one, two, three := newFake(t, good(t)), newFake(t, good(t)), newFake(t, good(t))
	r := conf(limit, one, two, three)
	c := &client{}
	for _, rotate := range []bool{false, true} {
		r.rotate = rotate
		for range 6 {
			if _, err := c.ask(t.Context(), r, web); err != nil {
				t.Fatal(err)
			}
		}
	}
	if a, b, c := one.count.Load(), two.count.Load(), three.count.Load(); a != 8 || b != 2 || c != 2 {
		t.Errorf("asked %d, %d and %d times, want 6+2, 2 and 2", a, b, c)
	}
}

// A chain that a server does not follow is followed, and one without end is not.
func TestChains(t *testing.T) {
	t.Parallel()
	f := newFake(t, func(a asked) [][]byte {
		switch name := a.Questions[0].Name.String(); name {
		case "web.example.":
			return [][]byte{must(t, a.reply(recCNAME(name, 10, "b.example.")))}
		case "b.example.":
			return [][]byte{must(t, a.reply(recCNAME(name, 20, "c.example."), recA("c.example.", 5, "192.0.2.1")))}
		default: // every name leads to another
			label, _, _ := strings.Cut(name, ".")
			n := len(label)%40 + 1
			return [][]byte{must(t, a.reply(recCNAME(name, 20, strings.Repeat("x", n)+".example.")))}
		}
	})
	a, err := (&client{}).ask(t.Context(), conf(limit, f), web)
	wantAddrs(t, a, err, "192.0.2.1")
	if a.ttl != 5*time.Second {
		t.Errorf("TTL %v, want the least of the chain", a.ttl)
	}
	_, err = (&client{}).ask(t.Context(), conf(limit, f), question{"x.example.", dnsmessage.TypeA})
	wantText(t, err, "loop")
	if n := f.count.Load(); n > 2+maxChain {
		t.Errorf("asked %d times", n)
	}
}

func TestExempt(t *testing.T) {
	t.Parallel()
	f := newFake(t, func(a asked) [][]byte {
		m := a.reply(recA("web.example.", 60, "192.0.2.1"))
		m.Truncated = !a.tcp
		return [][]byte{must(t, m)}
	})
	var kinds []string
	c := &client{exempt: func(fd int) error {
		kinds = append(kinds, socketKind(t, fd))
		return nil
	}}
	a, err := c.ask(t.Context(), conf(limit, f), web)
	wantAddrs(t, a, err, "192.0.2.1")
	if got := strings.Join(kinds, " "); got != "UDP TCP" {
		t.Errorf("exempted %s, want a UDP and a TCP socket, not of MPTCP, before they connect", got)
	}
	c.exempt = func(int) error { return errors.New("no such map") }
	_, err = c.ask(t.Context(), conf(limit, f), web)
	wantText(t, err, "no such map")
}

// Questions beyond the limit wait for those before them.
func TestLimit(t *testing.T) {
	t.Parallel()
	var open, most atomic.Int32
	f := newFake(t, good(t))
	c := &client{limit: make(chan struct{}, 2), exempt: func(int) error {
		// The socket is open, and its question is not answered.
		n := open.Add(1)
		defer open.Add(-1)
		for {
			m := most.Load()
			if n <= m || most.CompareAndSwap(m, n) {
				break
			}
		}
		time.Sleep(time.Millisecond)
		return nil
	}}
	r := conf(limit, f)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if _, err := c.ask(t.Context(), r, web); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := most.Load(); n > 2 || len(c.limit) != 0 {
		t.Errorf("%d at once, want 2 at most; %d places are still taken", n, len(c.limit))
	}
	c.limit <- struct{}{}
	c.limit <- struct{}{}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.ask(ctx, r, web); !errors.Is(err, context.Canceled) {
		t.Errorf("without room, and cancelled: %v", err)
	}
}

// The end of the context ends a wait at once.
func TestCancel(t *testing.T) {
	t.Parallel()
	came := make(chan struct{}, 1)
	f := newFake(t, func(asked) [][]byte {
		select {
		case came <- struct{}{}:
		default:
		}
		return nil
	})
	for _, tcp := range []bool{false, true} {
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("enough")
		r := conf(time.Hour, f)
		r.tcp, r.attempts = tcp, 1000
		done := make(chan error, 1)
		go func() { _, err := (&client{}).ask(ctx, r, web); done <- err }()
		<-came
		cancel(why) // by TCP it may be between two attempts
		if err := <-done; !errors.Is(err, why) {
			t.Errorf("error %v, want why it was cancelled", err)
		}
	}
}
