package live

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"golang.org/x/sys/unix"
)

// envApp makes this test binary the application.
const envApp = "PILLION_TEST_LIVE_APP"

// request is what the application is told to do, one line of JSON each.
type request struct {
	Do string // dial, open, talk, end, load, unload
	To []netip.AddrPort
	// ID names a connection that stays open.
	ID string
	// Workers connect at once; Open connections stay and repeat checked bytes.
	Workers, Open int
}

// result is what became of it.
type result struct {
	// Name is what the server called itself, Errno why there is none.
	Name, Errno string
	Load        *totals
}

// totals are what a load came to.
type totals struct {
	// Connects counts new connections that were served, by server, and Rounds
	// those of the bytes on the open ones.
	Connects map[string]int
	Rounds   int
	// Failed are what did not go well: new connections, and open ones.
	Failed, Broken []string
}

// app is the application, in the scope.
type app struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *json.Decoder
}

func newApp(t testing.TB, r *rig.Rig) *app {
	t.Helper()
	a := &app{cmd: r.Command(os.Args[0], "-test.run=^TestApplication$")}
	a.cmd.Env = append(os.Environ(), envApp+"=1")
	a.cmd.Stderr = os.Stderr
	var err error
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
	t.Cleanup(a.end)
	return a
}

func (a *app) end() {
	a.in.Close()
	a.cmd.Wait()
}

func (a *app) do(t testing.TB, q request) result {
	t.Helper()
	line, err := json.Marshal(q)
	if err != nil {
		t.Fatal(err)
	}
	var r result
	if _, err := fmt.Fprintf(a.in, "%s\n", line); err != nil {
		t.Fatal(err)
	}
	if err := a.out.Decode(&r); err != nil {
		t.Fatal(err)
	}
	return r
}

// dial connects once, and returns the server's name or the errno.
func (a *app) dial(t testing.TB, to netip.AddrPort) string {
	t.Helper()
	r := a.do(t, request{Do: "dial", To: []netip.AddrPort{to}})
	return r.Name + r.Errno
}

// open connects, and keeps the connection.
func (a *app) open(t testing.TB, id string, to netip.AddrPort) string {
	t.Helper()
	r := a.do(t, request{Do: "open", ID: id, To: []netip.AddrPort{to}})
	return r.Name + r.Errno
}

// talk sends bytes on an open connection, and returns why they do not come back;
// empty: they do.
func (a *app) talk(t testing.TB, id string) string {
	t.Helper()
	return a.do(t, request{Do: "talk", ID: id}).Errno
}

// ended waits until an open connection ends, and returns how.
func (a *app) ended(t testing.TB, id string) string {
	t.Helper()
	return a.do(t, request{Do: "end", ID: id}).Errno
}

// load connects all the time, until unload.
func (a *app) load(t testing.TB, workers, open int, to ...netip.AddrPort) {
	t.Helper()
	a.do(t, request{Do: "load", To: to, Workers: workers, Open: open})
}

// unload ends the load, of which nothing may have failed.
func (a *app) unload(t testing.TB) *totals {
	t.Helper()
	l := a.do(t, request{Do: "unload"}).Load
	for _, text := range l.Failed {
		t.Errorf("a new connection failed: %s", text)
	}
	for _, text := range l.Broken {
		t.Errorf("an open connection failed: %s", text)
	}
	return l
}

// TestApplication is the application. As a test it does nothing.
func TestApplication(*testing.T) {
	if os.Getenv(envApp) == "" {
		return
	}
	p := player{conns: map[string]net.Conn{}}
	in := json.NewDecoder(os.Stdin)
	out := json.NewEncoder(os.Stdout)
	for {
		var q request
		if err := in.Decode(&q); err != nil {
			os.Exit(0)
		}
		if err := out.Encode(p.play(q)); err != nil {
			os.Exit(1)
		}
	}
}

// player does what the application is told to.
type player struct {
	conns map[string]net.Conn
	stop  chan struct{}
	load  sync.WaitGroup
	mu    sync.Mutex // guards sum
	sum   totals
}

func (p *player) play(q request) result {
	switch q.Do {
	case "dial":
		c, r := connect(q.To[0])
		if c != nil {
			c.Close()
		}
		return r
	case "open":
		c, r := connect(q.To[0])
		if c != nil {
			p.conns[q.ID] = c
		}
		return r
	case "talk":
		return result{Errno: errnoOf(repeat(p.conns[q.ID], "ping"))}
	case "end":
		c := p.conns[q.ID]
		c.SetReadDeadline(time.Now().Add(rig.Limit))
		_, err := io.Copy(io.Discard, c)
		if err == nil {
			err = io.EOF
		}
		return result{Errno: errnoOf(err)}
	case "load":
		p.stop = make(chan struct{})
		p.sum = totals{Connects: map[string]int{}}
		var opened sync.WaitGroup
		for n := range q.Open {
			opened.Add(1)
			p.load.Go(func() { p.stay(q.To[n%len(q.To)], &opened) })
		}
		opened.Wait()
		for n := range q.Workers {
			p.load.Go(func() { p.come(q.To, n) })
		}
		return result{}
	default:
		close(p.stop)
		p.load.Wait()
		return result{Load: &p.sum}
	}
}

// come connects over and over.
func (p *player) come(to []netip.AddrPort, n int) {
	for ; !p.stopped(); n++ {
		c, r := connect(to[n%len(to)])
		p.mu.Lock()
		if r.Errno != "" {
			p.sum.Failed = add(p.sum.Failed, fmt.Sprintf("%s: %s", to[n%len(to)], r.Errno))
		} else {
			p.sum.Connects[r.Name]++
		}
		p.mu.Unlock()
		if c != nil {
			c.Close()
		}
		time.Sleep(3 * time.Millisecond) // the load is not what is tested
	}
}

// stay keeps a connection and repeats checked bytes on it.
func (p *player) stay(to netip.AddrPort, opened *sync.WaitGroup) {
	c, r := connect(to)
	opened.Done()
	rounds := 0
	var err error
	if c == nil {
		err = errors.New(r.Errno)
	}
	for ; err == nil && !p.stopped(); rounds++ {
		err = repeat(c, fmt.Sprintf("%s %d", strings.Repeat("x", rounds%4000), rounds))
		time.Sleep(2 * time.Millisecond)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sum.Rounds += rounds
	if err != nil {
		p.sum.Broken = add(p.sum.Broken, fmt.Sprintf("%s (%s) after %d rounds: %v", to, r.Name, rounds, err))
	}
	if c != nil {
		c.Close()
	}
}

func (p *player) stopped() bool {
	select {
	case <-p.stop:
		return true
	default:
		return false
	}
}

// add keeps the first few.
func add(all []string, text string) []string {
	if len(all) < 10 {
		return append(all, text)
	}
	return all
}

// connect connects and hears the server's name.
func connect(to netip.AddrPort) (net.Conn, result) {
	c, err := net.DialTimeout("tcp", to.String(), rig.Limit)
	if err != nil {
		return nil, result{Errno: errnoOf(err)}
	}
	c.SetDeadline(time.Now().Add(rig.Limit))
	name := make([]byte, 0, 64)
	for b := make([]byte, 1); !slices.Contains(name, '\n'); name = append(name, b[0]) {
		if _, err := c.Read(b); err != nil {
			c.Close()
			return nil, result{Errno: "connected, then " + errnoOf(err)}
		}
	}
	c.SetDeadline(time.Time{})
	return c, result{Name: strings.TrimSpace(string(name))}
}

// repeat sends a line that must come back.
func repeat(c net.Conn, line string) error {
	c.SetDeadline(time.Now().Add(rig.Limit))
	if _, err := fmt.Fprintln(c, line); err != nil {
		return err
	}
	got := make([]byte, len(line)+1)
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != line+"\n" {
		return fmt.Errorf("sent %.40q, got %.40q", line, got)
	}
	return nil
}

func errnoOf(err error) string {
	var errno unix.Errno
	switch {
	case err == nil:
		return ""
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "EOF"
	default:
		return err.Error()
	}
}

// server is one that can go away and come back.
type server struct {
	at    netip.AddrPort
	ln    net.Listener
	conns sync.Map
	all   sync.WaitGroup
}

// newServer says its address to whoever comes, and repeats what it hears.
func newServer(t testing.TB, r *rig.Rig, at netip.AddrPort) *server {
	t.Helper()
	s := &server{at: at}
	s.start(t, r)
	t.Cleanup(s.stop)
	return s
}

func (s *server) start(t testing.TB, r *rig.Rig) {
	t.Helper()
	s.ln = r.Listen(t, s.at)
	ln := s.ln
	s.all.Go(func() { s.accept(ln) })
}

func (s *server) accept(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		s.conns.Store(c, nil)
		s.all.Go(func() { s.serve(c) })
	}
}

func (s *server) serve(c net.Conn) {
	defer s.conns.Delete(c)
	defer c.Close()
	w := bufio.NewWriter(c)
	fmt.Fprintln(w, s.at)
	if w.Flush() == nil {
		io.Copy(c, c)
	}
}

// refuse closes the port; open connections go on.
func (s *server) refuse() { s.ln.Close() }

// stop ends all.
func (s *server) stop() {
	s.ln.Close()
	s.conns.Range(func(c, _ any) bool { c.(net.Conn).Close(); return true })
	s.all.Wait()
}
