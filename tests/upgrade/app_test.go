package upgrade

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
)

// envApp makes this test binary the application; it is what it is told to do.
const envApp = "PILLION_TEST_UPGRADE_APP"

// task is what the application does, until its stdin ends.
type task struct {
	To netip.AddrPort
	// Conns is how many connections stay, Come how many workers make new ones.
	Conns, Come int
}

// outcome is what became of it.
type outcome struct {
	// Conns are those that stay, by number; New counts the others.
	Conns map[uint32]conn
	New   int
	Errs  []string
	// Slowest is, of each echoing connection, the longest answer in each turn, in µs.
	Slowest []int64
	Rounds  int
}

type conn struct {
	counts
	Kind kind
	// Port is its own.
	Port uint16
}

// app is the application, in the scope.
type app struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *json.Decoder
}

// newApp starts the application and waits until all connections that stay are there.
func newApp(t testing.TB, r *rig.Rig, q task) *app {
	t.Helper()
	line, err := json.Marshal(q)
	if err != nil {
		t.Fatal(err)
	}
	a := &app{cmd: r.Command(os.Args[0], "-test.run=^TestApplication$")}
	a.cmd.Env = append(os.Environ(), envApp+"="+string(line))
	a.cmd.Stderr = os.Stderr
	if a.in, err = a.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := a.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	a.out = json.NewDecoder(out)
	if err := r.Start(a.cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.in.Close()
		a.cmd.Wait()
	})
	a.hear(t)
	return a
}

// hear reads what the application says.
func (a *app) hear(t testing.TB) (o outcome) {
	t.Helper()
	if err := a.out.Decode(&o); err != nil {
		t.Fatalf("the application: %v", err)
	}
	for _, e := range o.Errs {
		t.Errorf("application: %s", e)
	}
	return o
}

// turn ends a turn of the measurement: the slowest answers since the last one.
func (a *app) turn(t testing.TB) outcome {
	t.Helper()
	if _, err := fmt.Fprintln(a.in, "turn"); err != nil {
		t.Fatal(err)
	}
	return a.hear(t)
}

// end has the connections end, and returns what became of all.
func (a *app) end(t testing.TB) outcome {
	t.Helper()
	if _, err := fmt.Fprintln(a.in, "end"); err != nil {
		t.Fatal(err)
	}
	return a.hear(t)
}

// TestApplication is the application. As a test it does nothing.
func TestApplication(*testing.T) {
	text := os.Getenv(envApp)
	if text == "" {
		return
	}
	p := &player{end: make(chan struct{}), conns: map[uint32]conn{}}
	if err := json.Unmarshal([]byte(text), &p.task); err != nil {
		panic(err)
	}
	out := json.NewEncoder(os.Stdout)
	p.begin()
	out.Encode(p.outcome(false))
	for {
		var word string
		if _, err := fmt.Scanln(&word); err != nil {
			os.Exit(0)
		}
		if word == "end" {
			close(p.end)
			p.all.Wait()
		}
		out.Encode(p.outcome(word == "end"))
	}
}

// player is what the application does.
type player struct {
	task
	end  chan struct{}
	all  sync.WaitGroup
	come atomic.Int64

	mu     sync.Mutex
	conns  map[uint32]conn
	errs   []string
	slow   []*atomic.Int64
	rounds atomic.Int64
}

func (p *player) outcome(last bool) outcome {
	p.mu.Lock()
	defer p.mu.Unlock()
	o := outcome{New: int(p.come.Load()), Errs: p.errs, Rounds: int(p.rounds.Swap(0))}
	p.errs = nil
	if last {
		o.Conns = p.conns
	}
	for _, s := range p.slow {
		o.Slowest = append(o.Slowest, s.Swap(0))
	}
	return o
}

func (p *player) fail(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.errs) < 20 {
		p.errs = append(p.errs, fmt.Sprintf(format, args...))
	}
}

// kindOf spreads the kinds: most echo, and some of each other kind.
func kindOf(n int) kind {
	switch m := n % 100; {
	case m < 4:
		return kindDuplex
	case m < 7:
		return kindHalf
	case m < 10:
		return kindHalfFar
	case m == 10:
		return kindBlocked
	case m == 11:
		return kindStuffed
	case m < 20:
		return kindIdle
	case m < 24:
		return kindUrgent
	default:
		return kindEcho
	}
}

// begin opens everything and returns when it is open.
func (p *player) begin() {
	var opened sync.WaitGroup
	for n := range p.Conns {
		opened.Add(1)
		slow := new(atomic.Int64)
		k := kindOf(n)
		if k == kindEcho {
			p.slow = append(p.slow, slow)
		}
		p.all.Go(func() { p.stay(head{k, uint32(n)}, slow, opened.Done) })
		if n%50 == 49 {
			opened.Wait() // not all at once
		}
	}
	opened.Wait()
	for n := range p.Come {
		p.all.Go(func() { p.visit(n) })
	}
}

func (p *player) stay(h head, slow *atomic.Int64, opened func()) {
	c, err := net.DialTimeout("tcp", p.To.String(), rig.Limit)
	if err == nil {
		_, err = c.Write(h.bytes())
	}
	opened()
	if err != nil {
		p.fail("open connection %d: %v", h.ID, err)
		return
	}
	defer c.Close()
	up, down := toServer(h.ID), toApp(h.ID)
	if err := p.play(c, h, &up, &down, slow); err != nil {
		p.fail("connection %d (%c): %v", h.ID, h.Kind, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns[h.ID] = conn{counts{up.at, down.at}, h.Kind, uint16(c.LocalAddr().(*net.TCPAddr).Port)}
}

func (p *player) play(c net.Conn, h head, up, down *stream, slow *atomic.Int64) error {
	buf := make([]byte, 16<<10)
	finish := func() error { return errors.Join(c.(*net.TCPConn).CloseWrite(), down.drain(c, buf)) }
	switch h.Kind {
	case kindIdle:
		<-p.end
		return errors.Join(exchange(c, up, down, buf, 100), finish())
	case kindHalf:
		return errors.Join(up.send(c, buf, 1000), finish())
	case kindBlocked:
		if err := up.send(c, buf, 10); err != nil {
			return err
		}
		<-p.end
		return finish()
	case kindStuffed:
		return errors.Join(up.send(c, buf, stuffing), finish())
	case kindHalfFar:
		if err := down.drain(c, buf); err != nil {
			return err
		}
		return errors.Join(pace(p.end, func(n int) error { return up.send(c, buf, n) }), finish())
	case kindDuplex:
		read := make(chan error, 1)
		go func() { read <- down.drain(c, make([]byte, 16<<10)) }()
		err := pace(p.end, func(n int) error { return up.send(c, buf, n) })
		return errors.Join(err, c.(*net.TCPConn).CloseWrite(), <-read)
	default:
		return errors.Join(p.talk(c, h, up, down, buf, slow), finish())
	}
}

// talkEvery is how long an echoing connection waits for its next message.
const talkEvery = 250 * time.Millisecond

// talk exchanges messages until the end.
func (p *player) talk(c net.Conn, h head, up, down *stream, buf []byte, slow *atomic.Int64) error {
	time.Sleep(time.Duration(h.ID) * talkEvery / 1000) // not all at once
	for n := int(h.ID) + 1; ; n = n*7%3001 + 1 {
		if h.Kind == kindUrgent && n%3 == 0 {
			if err := sendUrgent(c); err != nil {
				return fmt.Errorf("send urgent byte: %w", err)
			}
		}
		start := time.Now()
		if err := exchange(c, up, down, buf, n); err != nil {
			return err
		}
		p.rounds.Add(1)
		if took := time.Since(start).Microseconds(); took > slow.Load() {
			slow.Store(took)
		}
		select {
		case <-p.end:
			return nil
		case <-time.After(talkEvery):
		}
	}
}

// exchange sends n bytes and receives as many.
func exchange(c net.Conn, up, down *stream, buf []byte, n int) error {
	if err := up.send(c, buf, n); err != nil {
		return err
	}
	return down.receive(c, buf, n)
}

// visit makes new connections until the end.
func (p *player) visit(worker int) {
	buf := make([]byte, 4096)
	for n := 0; ; n++ {
		select {
		case <-p.end:
			return
		case <-time.After(10 * time.Millisecond):
		}
		h := head{kindEcho, uint32(1_000_000 + worker*100_000 + n)}
		c, err := net.DialTimeout("tcp", p.To.String(), rig.Limit)
		if err != nil {
			p.fail("new connection %d: %v", h.ID, err)
			continue
		}
		p.come.Add(1)
		up, down := toServer(h.ID), toApp(h.ID)
		_, err = c.Write(h.bytes())
		if err == nil {
			err = exchange(c, &up, &down, buf, n%2000+1)
		}
		if err == nil {
			err = errors.Join(c.(*net.TCPConn).CloseWrite(), down.drain(c, buf))
		}
		if err != nil {
			p.fail("new connection %d: %v", h.ID, err)
		}
		c.Close()
	}
}
