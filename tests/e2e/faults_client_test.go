package e2e

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
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// envClient holds the job of a client process, and makes this test binary one.
const envClient = "PILLION_TEST_CLIENT"

// job is what a client process does: it connects over and over, each worker for
// itself, until its stdin ends.
type job struct {
	Targets []netip.AddrPort // taken in turn
	Workers int
	Pause   time.Duration // of a worker between two connections
	Count   int           // connections in all; 0: no end
	// Listen are the addresses that the client itself listens on, as the
	// application that dials the port that it serves.
	Listen []netip.AddrPort
	// Patience is how long an open connection may take to be served.
	Patience time.Duration
	// Limit is how long connect(2) may go without a result; then the connection
	// has failed. 0: connectLimit.
	Limit time.Duration
}

// connectLimit is what job.Limit is by itself: less than the kernel waits before
// it sends a SYN again.
const connectLimit = time.Second

// outcome is what became of one connection. Times are CLOCK_MONOTONIC, in ns,
// which all processes share.
type outcome struct {
	Start int64 // connect(2) is called
	Took  int64 // until its result
	Done  int64 // the connection is closed
	To    netip.AddrPort
	Errno string         // of connect, "" if it is established
	Local netip.AddrPort // own address
	Peer  netip.AddrPort // what getpeername says
	// Said is what the server said: its name and whom it sees. Empty if
	// nothing came.
	Said string
	Read string // why nothing came
}

// selfName is what the client says to those who connect to it.
const selfName = "self"

func (o *outcome) String() string {
	return fmt.Sprintf("start %v to %s: errno %q after %v, heard %q %s", time.Duration(o.Start), o.To, o.Errno, time.Duration(o.Took), o.Said, o.Read)
}

// connected tells whether connect succeeded within its limit.
func (o *outcome) connected() bool { return o.Errno == "" }

// reset tells whether connect saw a connection that was established and reset
// before it returned: accepted, that is. A SYN that is answered by a reset gives
// ECONNREFUSED.
func (o *outcome) reset() bool { return o.Errno == unix.ErrnoName(unix.ECONNRESET) }

func (o *outcome) refused() bool { return o.Errno == unix.ErrnoName(unix.ECONNREFUSED) }

// served tells whether the server answered.
func (o *outcome) served() bool { return o.connected() && o.Said != "" }

// passed tells whether the server saw the application's own socket, and relayed
// whether it saw another.
func (o *outcome) passed() bool {
	return o.served() && strings.HasSuffix(o.Said, " "+o.Local.String())
}
func (o *outcome) relayed() bool { return o.served() && !o.passed() }

func now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err)
	}
	return ts.Nano()
}

// introduce is a server that says its name and whom it sees, and then repeats
// what it hears.
func introduce(name string) func(net.Conn) {
	return func(c net.Conn) {
		fmt.Fprintf(c, "%s %s\n", name, c.RemoteAddr())
		io.Copy(c, c)
	}
}

// TestClientProcess is the client process. As a test it does nothing.
func TestClientProcess(t *testing.T) {
	text := os.Getenv(envClient)
	if text == "" {
		return
	}
	var j job
	err := json.Unmarshal([]byte(text), &j)
	if err == nil {
		err = j.work(os.Stdin, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// work writes one line of JSON for each outcome.
func (j *job) work(stop io.Reader, to io.Writer) error {
	for _, a := range j.Listen {
		network := "tcp6"
		if a.Addr().Is4() {
			network = "tcp4"
		}
		ln, err := net.Listen(network, a.String())
		if err != nil {
			return err
		}
		go answer(ln)
	}
	var ended atomic.Bool
	go func() {
		io.Copy(io.Discard, stop)
		ended.Store(true)
	}()
	out := json.NewEncoder(to)
	var mu sync.Mutex
	var started atomic.Int64
	var all sync.WaitGroup
	for range j.Workers {
		all.Go(func() {
			for !ended.Load() {
				n := started.Add(1)
				if j.Count > 0 && n > int64(j.Count) {
					return
				}
				o := j.attempt(j.Targets[int(n)%len(j.Targets)])
				mu.Lock()
				out.Encode(&o)
				mu.Unlock()
				time.Sleep(j.Pause)
			}
		})
	}
	all.Wait()
	return nil
}

func answer(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			introduce(selfName)(c)
		}()
	}
}

// attempt makes one connection, by system calls: a library might try again.
func (j *job) attempt(to netip.AddrPort) (o outcome) {
	o.To = to
	family := unix.AF_INET6
	var sa unix.Sockaddr = &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}
	if to.Addr().Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		o.Errno = "socket: " + err.Error()
		return o
	}
	defer func() {
		unix.Close(fd)
		o.Done = now()
	}()
	o.Start = now()
	err = unix.Connect(fd, sa)
	if errors.Is(err, unix.EINPROGRESS) {
		err = result(fd, j.Limit)
	}
	o.Took = now() - o.Start
	if err != nil {
		o.Errno = errnoName(err)
		return o
	}
	o.Local, o.Peer = sockname(unix.Getsockname(fd)), sockname(unix.Getpeername(fd))
	o.Said, o.Read = hear(fd, j.Patience)
	return o
}

func errnoName(err error) string {
	if e, ok := errors.AsType[unix.Errno](err); ok {
		return unix.ErrnoName(e)
	}
	return err.Error()
}

// result waits for the end of a connect.
func result(fd int, limit time.Duration) error {
	if err := wait(fd, unix.POLLOUT, limit); err != nil {
		return err
	}
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && n != 0 {
		err = unix.Errno(n)
	}
	return err
}

func wait(fd int, events int16, limit time.Duration) error {
	for end := time.Now().Add(limit); ; {
		ready := []unix.PollFd{{Fd: int32(fd), Events: events}}
		n, err := unix.Poll(ready, max(int(time.Until(end).Milliseconds()), 0))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n > 0:
			return nil
		case !time.Now().Before(end):
			return errors.New("no result")
		}
	}
}

func hear(fd int, patience time.Duration) (said, why string) {
	var line []byte
	for end := time.Now().Add(patience); ; {
		if err := wait(fd, unix.POLLIN, time.Until(end)); err != nil {
			return "", errnoName(err)
		}
		buf := make([]byte, 256)
		n, err := unix.Read(fd, buf)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return "", errnoName(err)
		case n == 0:
			return "", "EOF"
		}
		line = append(line, buf[:n]...)
		if text, ok := strings.CutSuffix(string(line), "\n"); ok {
			return text, ""
		}
	}
}

func sockname(sa unix.Sockaddr, err error) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// load is a client process at work, and what it has seen so far.
type load struct {
	cmd  *exec.Cmd
	quit io.Closer
	done chan struct{}
	err  error
	errs rig.Log

	mu  sync.Mutex
	all []outcome
}

// startLoad starts a client as an application. It ends with the test at the
// latest.
func startLoad(t testing.TB, r *rig.Rig, j job) *load {
	t.Helper()
	return startLoadAt(t, testutil.Place{NS: r.App, Cgroup: r.Scope}, j)
}

func startLoadAt(t testing.TB, place testutil.Place, j job, wrap ...string) *load {
	t.Helper()
	if j.Patience == 0 {
		j.Patience = 2 * time.Second
	}
	if j.Limit == 0 {
		j.Limit = connectLimit
	}
	text, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	args := append(wrap, self, "-test.run=^TestClientProcess$")
	l := &load{cmd: exec.Command(args[0], args[1:]...), done: make(chan struct{})}
	l.cmd.Env = append(os.Environ(), envClient+"="+string(text))
	l.cmd.Stderr = &l.errs
	stdin, err := l.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	l.quit = stdin
	stdout, err := l.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := place.Start(l.cmd); err != nil {
		t.Fatal(err)
	}
	go l.collect(stdout)
	t.Cleanup(func() {
		l.quit.Close()
		<-l.done
	})
	return l
}

func (l *load) collect(from io.Reader) {
	defer close(l.done)
	lines := bufio.NewScanner(from)
	for lines.Scan() {
		var o outcome
		if err := json.Unmarshal(lines.Bytes(), &o); err != nil {
			l.err = err
			continue
		}
		l.mu.Lock()
		l.all = append(l.all, o)
		l.mu.Unlock()
	}
	l.err = errors.Join(l.err, l.cmd.Wait())
}

// since returns the outcomes of what was started at or after a time.
func (l *load) since(start int64) []outcome {
	l.mu.Lock()
	defer l.mu.Unlock()
	var some []outcome
	for _, o := range l.all {
		if o.Start >= start {
			some = append(some, o)
		}
	}
	return some
}

// stop ends the client and returns all outcomes.
func (l *load) stop(t testing.TB) []outcome {
	t.Helper()
	l.quit.Close()
	return l.finish(t)
}

// finish waits until the client ends by itself.
func (l *load) finish(t testing.TB) []outcome {
	t.Helper()
	select {
	case <-l.done:
	case <-time.After(2 * rig.Limit):
		l.quit.Close()
		t.Fatal("the client does not end")
	}
	if l.err != nil {
		t.Fatalf("client: %v\n%s", l.err, l.errs.String())
	}
	return l.all
}

// becomes waits until enough connections in a row, all started after now, come
// out as wanted.
func (l *load) becomes(t testing.TB, what string, want func(*outcome) bool) {
	t.Helper()
	const enough = 20
	start := now()
	testutil.Eventually(t, rig.Limit, func() bool {
		some := l.since(start)
		if len(some) < enough {
			return false
		}
		for _, o := range some[len(some)-enough:] {
			if !want(&o) {
				return false
			}
		}
		return true
	}, "connections are ", what, last{l})
}

// last prints the last outcomes, when it is printed.
type last struct{ l *load }

func (s last) String() string {
	all := s.l.since(0)
	var b strings.Builder
	for _, o := range all[max(0, len(all)-10):] {
		fmt.Fprintf(&b, "\n%s", &o)
	}
	return b.String() + s.l.errs.String()
}
