package bpf

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/tests/testutil"
)

// envRace makes the test binary an application that connects MPTCP sockets to an address,
// several at a time, from each of the addresses in its input.
const envRace = "PILLION_TEST_RACE"

// raceAll says of each peer that is not what was asked for, and how many were.
func raceAll(to string) {
	asked := netip.MustParseAddrPort(to)
	sources := make(chan netip.AddrPort)
	var racers sync.WaitGroup
	var mu sync.Mutex
	right := 0
	for range 4 {
		racers.Go(func() {
			for from := range sources {
				err := raceOne(from, asked)
				mu.Lock()
				if err == nil {
					right++
				} else {
					fmt.Println(from, err)
				}
				mu.Unlock()
			}
		})
	}
	var from string
	for {
		if _, err := fmt.Scan(&from); err != nil {
			break
		}
		sources <- netip.MustParseAddrPort(from)
	}
	close(sources)
	racers.Wait()
	fmt.Println("right", right)
}

func raceOne(from, asked netip.AddrPort) error {
	a := newAsker(unix.AF_INET, unix.IPPROTO_MPTCP)
	defer unix.Close(a.fd)
	// Gone at once: else the bucket is full for a while, and few write there.
	unix.SetsockoptLinger(a.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	err := errors.Join(unix.Bind(a.fd, a.sockaddr(from)), unix.Connect(a.fd, a.sockaddr(asked)))
	if err != nil {
		return err
	}
	peer, err := unix.Getpeername(a.fd)
	if err != nil {
		return err
	}
	at := peer.(*unix.SockaddrInet4)
	if got := netip.AddrPortFrom(netip.AddrFrom4(at.Addr), uint16(at.Port)); got != asked {
		return fmt.Errorf("peer %v", got)
	}
	return nil
}

// TestSentRace: processors that write one bucket at a time lose nobody.
func TestSentRace(t *testing.T) {
	testutil.CheckLeaks(t)
	h := newHooks(t)
	h.services(t)
	const n, bucket = 4000, 7
	var sources bytes.Buffer
	found := 0
	for last := byte(1); found < n; last++ {
		from := netip.AddrFrom4([4]byte{127, 0, 1, last})
		h.put(t, "own_addrs", FromAddr(from), uint32(1))
		k := tuple(from.String()+":1024", at4)
		for ; found < n && k.SourcePort != 0; k.SourcePort++ {
			if h.bucketOf(k) == bucket {
				fmt.Fprintln(&sources, netip.AddrPortFrom(from, k.SourcePort))
				found++
			}
		}
	}
	var out bytes.Buffer
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envRace+"="+asked4)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &sources, &out, &out
	if err := (testutil.Place{NS: h.ns, Cgroup: h.cgroup}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the application: %v", err)
	}
	if got, want := strings.TrimSpace(out.String()), fmt.Sprint("right ", n); got != want {
		t.Errorf("%.2000s, want %s", got, want)
	}
	if stored := h.counts(t, "tallies")[TallyStored]; stored > n*9/10 {
		t.Errorf("%d of %d are in storage: the bucket was full most of the time", stored, n)
	}
	testutil.Eventually(t, 10*time.Second, func() bool { return len(h.sent.owned()) == 0 }, "no row is anybody's")
	h.balanced(t)
}
