package bpf

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/tests/testutil"
)

// envSteps makes the test binary an application that does what it is told, a step
// a word, and says how each ended:
//
//	tcp=ADDR mptcp=ADDR mapped=ADDR   connects, and names the peer
//	again=ADDR                        connects the last socket to another
//	quit=ADDR                         connects and closes before an answer
//	brief=ADDR                        connects with a user timeout of 100 ms
//	bound=SOURCE,ADDR                 connects from a source, an address or with a port
//	leave                             disconnects the last socket
//	peer                              names the peer of the last socket
//	close                             closes all sockets
//	wait                              waits for a line of the standard input
//	times=N                           before all others: does them N times
//
// and what takeMore has.
const envSteps = "PILLION_TEST_STEPS"

type stepper struct {
	open  []*asker
	input *bufio.Reader
}

func takeSteps(steps string) {
	s := &stepper{input: bufio.NewReader(os.Stdin)}
	all, times := strings.Fields(steps), 1
	if n, found := strings.CutPrefix(all[0], "times="); found {
		times, _ = strconv.Atoi(n)
		all = all[1:]
	}
	for range times {
		for _, step := range all {
			s.take(step)
		}
	}
}

// peer is how a connect ended: the peer that the socket says it has, or the error.
func (a *asker) peer(err error) string {
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		return unix.ErrnoName(errno)
	}
	switch sa, _ := unix.Getpeername(a.fd); sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)).String()
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)).String()
	}
	return "no peer"
}

func (s *stepper) take(step string) {
	what, where, _ := strings.Cut(step, "=")
	if said, ok := s.takeMore(what, where); ok {
		fmt.Println(strings.TrimSpace(step + " " + said))
		return
	}
	source, where, bound := strings.Cut(where, ",")
	if !bound {
		where = source
	}
	var a *asker
	if n := len(s.open); n > 0 {
		a = s.open[n-1]
	}
	var to netip.AddrPort
	if where != "" {
		to = netip.MustParseAddrPort(where)
		if what != "again" {
			family, protocol := unix.AF_INET, unix.IPPROTO_TCP
			if to.Addr().Is6() || what == "mapped" {
				family = unix.AF_INET6
			}
			if what == "mptcp" {
				protocol = unix.IPPROTO_MPTCP
			}
			a = newAsker(family, protocol)
			s.open = append(s.open, a)
		}
	}
	said := ""
	switch what {
	case "wait":
		s.input.ReadString('\n')
	case "close":
		for _, a := range s.open {
			unix.Close(a.fd)
		}
		s.open = nil
	case "peer":
		said = a.peer(nil)
	case "leave":
		a.leave()
		said = a.peer(nil)
	case "quit":
		unix.SetNonblock(a.fd, true)
		said = a.peer(unix.Connect(a.fd, a.sockaddr(to)))
		unix.Close(a.fd)
		s.open = s.open[:len(s.open)-1]
	case "brief":
		unix.SetsockoptInt(a.fd, unix.SOL_TCP, unix.TCP_USER_TIMEOUT, 100)
		said = a.peer(unix.Connect(a.fd, a.sockaddr(to)))
	default:
		if bound {
			at, err := netip.ParseAddrPort(source)
			if err != nil {
				at = netip.AddrPortFrom(netip.MustParseAddr(source), 0)
			}
			unix.Bind(a.fd, a.sockaddr(at))
		}
		said = a.peer(unix.Connect(a.fd, a.sockaddr(to)))
	}
	fmt.Println(step, said)
}

// app is an application that takes steps in the scope.
type app struct {
	cmd   *exec.Cmd
	stdin interface{ Close() error }
	write func(string)
	out   *bufio.Reader
	log   *bytes.Buffer
}

func (h *hooks) start(t *testing.T, steps ...string) *app {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envSteps+"="+strings.Join(steps, " "))
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	a := &app{cmd: cmd, stdin: stdin, out: bufio.NewReader(stdout), log: &bytes.Buffer{}}
	a.write = func(s string) { stdin.Write([]byte(s)) }
	cmd.Stderr = a.log
	if err := (testutil.Place{NS: h.ns, Cgroup: h.cgroup}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if cmd.ProcessState == nil {
			cmd.Wait()
		}
	})
	return a
}

// said reads n lines.
func (a *app) said(t *testing.T, n int) []string {
	t.Helper()
	var lines []string
	for range n {
		line, err := a.out.ReadString('\n')
		if err != nil {
			t.Fatalf("after %q: %v %s", lines, err, a.log)
		}
		lines = append(lines, strings.TrimSpace(line))
	}
	return lines
}

// steps lets an application take them all, and returns what it said.
func (h *hooks) steps(t *testing.T, steps ...string) []string {
	t.Helper()
	a := h.start(t, steps...)
	lines := a.said(t, len(steps))
	a.stdin.Close()
	if err := a.cmd.Wait(); err != nil {
		t.Fatalf("the application: %v %s", err, a.log)
	}
	return lines
}
