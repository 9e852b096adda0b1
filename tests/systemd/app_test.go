package systemd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

const (
	// envApp makes this test binary the application: it listens for orders there.
	envApp = "PILLION_TEST_SYSTEMD_APP"
	// envFirst is where the application connects before anything else, and envLast
	// where it does when it is told to end.
	envFirst = "PILLION_TEST_SYSTEMD_FIRST"
	envLast  = "PILLION_TEST_SYSTEMD_LAST"
)

// order is what the application is told to do, one line of JSON each.
type order struct {
	Do string // dial, open, talk, ended, close, load, unload, first
	To []netip.AddrPort
	// ID names a connection that stays open.
	ID string
	// Workers connect at once; Open connections stay, with checked bytes both ways.
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
	Connects map[string]int // by server
	Bytes    int64          // that came back on the open ones
	// Longest is the longest time in which nothing came back on one of these.
	Longest time.Duration
	// Failed are what did not go well: new connections, and open ones.
	Failed, Broken []string
}

// app is the application of one service, from the test's side.
type app struct {
	conn net.Conn
	out  *json.Decoder
}

// service writes a unit for the application, called name, with these lines in
// [Service] besides; it does not start it.
func (m *machine) service(t testing.TB, name string, lines ...string) {
	t.Helper()
	m.write(t, units+"/"+name, fmt.Sprintf(`[Unit]
Description=An application
StartLimitIntervalSec=0
[Service]
Type=exec
ExecStart=/usr/local/bin/application -test.run=^TestApplication$
Environment=%s=/run/%s.sock
%s
`, envApp, name, strings.Join(lines, "\n")))
}

// app connects to the application that a service runs.
func (m *machine) app(t testing.TB, name string) *app {
	t.Helper()
	a := &app{}
	testutil.Eventually(t, rig.Limit, func() bool {
		var err error
		a.conn, err = net.Dial("unix", m.path(filepath.Join("/run", name+".sock")))
		return err == nil
	}, name, " listens")
	a.out = json.NewDecoder(a.conn)
	t.Cleanup(func() { a.conn.Close() })
	return a
}

func (a *app) do(t testing.TB, o order) result {
	t.Helper()
	var r result
	a.conn.SetDeadline(time.Now().Add(2 * rig.Limit))
	if err := json.NewEncoder(a.conn).Encode(o); err != nil {
		t.Fatalf("order %s: %v", o.Do, err)
	}
	if err := a.out.Decode(&r); err != nil {
		t.Fatalf("order %s: %v", o.Do, err)
	}
	return r
}

// dial connects once, and returns the server's name or the errno.
func (a *app) dial(t testing.TB, to netip.AddrPort) string {
	t.Helper()
	r := a.do(t, order{Do: "dial", To: []netip.AddrPort{to}})
	return r.Name + r.Errno
}

// open connects, and keeps the connection.
func (a *app) open(t testing.TB, id string, to netip.AddrPort) string {
	t.Helper()
	r := a.do(t, order{Do: "open", ID: id, To: []netip.AddrPort{to}})
	return r.Name + r.Errno
}

// talk sends bytes on an open connection, and returns why they do not come back;
// empty: they do.
func (a *app) talk(t testing.TB, id string) string {
	t.Helper()
	return a.do(t, order{Do: "talk", ID: id}).Errno
}

// ended waits until an open connection ends, and returns how.
func (a *app) ended(t testing.TB, id string) string {
	t.Helper()
	return a.do(t, order{Do: "ended", ID: id}).Errno
}

// load connects all the time, until unload.
func (a *app) load(t testing.TB, workers, open int, to ...netip.AddrPort) {
	t.Helper()
	a.do(t, order{Do: "load", To: to, Workers: workers, Open: open})
}

// unload ends the load.
func (a *app) unload(t testing.TB) *totals {
	t.Helper()
	return a.do(t, order{Do: "unload"}).Load
}

// TestApplication is the application. As a test it does nothing.
func TestApplication(*testing.T) {
	path := os.Getenv(envApp)
	if path == "" {
		return
	}
	p := player{conns: map[string]net.Conn{}}
	if to := os.Getenv(envFirst); to != "" {
		var c net.Conn
		if c, p.first = connect(netip.MustParseAddrPort(to)); c != nil {
			c.Close()
		}
	}
	if to := os.Getenv(envLast); to != "" {
		told := make(chan os.Signal, 1)
		signal.Notify(told, unix.SIGTERM)
		go func() {
			<-told
			_, r := connect(netip.MustParseAddrPort(to))
			fmt.Println("last:", r.Name+r.Errno)
			os.Exit(0)
		}()
	}
	_ = os.Remove(path)
	ln, err := net.Listen("unix", path)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for {
		c, err := ln.Accept()
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		p.serve(c)
	}
}

// player does what the application is told to.
type player struct {
	first result
	conns map[string]net.Conn
	stop  chan struct{}
	load  sync.WaitGroup
	mu    sync.Mutex // guards sum
	sum   totals
}

func (p *player) serve(c net.Conn) {
	defer c.Close()
	in, out := json.NewDecoder(c), json.NewEncoder(c)
	for {
		var o order
		if in.Decode(&o) != nil || out.Encode(p.play(o)) != nil {
			return
		}
	}
}

func (p *player) play(o order) result {
	switch o.Do {
	case "first":
		return p.first
	case "dial":
		c, r := connect(o.To[0])
		if c != nil {
			c.Close()
		}
		return r
	case "open":
		c, r := connect(o.To[0])
		if c != nil {
			p.conns[o.ID] = c
		}
		return r
	case "talk":
		return result{Errno: errnoOf(repeat(p.conns[o.ID], "ping"))}
	case "ended":
		c := p.conns[o.ID]
		c.SetReadDeadline(time.Now().Add(rig.Limit))
		_, err := io.Copy(io.Discard, c)
		if err == nil {
			err = io.EOF
		}
		c.Close()
		return result{Errno: errnoOf(err)}
	case "close":
		p.conns[o.ID].Close()
		return result{}
	case "load":
		p.stop = make(chan struct{})
		p.sum = totals{Connects: map[string]int{}}
		var opened sync.WaitGroup
		for n := range o.Open {
			opened.Add(1)
			p.load.Go(func() { p.stay(o.To[n%len(o.To)], uint64(n), &opened) })
		}
		opened.Wait()
		for n := range o.Workers {
			p.load.Go(func() { p.come(o.To, n) })
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

// stay keeps a connection, and sends bytes all the time that must come back as they
// were: both directions are never idle.
func (p *player) stay(to netip.AddrPort, seed uint64, opened *sync.WaitGroup) {
	c, r := connect(to)
	opened.Done()
	if c == nil {
		p.broke("%s: %s", to, r.Errno)
		return
	}
	defer c.Close()
	var sent atomic.Int64
	writes := make(chan error, 1)
	go func() { writes <- p.send(c, seed, &sent) }()
	got, longest, err := check(c, seed)
	if werr := <-writes; werr != nil {
		p.broke("%s (%s): write after %d bytes: %v", to, r.Name, sent.Load(), werr)
	}
	if err != nil || got != sent.Load() {
		p.broke("%s (%s): read %d bytes of %d: %v", to, r.Name, got, sent.Load(), err)
	}
	p.mu.Lock()
	p.sum.Bytes += got
	p.sum.Longest = max(p.sum.Longest, longest)
	p.mu.Unlock()
}

func (p *player) broke(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sum.Broken = add(p.sum.Broken, fmt.Sprintf(format, args...))
}

// send writes the bytes of a seed until it is told to stop, and then the end of
// file.
func (p *player) send(c net.Conn, seed uint64, sent *atomic.Int64) error {
	next := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	for b := make([]byte, 3001); !p.stopped(); time.Sleep(2 * time.Millisecond) {
		next.Read(b)
		n, err := c.Write(b)
		sent.Add(int64(n))
		if err != nil {
			return err
		}
	}
	return c.(*net.TCPConn).CloseWrite()
}

// check reads the bytes of a seed until the end of file.
func check(c net.Conn, seed uint64) (n int64, longest time.Duration, err error) {
	next := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	got, want := make([]byte, 64<<10), make([]byte, 64<<10)
	last := time.Now()
	for {
		c.SetReadDeadline(time.Now().Add(rig.Limit))
		k, err := c.Read(got)
		longest, last = max(longest, time.Since(last)), time.Now()
		next.Read(want[:k])
		if string(got[:k]) != string(want[:k]) {
			return n, longest, fmt.Errorf("other bytes came back after %d", n)
		}
		n += int64(k)
		switch {
		case errors.Is(err, io.EOF):
			return n, longest, nil
		case err != nil:
			return n, longest, err
		}
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
	c, err := net.DialTimeout("tcp", to.String(), 5*time.Second)
	if err != nil {
		return nil, result{Errno: errnoOf(err)}
	}
	c.SetDeadline(time.Now().Add(rig.Limit))
	var name []byte
	for b := make([]byte, 1); len(name) == 0 || name[len(name)-1] != '\n'; name = append(name, b[0]) {
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
