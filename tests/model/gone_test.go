package model

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync/atomic"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// argBrief makes the test binary an application that connects, says a word, and
// closes at once, over and over.
const argBrief = "brief"

const briefWord = "all that there is to say"

func runBrief() error {
	to, err := netip.ParseAddrPort(os.Args[2])
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(os.Args[3])
	if err != nil {
		return err
	}
	sa, family := sockaddr(to)
	for range n {
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, sa); err != nil {
			return fmt.Errorf("connect: %w", err)
		}
		if _, err := unix.Write(fd, []byte(briefWord)); err != nil {
			return fmt.Errorf("write: %w", err)
		}
		if err := unix.Close(fd); err != nil {
			return fmt.Errorf("close: %w", err)
		}
	}
	return nil
}

// TestBrief has applications that are gone before anybody has accepted: what
// they said arrives all the same.
func TestBrief(t *testing.T) {
	for _, mode := range []string{"early", "mirror", "adaptive"} {
		t.Run(mode, func(t *testing.T) {
			const count, clients = 2000, 4
			r := rig.New(t)
			var heard atomic.Int64
			at := r.Serve(t, netip.AddrPortFrom(rig.Far4, 7000), func(c net.Conn) {
				if b, err := io.ReadAll(c); err == nil && string(b) == briefWord {
					heard.Add(1)
				}
			})
			i := r.Run(t, "connect: "+mode)
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			failed := make(chan error, clients)
			for range clients {
				go func() {
					_, err := r.Try(self, argBrief, at.String(), strconv.Itoa(count/clients))
					failed <- err
				}()
			}
			for range clients {
				if err := <-failed; err != nil {
					t.Error(err)
				}
			}
			i.Idle(t)
			var last int64
			testutil.Eventually(t, rig.Limit, func() bool {
				last = heard.Load()
				return last == count
			}, "the server hears all ", count, " words")
		})
	}
}
