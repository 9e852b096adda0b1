package failure

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// envApp makes this test binary an application: it does what it is told on
// stdin, and says what it saw on stdout. The value is the first of its ports.
const envApp = "PILLION_FAILURE_APP"

// word is what became of a connection. The list is closed.
type word string

const (
	// Of new connections.
	carried word = "carried" // by the handler
	direct  word = "direct"  // by the kernel, to an endpoint
	passed  word = "passed"  // by the kernel, to where it was going
	refused word = "refused" // at once
	// Of open ones.
	unaffected word = "unaffected" // bytes go both ways while the fault lasts
	waits      word = "waits"      // none do, and all that were sent arrive afterwards
	// Of both.
	reset  word = "reset"
	silent word = "silent" // no answer in the application's patience
	failed word = "failed" // with another error
	// Never: bytes that are missing or too many, or somebody else answers.
	lost word = "lost"
	// Never: an end of file, as if that had been all.
	finished word = "finished"
)

// words is the list.
var words = []word{carried, direct, passed, refused, unaffected, waits, reset, silent, failed, lost, finished}

// What servers call themselves: who is at the address that was asked for, and
// who is an endpoint.
const (
	origin   = "origin"
	endpoint = "endpoint"
	// The application itself, on the ports that it dials.
	itself = "itself"
)

// The application's ports, which it binds itself. The system gives others, to the
// handler too: by chance one of its sockets had the very address of the
// application's otherwise, and nobody could tell the two apart.
const firstPort, portCount = 12000, 20000

// order is what an application is told.
type order struct {
	ID int
	// Do is stream, quiet, try, open, ask, close or reset.
	Do string
	To []netip.AddrPort // taken in turn
	// Key names the connections of open, ask, close and reset, and what is streamed.
	Key      string
	Count    int
	Every    time.Duration // of a stream
	Patience time.Duration
}

// answer is what an application says: to an order, or, if ID is 0, of one
// connection of a stream.
type answer struct {
	ID   int
	Key  string
	Seen []outcome
}

// outcome is one connection, or one look at an open one. Times are
// CLOCK_MONOTONIC in ns, which all processes share.
type outcome struct {
	To          netip.AddrPort
	Start, Done int64
	Word        word
	Why         string
}

func (o *outcome) String() string {
	return fmt.Sprintf("%s: %s after %v (%s)", o.To, o.Word, time.Duration(o.Done-o.Start), o.Why)
}

func now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err)
	}
	return ts.Nano()
}

// application is the process's state.
type application struct {
	out *json.Encoder
	mu  sync.Mutex // guards out

	keepMu  sync.Mutex // guards kept and streams
	kept    map[string][]*kept
	streams map[string]chan struct{}
	running sync.WaitGroup
}

// appMain is the application process, until stdin ends.
func appMain() {
	a := &application{out: json.NewEncoder(os.Stdout), kept: map[string][]*kept{}, streams: map[string]chan struct{}{}}
	first, err := strconv.Atoi(os.Getenv(envApp))
	if err == nil {
		nextPort.Store(int64(first))
		err = listen()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	in := json.NewDecoder(bufio.NewReader(os.Stdin))
	for {
		var o order
		if err := in.Decode(&o); err != nil {
			if !errors.Is(err, io.EOF) {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			return
		}
		if o.Do == "ask" || o.Do == "try" {
			go a.obey(&o) // they wait, and streams and others go on
		} else {
			a.obey(&o)
		}
	}
}

// listen has the application serve what it dials, on every address that it has:
// a slot is one of these, to a program that does not know better.
func listen() error {
	shared := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		control := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
		return errors.Join(control, err)
	}}
	shared.SetMultipathTCP(false)
	for _, port := range []int{servicePort, unnamedPort, manyPort} {
		for _, network := range []string{"tcp4", "tcp6"} {
			ln, err := shared.Listen(context.Background(), network, fmt.Sprintf(":%d", port))
			if err != nil {
				return err
			}
			go answerAs(ln, itself) // for the life of the process
		}
	}
	return nil
}

func answerAs(ln net.Listener, name string) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go introduce(name)(c)
	}
}

func (a *application) say(w answer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	_ = a.out.Encode(&w) // the test is gone
}

func (a *application) obey(o *order) {
	var seen []outcome
	switch o.Do {
	case "stream":
		stop := make(chan struct{})
		a.keepMu.Lock()
		a.streams[o.Key] = stop
		a.keepMu.Unlock()
		a.running.Add(1)
		go a.stream(o, stop)
	case "quiet":
		a.keepMu.Lock()
		for _, stop := range a.streams {
			close(stop)
		}
		clear(a.streams)
		a.keepMu.Unlock()
		a.running.Wait()
	case "try":
		for n := range o.Count {
			seen = append(seen, try(o.To[n%len(o.To)], o.Patience))
		}
	case "open":
		for n := range o.Count {
			k, first := open(o.To[n%len(o.To)], o.Patience)
			if seen = append(seen, first); k != nil {
				a.keepMu.Lock()
				a.kept[o.Key] = append(a.kept[o.Key], k)
				a.keepMu.Unlock()
			}
		}
	case "ask":
		a.keepMu.Lock()
		all := a.kept[o.Key]
		a.keepMu.Unlock()
		seen = make([]outcome, len(all))
		var asked sync.WaitGroup
		for n, k := range all {
			asked.Go(func() { seen[n] = k.ask(o.Patience) })
		}
		asked.Wait()
	case "close", "reset":
		a.keepMu.Lock()
		for _, k := range a.kept[o.Key] {
			if o.Do == "reset" {
				_ = unix.SetsockoptLinger(k.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
			}
			unix.Close(k.fd)
		}
		delete(a.kept, o.Key)
		a.keepMu.Unlock()
	}
	a.say(answer{ID: o.ID, Key: o.Key, Seen: seen})
}

// stream connects at a steady pace, whatever became of the last one.
func (a *application) stream(o *order, stop <-chan struct{}) {
	defer a.running.Done()
	tick := time.NewTicker(o.Every)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		a.running.Add(1)
		go a.once(o.Key, o.To[n%len(o.To)], o.Patience)
	}
}

func (a *application) once(key string, to netip.AddrPort, patience time.Duration) {
	defer a.running.Done()
	a.say(answer{Key: key, Seen: []outcome{try(to, patience)}})
}

// nextPort counts the ports that this process, the application, has used. It
// begins where envApp says: another's connections may wait for their end still.
var nextPort atomic.Int64

// kept is a connection that stays open.
type kept struct {
	fd             int
	to             netip.AddrPort
	sent, received int // lines
	rest           string
	end            word // empty: it is open
}

// try makes one connection and says what it met.
func try(to netip.AddrPort, patience time.Duration) outcome {
	k, o := open(to, patience)
	if k != nil {
		unix.Close(k.fd)
	}
	o.Done = now()
	return o
}

// open connects, by system calls: a library might try again. It returns nil for
// a connection that is not to be kept.
func open(to netip.AddrPort, patience time.Duration) (*kept, outcome) {
	o := outcome{To: to, Start: now()}
	end := time.Now().Add(patience)
	family := unix.AF_INET6
	var sa unix.Sockaddr = &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}
	if to.Addr().Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		o.Word, o.Why = failed, "socket: "+err.Error()
		return nil, o
	}
	if err := bindNext(fd, family); err != nil {
		unix.Close(fd)
		o.Word, o.Why = failed, "bind: "+err.Error()
		return nil, o
	}
	k := &kept{fd: fd, to: to}
	err = unix.Connect(fd, sa)
	if errors.Is(err, unix.EINPROGRESS) {
		err = k.connected(end)
	}
	own, line := "", ""
	peer := to
	if err == nil {
		own, peer = sockname(unix.Getsockname(fd)).String(), sockname(unix.Getpeername(fd))
		line, err = k.line(end)
	}
	o.Done = now()
	o.Word, o.Why = meaning(line, own, err)
	// None once it was reset.
	if peer != to && peer.IsValid() {
		o.Word, o.Why = lost, "getpeername says "+peer.String()
	}
	if err != nil {
		unix.Close(fd)
		return nil, o
	}
	return k, o
}

// bindNext gives a socket the next port that is free, and leaves its address open.
func bindNext(fd, family int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	for {
		port := firstPort + int(nextPort.Add(1))%portCount
		var sa unix.Sockaddr = &unix.SockaddrInet6{Port: port}
		if family == unix.AF_INET {
			sa = &unix.SockaddrInet4{Port: port}
		}
		if err := unix.Bind(fd, sa); !errors.Is(err, unix.EADDRINUSE) {
			return err
		}
	}
}

// meaning is what a connection met: what the server said, or an error.
func meaning(line, own string, err error) (word, string) {
	switch {
	case err == nil:
	case errors.Is(err, unix.ECONNREFUSED):
		return refused, err.Error()
	case errors.Is(err, unix.ECONNRESET):
		return reset, err.Error()
	case errors.Is(err, io.EOF), errors.Is(err, unix.EPIPE): // EPIPE is that of a reset behind one
		return finished, err.Error()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return silent, err.Error()
	default:
		return failed, err.Error()
	}
	name, seen, _ := strings.Cut(line, " ")
	switch {
	case name == itself:
		return lost, "the application reached itself"
	case seen != own:
		return carried, line
	case name == origin:
		return passed, line
	default:
		return direct, line
	}
}

// connected waits for the end of a connect.
func (k *kept) connected(end time.Time) error {
	if err := wait(k.fd, unix.POLLOUT, end); err != nil {
		return err
	}
	n, err := unix.GetsockoptInt(k.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && n != 0 {
		err = unix.Errno(n)
	}
	return err
}

func wait(fd int, events int16, end time.Time) error {
	for {
		ready := []unix.PollFd{{Fd: int32(fd), Events: events}}
		n, err := unix.Poll(ready, max(int(time.Until(end).Milliseconds()), 0))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n > 0:
			return nil
		case !time.Now().Before(end):
			return os.ErrDeadlineExceeded
		}
	}
}

// line reads one line.
func (k *kept) line(end time.Time) (string, error) {
	for {
		if line, rest, ok := strings.Cut(k.rest, "\n"); ok {
			k.rest = rest
			return line, nil
		}
		if err := wait(k.fd, unix.POLLIN, end); err != nil {
			return "", err
		}
		buf := make([]byte, 4096)
		n, err := unix.Read(k.fd, buf)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		case err != nil:
			return "", err
		case n == 0:
			return "", io.EOF
		default:
			k.rest += string(buf[:n])
		}
	}
}

// ask sends a line and waits for it to come back, and for all that were sent
// before and had not.
func (k *kept) ask(patience time.Duration) (o outcome) {
	o = outcome{To: k.to, Start: now()}
	defer func() { o.Done = now() }()
	if k.end != "" {
		o.Word, o.Why = k.end, "before"
		return o
	}
	end := time.Now().Add(patience)
	k.sent++
	if _, err := unix.Write(k.fd, fmt.Appendf(nil, "%d\n", k.sent)); err != nil {
		k.end, o.Why = meaning("", "", err)
		o.Word = k.end
		return o
	}
	for k.received < k.sent {
		line, err := k.line(end)
		if err != nil {
			o.Word, o.Why = meaning("", "", err)
			if o.Word != silent {
				k.end = o.Word
			}
			return o
		}
		if k.received++; line != fmt.Sprint(k.received) {
			k.end = lost
			o.Word, o.Why = lost, fmt.Sprintf("%q came back, want %d", line, k.received)
			return o
		}
	}
	o.Word = unaffected
	return o
}

func sockname(sa unix.Sockaddr, err error) netip.AddrPort {
	if err != nil {
		return netip.AddrPort{}
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}
