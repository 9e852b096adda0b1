package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// nameYourself is a server that says which address it is.
func nameYourself(c net.Conn) { io.WriteString(c, c.LocalAddr().String()) }

// TestManyDestinations makes 20,000 short connections to 50 destinations: each
// server says its own address and port, and none is ever another's.
func TestManyDestinations(t *testing.T) {
	r := rig.New(t)
	const each, count = 25, 20000
	args := []string{"short", fmt.Sprint(count), "6"}
	for i := range each {
		to4 := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(100 + i)}), uint16(8000+i%7))
		to6 := netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf("2001:db8:7::%x", 0x100+i)), uint16(8000+i%5))
		for _, to := range []netip.AddrPort{to4, to6} {
			r.Serve(t, to, nameYourself)
			args = append(args, to.String())
		}
	}
	s := play(t, r, "")
	same(t, "connections", goApp(t, r, args...), fmt.Sprintf("right %d wrong 0 failed 0", count))
	if n := s.AllRelayed(t, count); n != count {
		t.Errorf("%d connections ended, want %d", n, count)
	}
	if n := s.Reasons(t)[flow.ReasonDefault.String()]; n != count {
		t.Errorf("%d connections redirected, want %d", n, count)
	}
}

// TestGibibyte moves 1 GiB each way at once, by hash.
func TestGibibyte(t *testing.T) {
	const size = 1 << 30
	type result struct{ sent, got string }
	server := make(chan result, 1)
	r := rig.New(t)
	at := r.Serve(t, at4(9000), func(c net.Conn) {
		up := make(chan string, 1)
		go func() {
			sum, _, err := readHashed(c)
			if err != nil {
				sum = err.Error()
			}
			up <- sum
		}()
		sum, err := sendHashed(c, size)
		if err != nil {
			sum = err.Error()
		}
		c.(*net.TCPConn).CloseWrite()
		server <- result{sent: sum, got: <-up}
	})
	s := play(t, r, "")
	out := goApp(t, r, "bulk", at.String(), fmt.Sprint(size))
	far := <-server
	if far.sent != far.got { // both send the same
		t.Errorf("the server got %s, the application sent %s", far.got, far.sent)
	}
	same(t, "the application", out, fmt.Sprintf("%s %s %d", far.got, far.sent, size))
	s.AllRelayed(t, 1)
	rec := s.Ended(t, 1)[0]
	if rec.Sent != size || rec.Received != size || rec.End != flow.ReasonClosed {
		t.Errorf("record %+v", rec)
	}
}

// TestCrowd keeps 2,000 connections open at once, and then uses all of them.
func TestCrowd(t *testing.T) {
	const count = 2000
	r := rig.New(t)
	r.Serve(t, at4(7), echoBack)
	r.Serve(t, at6(7), echoBack)
	s := play(t, r, "")
	cmd := goCommand(t, r, "crowd", fmt.Sprint(count), at4(7).String(), at6(7).String())
	var errs rig.Log
	cmd.Stderr = &errs
	in, out := testutil.Pipes(t, cmd)
	if err := r.Start(cmd); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(appLimit, func() { cmd.Process.Kill() })
	defer late.Stop()
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "open" {
		cmd.Wait()
		t.Fatalf("client: %q\n%s", lines.Text(), errs.String())
	}
	var live number
	testutil.Eventually(t, rig.Limit, func() bool {
		status, err := s.Status(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		live = number(status.Live)
		return live == count
	}, "open connections, want ", count, ", have ", &live)
	fmt.Fprintln(in, "go")
	if !lines.Scan() || lines.Text() != fmt.Sprintf("used %d", count) {
		t.Errorf("client: %q", lines.Text())
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("client: %v\n%s", err, errs.String())
	}
	if n := s.AllRelayed(t, count); n != count {
		t.Errorf("%d connections ended, want %d", n, count)
	}
	for _, rec := range s.Ended(t, count) {
		if rec.Sent < 50*uint64(len("connection 0 ")) || rec.Sent != rec.Received {
			t.Errorf("record %+v", rec)
			break
		}
	}
	if text := strings.TrimSpace(errs.String()); text != "" {
		t.Errorf("client says %s", text)
	}
}

// TestOnePort uses one port of the application's own for many connections at
// once, which is right as long as they go to different places.
func TestOnePort(t *testing.T) {
	testutil.Need(t, "python3")
	r := rig.New(t)
	for i := range 20 {
		r.Serve(t, netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(100 + i)}), 8000), nameYourself)
		r.Serve(t, netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf("2001:db8:7::%x", 0x100+i)), 8000), nameYourself)
	}
	s := play(t, r, "")
	same(t, "connections", runApp(t, r, "", "python3", "testdata/one_port.py"), "20 of 20\n20 of 20")
	if n := s.AllRelayed(t, 40); n != 40 {
		t.Errorf("%d connections, want 40", n)
	}
}

// TestNobodyThere dials a closed port, and an address that nobody has: connect
// fails as it would without Pillion, and the record says why.
func TestNobodyThere(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	r.Give(t, rig.Far4)
	r.Give(t, rig.Far6)
	s := play(t, r, "relay: {dial_timeout: 400ms, dial_budget: 1s}")
	for to, want := range map[netip.AddrPort]struct {
		end  flow.Reason
		says string
	}{
		at4(9):                           {flow.ReasonDialRefused, "connect: connection refused"},
		at6(9):                           {flow.ReasonDialRefused, "connect: connection refused"},
		netip.AddrPortFrom(rig.Void4, 9): {flow.ReasonAbandoned, "i/o timeout"},
	} {
		var q request
		if err := json.Unmarshal([]byte(goApp(t, r, "requests", "1", "1", "0s", to.String())), &q); err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(q.Err, want.says) || q.Answer != "" {
			t.Errorf("%s: answer %q, error %q, want %q", to, q.Answer, q.Err, want.says)
		}
		found := false
		testutil.Eventually(t, rig.Limit, func() bool {
			for _, rec := range s.Ended(t, 1) {
				found = found || rec.OrigDst == to && rec.Path == flow.PathRelay && rec.End == want.end && rec.Sent == 0 && rec.Received == 0
			}
			return found
		}, "a record of ", to, " that ended with ", want.end)
	}
	s.AllRelayed(t, 3)
}
