package upgrade

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// envPeers makes this test binary an application that talks on every path, and looks
// at whom it is told that it is connected to.
const envPeers = "PILLION_TEST_UPGRADE_PEERS"

// peersTask is what it does, until its stdin ends.
type peersTask struct {
	To    []netip.AddrPort
	Conns int // that stay, at each address
	// Pause is between connections that come and go.
	Pause time.Duration
	// Wide are addresses that each are connected to once.
	Wide     netip.Prefix
	WidePort uint16
}

// peersOutcome is what became of it.
type peersOutcome struct {
	Errs []string
	// New counts, by address, the connections that came and went, Least is the
	// smallest number of messages on a connection that stays since the last turn.
	New   []int
	Wide  int // connections, each to another address
	Least int
	// Later are the connections that stay and were made after the first turn.
	Later []laterConn
}

// laterConn is a connection, by the cookie of its socket.
type laterConn struct {
	To     netip.AddrPort
	Cookie uint64
}

// player is this test binary as an application in the scope, which answers words until
// its stdin ends.
type player struct {
	in  io.WriteCloser
	out *json.Decoder
}

// newPlayer starts the application that a test of this name is, with its task in the
// environment. It ends with t.
func newPlayer(t testing.TB, r *rig.Rig, test, env string, task any) player {
	t.Helper()
	line, err := json.Marshal(task)
	if err != nil {
		t.Fatal(err)
	}
	cmd := r.Command(os.Args[0], "-test.run=^"+test+"$")
	cmd.Env, cmd.Stderr = append(os.Environ(), env+"="+string(line)), os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	return player{in: in, out: json.NewDecoder(out)}
}

// ask says a word, and reads what became of it, of whose errors errs tells.
func ask[O any](t testing.TB, p player, word string, errs func(*O) []string) (o O) {
	t.Helper()
	if _, err := fmt.Fprintln(p.in, word); err != nil {
		t.Fatal(err)
	}
	if err := p.out.Decode(&o); err != nil {
		t.Fatalf("the application: %v", err)
	}
	for _, e := range errs(&o) {
		t.Errorf("application: %s", e)
	}
	return o
}

// peers is the application of TestPeers.
type peers struct{ player }

func newPeers(t testing.TB, r *rig.Rig, q peersTask) peers {
	t.Helper()
	return peers{newPlayer(t, r, "TestPeers", envPeers, q)}
}

// turn waits until every connection that stays has exchanged messages, and tells what
// has happened since the last turn.
func (p peers) turn(t testing.TB, word string) peersOutcome {
	t.Helper()
	return ask(t, p.player, word, func(o *peersOutcome) []string { return o.Errs })
}

// knock is whom TestKnock connects to.
var knock = flag.String("knock", "", "an address that TestKnock connects to")

// TestKnock is an application that connects once, and wants an answer. As a test it does
// nothing.
func TestKnock(t *testing.T) {
	if *knock == "" {
		return
	}
	c, err := dialTo(netip.MustParseAddrPort(*knock), false)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := talkOnce(c, new(uint64), 1); err != nil {
		t.Fatal(err)
	}
}

// TestPeers is the application. As a test it does nothing.
func TestPeers(*testing.T) {
	text := os.Getenv(envPeers)
	if text == "" {
		return
	}
	p := &peerPlayer{end: make(chan struct{})}
	if err := json.Unmarshal([]byte(text), &p.peersTask); err != nil {
		panic(err)
	}
	p.come = make([]atomic.Int64, len(p.To))
	for n := range p.To {
		for i := range p.Conns {
			p.keep(n, i)
		}
		p.all.Go(func() { p.visit(n) })
	}
	if p.Wide.IsValid() {
		p.all.Go(p.wander)
	}
	out := json.NewEncoder(os.Stdout)
	for {
		var word string
		if _, err := fmt.Scanln(&word); err != nil {
			os.Exit(0)
		}
		switch word {
		case "end":
			close(p.end)
			p.all.Wait()
		case "more":
			for n := range p.To {
				p.keep(n, laterConns)
			}
			p.wait()
		default:
			p.wait()
		}
		out.Encode(p.outcome())
	}
}

// laterConns numbers connections that are made when all others are there.
const laterConns = 500

type peerPlayer struct {
	peersTask
	end    chan struct{}
	all    sync.WaitGroup
	come   []atomic.Int64
	counts []*atomic.Int64
	wide   atomic.Int64

	mu    sync.Mutex
	errs  []string
	later []laterConn
}

// keep makes a connection that stays.
func (p *peerPlayer) keep(n, i int) {
	count := new(atomic.Int64)
	p.counts = append(p.counts, count)
	p.all.Go(func() { p.stay(n, i, count) })
}

func (p *peerPlayer) fail(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.errs) < 20 {
		p.errs = append(p.errs, fmt.Sprintf(format, args...))
	}
}

// wait returns when every connection has said something since the last turn.
func (p *peerPlayer) wait() {
	for limit := time.Now().Add(rig.Limit); time.Now().Before(limit); time.Sleep(10 * time.Millisecond) {
		least := int64(2)
		for _, c := range p.counts {
			least = min(least, c.Load())
		}
		if least == 2 {
			return
		}
	}
}

func (p *peerPlayer) outcome() peersOutcome {
	p.mu.Lock()
	defer p.mu.Unlock()
	o := peersOutcome{Errs: p.errs, Wide: int(p.wide.Load()), Least: 1 << 30}
	o.Later = p.later
	p.errs = nil
	for n := range p.come {
		o.New = append(o.New, int(p.come[n].Load()))
	}
	for _, c := range p.counts {
		o.Least = min(o.Least, int(c.Swap(0)))
	}
	return o
}

func (p *peerPlayer) dial(n int, multipath bool) (*net.TCPConn, error) {
	return dialTo(p.To[n], multipath)
}

func dialTo(to netip.AddrPort, multipath bool) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: rig.Limit}
	d.SetMultipathTCP(multipath)
	c, err := d.DialContext(context.Background(), "tcp", to.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// stay keeps a connection until the end, and looks at its peer's name all the time.
func (p *peerPlayer) stay(n, i int, count *atomic.Int64) {
	// Of the older ones some close before the end, in the middle of all.
	c, err := p.dial(n, i%4 == 3)
	if err != nil {
		p.fail("connect to %s: %v", p.To[n], err)
		return
	}
	defer c.Close()
	if i == laterConns {
		p.note(p.To[n], c)
	}
	stream := uint64(n*1000 + i)
	for {
		if err := talkOnce(c, &stream, 100); err != nil {
			p.fail("connection to %s: %v", p.To[n], err)
			return
		}
		if peer, err := peerOf(c); err != nil || peer != p.To[n] {
			p.fail("getpeername of a connection to %s: %s, %v", p.To[n], peer, err)
			return
		}
		count.Add(1)
		select {
		case <-p.end:
			return
		case <-time.After(rest(20 * time.Millisecond)):
		}
	}
}

// note remembers a connection by its cookie.
func (p *peerPlayer) note(to netip.AddrPort, c *net.TCPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		p.fail("cookie of a connection to %s: %v", to, err)
		return
	}
	control := raw.Control(func(fd uintptr) {
		var cookie uint64
		if cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE); err == nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.later = append(p.later, laterConn{To: to, Cookie: cookie})
		}
	})
	if err := errors.Join(control, err); err != nil {
		p.fail("cookie of a connection to %s: %v", to, err)
	}
}

// visit makes new connections until the end.
func (p *peerPlayer) visit(n int) {
	for i := 0; p.pause(); i++ {
		p.visitOnce(p.To[n], i, &p.come[n])
	}
}

// wander makes a new connection to each of the addresses of Wide, until the end.
func (p *peerPlayer) wander() {
	to := p.Wide.Addr().Next()
	for i := 0; p.pause() && p.Wide.Contains(to); i++ {
		p.visitOnce(netip.AddrPortFrom(to, p.WidePort), i, &p.wide)
		to = to.Next()
	}
}

// rest is how long an application waits that is to wait so long: more where a processor
// is emulated, so that it has time for others too.
func rest(d time.Duration) time.Duration {
	if testutil.InVM() {
		return 20 * d
	}
	return d
}

// pause is false at the end.
func (p *peerPlayer) pause() bool {
	select {
	case <-p.end:
		return false
	case <-time.After(rest(p.Pause)):
		return true
	}
}

func (p *peerPlayer) visitOnce(to netip.AddrPort, i int, come *atomic.Int64) {
	c, err := dialTo(to, i%8 == 7)
	if err != nil {
		p.fail("new connection to %s: %v", to, err)
		return
	}
	defer c.Close()
	come.Add(1)
	stream := uint64(i)
	if err := talkOnce(c, &stream, 10); err != nil {
		p.fail("new connection to %s: %v", to, err)
	}
	if peer, err := peerOf(c); err != nil || peer != to {
		p.fail("getpeername of a new connection to %s: %s, %v", to, peer, err)
	}
}

// talkOnce sends numbers and wants them back.
func talkOnce(c net.Conn, stream *uint64, n int) error {
	var b []byte
	for range n {
		b = binary.BigEndian.AppendUint64(b, *stream)
		*stream += 7919
	}
	if _, err := c.Write(b); err != nil {
		return err
	}
	got := make([]byte, len(b))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != string(b) {
		return fmt.Errorf("the answer is another: %x, want %x", got[:16], b[:16])
	}
	return nil
}

// peerOf asks the kernel: Go remembers what it has connected to.
func peerOf(c *net.TCPConn) (peer netip.AddrPort, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return peer, err
	}
	control := raw.Control(func(fd uintptr) {
		var sa unix.Sockaddr
		if sa, err = unix.Getpeername(int(fd)); err != nil {
			return
		}
		if v4, ok := sa.(*unix.SockaddrInet4); ok {
			peer = netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), uint16(v4.Port))
		}
	})
	if control != nil {
		return peer, control
	}
	return peer, err
}
