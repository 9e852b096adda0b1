package dns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
	"github.com/pillion-project/pillion/tests/testutil"
)

// real is a name server that is somebody else's program.
type real struct {
	addr netip.AddrPort
	cmd  *exec.Cmd
	dir  string
	log  buffer
}

// buffer is what a server prints.
type buffer struct {
	mu sync.Mutex // guards b, that two of its descriptors write to
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// newReal starts a server at an address of loopback that nobody else has, and waits
// until it answers. command makes the command line; the directory is for its
// configuration.
func newReal(t *testing.T, command func(s *real) []string) *real {
	t.Helper()
	s := &real{dir: t.TempDir()}
	for range 5 {
		// Every address of 127/8 has all ports, so two of a number hardly meet.
		a := netip.AddrFrom4([4]byte{127, byte(1 + rand.N(250)), byte(rand.N(250)), byte(1 + rand.N(250))})
		s.addr = netip.AddrPortFrom(a, uint16(5300+rand.N(20000)))
		if s.start(t, command(s)) {
			return s
		}
	}
	t.Fatalf("the server does not start:\n%s", &s.log)
	return nil
}

func (s *real) start(t *testing.T, args []string) bool {
	t.Helper()
	s.cmd = exec.Command(args[0], args[1:]...)
	s.cmd.Dir = s.dir
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	if err := s.cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", args[0], err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.cmd.Wait() }()
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill() // an error says that it has ended
		<-ended
		if t.Failed() {
			t.Logf("%s:\n%s", args[0], &s.log)
		}
	})
	r := &resolver{servers: []netip.AddrPort{s.addr}, timeout: time.Second, attempts: 1}
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		_, err := (&client{}).ask(t.Context(), r, question{"web.example.", dnsmessage.TypeA})
		if err == nil {
			return true
		}
		select {
		case err := <-ended:
			ended <- err
			return false
		default:
		}
	}
	return false
}

// newDnsmasq starts a dnsmasq that knows the zone example. Its addresses are those
// of the file hosts in its directory, which it reads again at SIGHUP.
func newDnsmasq(t *testing.T, hosts string, args ...string) *real {
	t.Helper()
	testutil.Need(t, "dnsmasq")
	return newReal(t, func(s *real) []string {
		// It may run as another user than root.
		if err := os.Chmod(s.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(s.dir, "hosts"), hosts)
		return append([]string{
			"dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--pid-file=",
			"--port=" + fmt.Sprint(s.addr.Port()), "--listen-address=" + s.addr.Addr().String(), "--bind-interfaces",
			"--no-resolv", "--no-hosts", "--addn-hosts=" + filepath.Join(s.dir, "hosts"), "--local=/example/", "--local-ttl=1",
		}, args...)
	})
}

// newUnbound starts an unbound that has records.
func newUnbound(t *testing.T, records ...string) *real {
	t.Helper()
	testutil.Need(t, "unbound")
	return newReal(t, func(s *real) []string {
		var c strings.Builder
		fmt.Fprintf(&c, `server:
  interface: %s
  port: %d
  access-control: 127.0.0.0/8 allow
  do-daemonize: no
  username: ""
  chroot: ""
  directory: "%s"
  pidfile: ""
  use-syslog: no
  num-threads: 1
  root-hints: "/dev/null"
  local-zone: "example." static
  local-zone: "shop.svc." static
`, s.addr.Addr(), s.addr.Port(), s.dir)
		for _, r := range records {
			fmt.Fprintf(&c, "  local-data: '%s'\n", r)
		}
		c.WriteString("remote-control:\n  control-enable: no\n")
		write(t, filepath.Join(s.dir, "unbound.conf"), c.String())
		return []string{"unbound", "-d", "-p", "-c", filepath.Join(s.dir, "unbound.conf")}
	})
}

// run runs a source that asks s until the test ends.
func (s *real) run(t *testing.T, o Options) <-chan discover.Snapshot {
	t.Helper()
	o.Servers = []netip.AddrPort{s.addr}
	o.MinTTL, o.Timeout, o.Attempts = 100*time.Millisecond, limit, 2
	if o.ResolvConf == "" {
		o.ResolvConf = filepath.Join(s.dir, "resolv.conf")
		write(t, o.ResolvConf, "search none.invalid\n")
	}
	source, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	out := make(chan discover.Snapshot)
	ended := make(chan error, 1)
	go func() { ended <- source.Run(ctx, out) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return out
}

// wantNext waits for what want says: a set, or a part of an error.
func wantNext(t *testing.T, out <-chan discover.Snapshot, want string) {
	t.Helper()
	end := time.After(2 * limit)
	for {
		select {
		case s := <-out:
			got := words(s)
			if rest, ok := strings.CutPrefix(want, "error: "); got == want || ok && strings.Contains(got, rest) {
				return
			}
			t.Fatalf("got %s, want %s", got, want)
		case <-end:
			t.Fatalf("nothing, want %s", want)
		}
	}
}

func TestDnsmasq(t *testing.T) {
	t.Parallel()
	s := newDnsmasq(t, "192.0.2.1 web.example\n192.0.2.2 web.example\n2001:db8::1 web.example\n192.0.2.3 b.example\n",
		"--cname=alias.example,b.example",
		"--srv-host=_http._tcp.web.example,b.example,8080,10,5",
		"--srv-host=_http._tcp.web.example,web.example,80,20,1",
		"--srv-host=_off._tcp.web.example")

	both := s.run(t, Options{Name: "web.example.", Port: 80})
	wantNext(t, both, "[192.0.2.1:80 192.0.2.2:80 [2001:db8::1]:80]")
	wantNext(t, s.run(t, Options{Name: "web.example", Port: 80, Families: FamiliesIPv6}), "[[2001:db8::1]:80]")
	wantNext(t, s.run(t, Options{Name: "alias.example.", Port: 81}), "[192.0.2.3:81]")
	wantNext(t, s.run(t, Options{Name: "_http._tcp.web.example.", SRV: true}), "[192.0.2.3:8080*5]")
	wantNext(t, s.run(t, Options{Name: "_off._tcp.web.example.", SRV: true}), "[]")
	wantNext(t, s.run(t, Options{Name: "nobody.example.", Port: 80}), "error: no such name (NXDOMAIN)")
	wantNext(t, s.run(t, Options{Name: "b.example.", Port: 80, Families: FamiliesIPv6}), "error: the name has none")
	wantNext(t, s.run(t, Options{Name: "elsewhere.invalid.", Port: 80}), "error: REFUSED")

	// What changes is seen when the answer has run out.
	write(t, filepath.Join(s.dir, "hosts"), "192.0.2.9 web.example\n")
	if err := s.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	// It may be asked between its reading of the one family and the other.
	for got := ""; got != "[192.0.2.9:80]"; {
		select {
		case sn := <-both:
			got = words(sn)
		case <-time.After(2 * limit):
			t.Fatalf("the last was %s", got)
		}
	}
	// A name that is gone, and a server that is gone, are errors.
	write(t, filepath.Join(s.dir, "hosts"), "")
	if err := s.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	wantNext(t, both, "error: look up web.example.: ") // it has SRV records below it
	if err := s.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	end := time.After(2 * limit)
	for {
		select {
		case sn := <-both:
			if sn.Err == nil {
				t.Fatalf("without a server: %s", words(sn))
			}
			if strings.Contains(sn.Err.Error(), "connection refused") {
				return
			}
		case <-end:
			t.Fatal("without a server, no error says so")
		}
	}
}

func TestUnbound(t *testing.T) {
	t.Parallel()
	records := []string{
		"example. 60 IN SOA ns.example. root.example. 1 3600 1200 604800 60",
		"web.example. 5 IN A 192.0.2.1",
		"web.example. 5 IN AAAA 2001:db8::1",
		"api.shop.svc. 5 IN A 192.0.2.7",
		"alias.example. 5 IN CNAME web.example.",
		"_http._tcp.web.example. 5 IN SRV 1 3 8080 web.example.",
	}
	const many = 300
	for i := range many {
		records = append(records, fmt.Sprintf("many.example. 5 IN A 10.0.%d.%d", i/200, i%200+1))
	}
	s := newUnbound(t, records...)
	wantNext(t, s.run(t, Options{Name: "web.example.", Port: 80}), "[192.0.2.1:80 [2001:db8::1]:80]")
	wantNext(t, s.run(t, Options{Name: "alias.example.", Port: 80}), "[192.0.2.1:80 [2001:db8::1]:80]")
	wantNext(t, s.run(t, Options{Name: "_http._tcp.web.example.", SRV: true, Families: FamiliesIPv4}), "[192.0.2.1:8080*3]")
	wantNext(t, s.run(t, Options{Name: "nobody.example.", Port: 80}), "error: NXDOMAIN")

	// More than a datagram takes.
	select {
	case sn := <-s.run(t, Options{Name: "many.example.", Port: 80, Families: FamiliesIPv4}):
		if len(sn.Endpoints) != many {
			t.Errorf("%d endpoints, want %d: %v", len(sn.Endpoints), many, sn.Err)
		}
	case <-time.After(2 * limit):
		t.Error("no answer to a long one")
	}

	// A pod's search list.
	path := filepath.Join(s.dir, "pod")
	write(t, path, "search example shop.svc\noptions ndots:5\n")
	wantNext(t, s.run(t, Options{Name: "api", Port: 80, ResolvConf: path}), "[192.0.2.7:80]")

	// How long a "no" holds is what the zone's SOA record says.
	r := &resolver{servers: []netip.AddrPort{s.addr}, timeout: limit, attempts: 1}
	_, err := (&client{}).ask(t.Context(), r, question{"nobody.example.", dnsmessage.TypeA})
	if m, ok := errors.AsType[*missing](err); !ok || !m.name || m.ttl != time.Minute {
		t.Errorf("%+v, want a minute", err)
	}
	_, err = (&client{}).ask(t.Context(), r, question{"many.example.", dnsmessage.TypeAAAA})
	if m, ok := errors.AsType[*missing](err); !ok || m.name || m.ttl != time.Minute {
		t.Errorf("%+v, want a minute", err)
	}
	a, err := (&client{}).ask(t.Context(), r, question{"WEB.example.", dnsmessage.TypeA})
	wantAddrs(t, a, err, "192.0.2.1")
}
