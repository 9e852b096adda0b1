package traps

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/tests/rig"
	"golang.org/x/sys/unix"
)

func at4(port uint16) netip.AddrPort { return netip.AddrPortFrom(rig.Far4, port) }
func at6(port uint16) netip.AddrPort { return netip.AddrPortFrom(rig.Far6, port) }

// sockmapTraps are those of sockmap, sk_msg and the stream parser. Pillion uses
// none of them: what it is tested for is what their users saw.
var sockmapTraps = []trap{
	{
		number: 1, title: "sockmap redirection panics the kernel",
		how: "Connections are opened and closed in every way while bytes flow: the kernel gets no new taint " +
			"(a warning is one), and no sk_msg or sk_skb program is loaded.",
		links: []string{"daeuniverse/dae/pull/912", "daeuniverse/dae/pull/518", "kernel-patches/bpf/pull/12637", "https://lwn.net/Articles/1038360/"},
		run:   churn,
	},
	{
		number: 2, title: "Bytes are lost to readers that use splice(2)",
		how: "The application reads by splice(2), and the server echoes by Go's io.Copy between TCP connections, " +
			"which is splice(2) too: every byte arrives, in order.",
		links: []string{"daeuniverse/dae/pull/507", "daeuniverse/dae/pull/518", "open-telemetry/opentelemetry-ebpf-instrumentation/pull/2975"},
		run:   spliced,
	},
	{
		number: 3, title: "The end of a stream is lost, or overtakes its bytes",
		how:   "One side writes and closes at once, 100 times in each direction: the other reads all of it, and then the end.",
		links: []string{"daeuniverse/dae/pull/912"},
		run:   lastBytes,
	},
	{
		number: 4, title: "MPTCP sockets cannot be redirected",
		how:   "An application's MPTCP socket connects to a server that listens with MPTCP, as Go's do since 1.24: bytes are exact both ways.",
		links: []string{"multipath-tcp/mptcp_net-next/issues/521"},
		run:   multipath,
	},
	{
		number: 6, title: "FIONREAD is 0 and wake-ups are missing for sockets in a sockmap",
		how: "FIONREAD tells what has arrived, and each of 500 answers wakes a waiting epoll, whatever its size.",
		links: []string{"grafana/beyla/issues/2941", "grafana/beyla/issues/3025", "open-telemetry/opentelemetry-ebpf-instrumentation/pull/2580",
			"open-telemetry/opentelemetry-ebpf-instrumentation/pull/2975", "kernel-patches/bpf/pull/12664"},
		run: wakeUps,
	},
	{
		number: 7, title: "Something is written into a stream that is not understood",
		how:   "What looks like HTTP and like TLS, over IPv4 and IPv6, in one write and in pieces, arrives as it was sent.",
		links: []string{"BetterStackHQ/collector/issues/153", "grafana/beyla/issues/2293"},
		run:   untouched,
	},
	{
		number: 8, title: "Bytes that were queued early are not forwarded",
		how: "The application writes as soon as it may, before the server has accepted; the server writes as soon as it has. " +
			"Both get everything, in order. So does the server what an application writes and ends while the proxy does not run.",
		links: []string{"cloudflare/cloudflare-blog/issues/43"},
		run:   early,
	},
	{
		number: 10, title: "tcpdump no longer sees the traffic",
		how: "A packet socket beside the application sees the bytes on their way to the proxy, and on their way out.",
		links: []string{"cilium/cilium/issues/9652", "cilium/cilium/issues/23556", "cilium/cilium/issues/11039", "kumahq/kuma/issues/5342",
			"merbridge/merbridge/issues/82", "merbridge/merbridge/issues/100", "google/security-research/pull/253"},
		run: captured,
	},
	{
		number: 11, title: "There is no back-pressure: unread bytes fill the kernel's memory",
		how: "An application writes to a server that does not read: it is stopped within 64 MiB. " +
			"Then the server reads, and everything arrives.",
		links: []string{"cilium/cilium/issues/1797"},
		run:   pressure,
	},
}

// taint is what the kernel says of itself. A warning is one bit of it.
func taint(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile("/proc/sys/kernel/tainted")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

func churn(t testing.TB, s *site) {
	block := noise(64 << 10)
	at := s.server(at4(7000), func(c net.Conn) {
		go c.Write(block)
		first := make([]byte, 1)
		if _, err := io.ReadFull(c, first); err != nil {
			return
		}
		switch first[0] % 3 {
		case 0:
			abort(c)
		case 1:
			io.Copy(io.Discard, c)
		}
	})
	before := taint(t)
	s.start()
	var all sync.WaitGroup
	for worker := range 8 {
		all.Go(func() {
			for n := range 50 {
				c, err := s.app.try(s.to(at))
				if err != nil {
					t.Errorf("connect: %v", err)
					return
				}
				c.Write(append([]byte{byte(n)}, block...))
				if (n+worker)%2 == 0 {
					c.Read(make([]byte, 4096))
				}
				if n%4 == 0 {
					abort(c)
				}
				c.Close()
			}
		})
	}
	all.Wait()
	if after := taint(t); after != before {
		t.Errorf("the kernel's taint is %s, before %s", after, before)
	}
	s.relayed(t, 400)
	if s.sys == pillion {
		noSockmapPrograms(t)
	}
}

// noSockmapPrograms fails the test if a program of Pillion's is one that changes
// what sockets in a map do.
func noSockmapPrograms(t testing.TB) {
	t.Helper()
	ours := 0
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if err != nil {
			break
		}
		id = next
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // gone since
		}
		info, err := p.Info()
		p.Close()
		if err != nil || !strings.HasPrefix(info.Name, "pl_") {
			continue
		}
		ours++
		if info.Type == ebpf.SkMsg || info.Type == ebpf.SkSKB {
			t.Errorf("program %s is a %s", info.Name, info.Type)
		}
	}
	if ours == 0 {
		t.Error("no program of Pillion's is loaded")
	}
}

// noise is bytes that are the same for every caller, and not for two offsets.
func noise(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

func spliced(t testing.TB, s *site) {
	at := s.server(at4(7000), func(c net.Conn) { io.Copy(c, c) })
	s.start()
	c := s.dial(t, at)
	sent := noise(16 << 20)
	go func() {
		c.Write(sent)
		c.CloseWrite()
	}()
	got := make(chan []byte, 1)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	go func() {
		b, _ := io.ReadAll(r)
		got <- b
	}()
	err = spliceAll(c, w)
	w.Close()
	if b := <-got; err != nil || !bytes.Equal(b, sent) {
		t.Errorf("%d of %d bytes came back, the same: %v, %v", len(b), len(sent), bytes.Equal(b, sent), err)
	}
	s.relayed(t, 1)
}

// spliceAll moves a connection's bytes to a pipe, by splice(2) alone.
func spliceAll(c *net.TCPConn, w *os.File) error {
	from, err := c.SyscallConn()
	if err != nil {
		return err
	}
	to := int(w.Fd()) // blocking from here on
	var inner error
	err = from.Read(func(fd uintptr) bool {
		for {
			n, err := unix.Splice(int(fd), nil, to, nil, 1<<20, unix.SPLICE_F_MOVE)
			switch {
			case err == unix.EAGAIN:
				return false
			case err == unix.EINTR:
			case err != nil || n == 0:
				inner = err
				return true
			}
		}
	})
	if err != nil {
		return err
	}
	return inner
}

func lastBytes(t testing.TB, s *site) {
	const rounds = 100
	up := make(chan string, rounds)
	size := func(n int) int { return 1 + (n*7919)%200000 }
	down := s.server(at4(7000), func(c net.Conn) {
		n := make([]byte, 1)
		c.Read(n)
		c.Write(noise(size(int(n[0]))))
	})
	read := s.server(at4(7001), func(c net.Conn) {
		b, err := io.ReadAll(c)
		up <- fmt.Sprintf("%d %x %v", len(b), sha256.Sum256(b), err)
	})
	s.start()
	for n := 1; n <= rounds; n++ {
		want := noise(size(n))
		c := s.dial(t, down)
		c.Write([]byte{byte(n)})
		if b, err := io.ReadAll(c); err != nil || !bytes.Equal(b, want) {
			t.Fatalf("the application reads %d of %d bytes, the same: %v, %v", len(b), len(want), bytes.Equal(b, want), err)
		}
		c.Close()
		c = s.dial(t, read)
		c.Write(want)
		c.Close()
		if got, want := from(t, up), fmt.Sprintf("%d %x <nil>", len(want), sha256.Sum256(want)); got != want {
			t.Fatalf("the server reads %s, want %s", got, want)
		}
	}
	s.relayed(t, 2*rounds)
}

func multipath(t testing.TB, s *site) {
	at := s.nobody(at4(7000))
	var ln net.Listener
	s.World.Do(s.t, func() (err error) {
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(true)
		ln, err = lc.Listen(s.t.Context(), "tcp", at.String())
		return err
	})
	var served sync.WaitGroup
	defer served.Wait()
	defer ln.Close()
	served.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			served.Go(func() {
				defer c.Close()
				io.Copy(c, c)
			})
		}
	})
	s.start()
	c, err := s.app.tryBy(s.to(at), unix.IPPROTO_MPTCP)
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	defer c.Close()
	echoes(t, c, noise(4<<20))
	s.relayedAfter(t, c)
}

// relayedAfter ends a connection, and fails the test unless it was relayed.
func (s *site) relayedAfter(t testing.TB, c *net.TCPConn) {
	t.Helper()
	c.Close()
	s.relayed(t, 1)
}

// echoes fails the test unless what is written comes back. It ends the writing.
func echoes(t testing.TB, c *net.TCPConn, sent []byte) {
	t.Helper()
	go func() {
		c.Write(sent)
		c.CloseWrite()
	}()
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("%d of %d bytes came back, the same: %v, %v", len(got), len(sent), bytes.Equal(got, sent), err)
	}
}

func wakeUps(t testing.TB, s *site) {
	at := s.server(at4(7000), func(c net.Conn) {
		for {
			b := make([]byte, 4)
			if _, err := io.ReadFull(c, b); err != nil {
				return
			}
			c.Write(noise(int(b[0]) | int(b[1])<<8))
		}
	})
	s.start()
	fd := s.app.socket(unix.AF_INET, 0)
	defer func() { unix.Close(fd) }()
	if err := connect(fd, s.to(at)); err != nil {
		t.Fatalf("connect: %v", err)
	}
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ep)
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET}); err != nil {
		t.Fatal(err)
	}
	for n := range 500 {
		want := 1 + n*17%4000
		if _, err := unix.Write(fd, []byte{byte(want), byte(want >> 8), 0, 0}); err != nil {
			t.Fatal(err)
		}
		have := 0
		for have < want {
			events := make([]unix.EpollEvent, 1)
			k, err := unix.EpollWait(ep, events, int(rig.Limit.Milliseconds()))
			if err == unix.EINTR {
				continue
			}
			if err != nil || k == 0 {
				t.Fatalf("answer %d: nothing wakes the application after %d of %d bytes, %v", n, have, want, err)
			}
			// What FIONREAD tells is what there is: read in the same breath.
			told, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
			b := make([]byte, 64<<10)
			got, rerr := unix.Read(fd, b)
			if err != nil || rerr != nil || told == 0 || told > got {
				t.Fatalf("answer %d: FIONREAD says %d, %v; then read gives %d, %v", n, told, err, got, rerr)
			}
			have += got
		}
	}
	unix.Close(fd)
	fd = -1
	s.relayed(t, 1)
}
