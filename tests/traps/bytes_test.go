package traps

import (
	"bytes"
	"crypto/sha256"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

func untouched(t testing.TB, s *site) {
	records := []byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + string(noise(505)))
	request := []byte("GET / HTTP/1.1\r\nHost: shop\r\nAccept: */*\r\n\r\n")
	both := append(append([]byte{}, request...), records...)
	heard := make(chan []byte, 16)
	serve := func(c net.Conn) {
		b, _ := io.ReadAll(c)
		heard <- b
		c.Write(b)
	}
	four, six := s.server(at4(7000), serve), s.server(at6(7000), serve)
	s.start()
	for _, to := range []netip.AddrPort{four, six} {
		for _, sent := range [][]byte{records, request, both} {
			for _, piece := range []int{len(sent), 3} {
				c := s.dial(t, to)
				for rest := sent; len(rest) > 0; rest = rest[min(piece, len(rest)):] {
					c.Write(rest[:min(piece, len(rest))])
				}
				c.CloseWrite()
				back, err := io.ReadAll(c)
				if got := from(t, heard); !bytes.Equal(got, sent) || !bytes.Equal(back, sent) {
					t.Fatalf("of %d bytes in pieces of %d, the server read %d, the application %d, %v", len(sent), piece, len(got), len(back), err)
				}
				c.Close()
			}
		}
	}
	s.relayed(t, 12)
}

func early(t testing.TB, s *site) {
	at := s.nobody(at4(7000))
	ln := s.Listen(s.t, at)
	s.start()
	for n := range 20 {
		c := s.dial(t, at)
		sent := noise(n*40000 + 1)
		go func() {
			for rest := sent; len(rest) > 0; rest = rest[min(1000, len(rest)):] {
				c.Write(rest[:min(1000, len(rest))])
			}
			c.CloseWrite()
		}()
		server := accepted(t, ln)
		io.WriteString(server, "first")
		b := make([]byte, 5)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "first" {
			t.Fatalf("the application reads %q, %v", b, err)
		}
		if got, err := io.ReadAll(server); err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("the server reads %d of %d bytes, the same: %v, %v", len(got), len(sent), bytes.Equal(got, sent), err)
		}
		server.Close()
		c.Close()
	}
	s.whileFrozen(t, at, "written and ended")
	if got, err := io.ReadAll(accepted(t, ln)); err != nil || string(got) != "written and ended" {
		t.Errorf("of what was ended while the proxy did not run, the server reads %q, then %s", got, ending(err))
	}
	s.relayed(t, 21)
}

// whileFrozen connects, writes and closes before the proxy knows. The kernel has
// acknowledged it all by then, and the application believes it.
func (s *site) whileFrozen(t testing.TB, at netip.AddrPort, text string) {
	t.Helper()
	s.freeze(true)
	defer s.freeze(false)
	c := s.dial(t, at)
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	own := c.LocalAddr().String()
	c.Close()
	testutil.Eventually(t, rig.Limit, func() bool {
		return strings.Contains(s.inside("ss", "-Htn", "state", "fin-wait-2"), own) || wait()
	}, "the application's end is acknowledged")
}

func captured(t testing.TB, s *site) {
	const marker = "a marker that nothing else sends"
	at := s.server(at4(7000), func(c net.Conn) { io.Copy(c, c) })
	var fd int
	s.App.Do(s.t, func() (err error) {
		all := int(unix.ETH_P_ALL)
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all>>8|all&0xff<<8)
		return err
	})
	defer unix.Close(fd)
	s.start()
	c := s.dial(t, at)
	echoes(t, c, []byte(marker))
	links := map[string]bool{}
	b := make([]byte, 1<<16)
	for {
		n, from, err := unix.Recvfrom(fd, b, unix.MSG_DONTWAIT)
		if err == unix.EAGAIN {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if link := from.(*unix.SockaddrLinklayer); bytes.Contains(b[:n], []byte(marker)) {
			links[s.linkName(link.Ifindex)] = true
		}
	}
	if !links["lo"] || !links[testutil.AppLink] {
		t.Errorf("the bytes were seen on %v, want lo and %s", links, testutil.AppLink)
	}
	s.relayedAfter(t, c)
}

func (s *site) linkName(index int) (name string) {
	s.App.Do(s.t, func() error {
		link, err := net.InterfaceByIndex(index)
		if err == nil {
			name = link.Name
		}
		return err
	})
	return name
}

func pressure(t testing.TB, s *site) {
	at := s.nobody(at4(7000))
	ln := s.Listen(s.t, at)
	s.start()
	fd := s.app.socket(unix.AF_INET, 0)
	defer func() { unix.Close(fd) }()
	if err := connect(fd, s.to(at)); err != nil {
		t.Fatalf("connect: %v", err)
	}
	block := noise(1 << 20)
	const most = 64 << 20
	sent, sum := 0, sha256.New()
	for sent < most {
		n, err := unix.Write(fd, block)
		if err == unix.EAGAIN {
			// Room that does not come back for so long is none.
			if !ready(fd, unix.POLLOUT, 2*time.Second) {
				break
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		sum.Write(block[:n])
		sent += n
	}
	if sent >= most {
		t.Errorf("%d MiB are taken from an application whose server reads none", sent>>20)
	}
	server := accepted(t, ln)
	defer server.Close()
	if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	got := sha256.New()
	if n, err := io.Copy(got, server); err != nil || n != int64(sent) || !bytes.Equal(got.Sum(nil), sum.Sum(nil)) {
		t.Errorf("%d of %d bytes arrive, %v", n, sent, err)
	}
	server.Close()
	unix.Close(fd)
	fd = -1
	s.relayed(t, 1)
}
