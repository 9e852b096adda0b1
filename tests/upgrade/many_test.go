package upgrade

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

var manyConns = flag.Int("many", 3000, "how many connections TestMany has")

// asking has connections that are asked for an echo, each for its own words, when a line
// comes in. It opens one when the one before has been answered: opened faster than they
// are accepted, some may find the queue three quarters full, and are not relayed (handler_busy).
const asking = `
import socket, sys
host, port, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
all = []
for i in range(n):
    all.append(socket.create_connection((host, port)))
    all[-1].settimeout(20)
    all[-1].sendall(b"!")
    assert all[-1].recv(1) == b"!"
print("open", flush=True)
for turn in sys.stdin:
    bad = []
    words = [b"%d of turn %d\n" % (i, int(turn)) for i in range(n)]
    for c, w in zip(all, words):
        try: c.sendall(w)
        except OSError as e: bad.append(str(e))
    for c, w in zip(all, words):
        try:
            got = b""
            while len(got) < len(w):
                b = c.recv(len(w) - len(got))
                if not b: raise OSError("end of file")
                got += b
            if got != w: bad.append("%r for %r" % (got, w))
        except OSError as e: bad.append(str(e))
    print("ok" if not bad else "%d: %s" % (len(bad), bad[:5]), flush=True)
`

// echo takes one descriptor: the library's own copying takes pipes besides.
func echo(c net.Conn) {
	for buf := make([]byte, 256); ; {
		n, err := c.Read(buf)
		if err == nil {
			_, err = c.Write(buf[:n])
		}
		if err != nil {
			return
		}
	}
}

// TestMany has as many connections move as fit, and with no more privileges than the
// shipped unit has: what is under way in a socket is counted against a limit then. A
// process that has no room for them is refused before anything stands still.
func TestMany(t *testing.T) {
	testutil.Need(t, "python3")
	r := rig.New(t)
	r.Home = r.Home.With(unix.CAP_BPF, unix.CAP_NET_ADMIN)
	to := r.Serve(t, ends[0], echo)
	i := r.Run(t, fmt.Sprintf("limits: {connections_per_container: 20000}\nservices: [{address: %q, endpoints: [%q]}]\n", vip, to))
	client := r.Command("python3", "-c", asking, vip.Addr().String(), fmt.Sprint(vip.Port()), fmt.Sprint(*manyConns))
	in, err := client.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := client.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs rig.Log
	client.Stderr = &errs
	if err := r.Start(client); err != nil {
		t.Fatal(err)
	}
	defer client.Wait()
	defer in.Close()
	lines, turn := bufio.NewReader(out), 0
	says := func(want string) {
		t.Helper()
		if line, err := lines.ReadString('\n'); err != nil || strings.TrimSpace(line) != want {
			t.Fatalf("turn %d: the application says %q, %v, %s\n%s", turn, line, err, errs.String(), i.Log())
		}
	}
	ask := func() {
		t.Helper()
		turn++
		fmt.Fprintln(in, turn)
		says("ok")
	}
	says("open")
	ask()

	binary := rig.Binary(t)
	before := i.Cmd.Process.Pid
	narrow := filepath.Join(t.TempDir(), "pillion")
	script := fmt.Sprintf("#!/bin/sh\nulimit -n %d\nexec %s \"$@\"\n", *manyConns, binary)
	if err := os.WriteFile(narrow, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	tight := i.Successor(t, narrow)
	if err := tight.Wait(); err == nil {
		t.Fatal("a process takes over that has no room for all connections")
	}
	if log := i.Log(); !strings.Contains(log, fmt.Sprintf("its %d open connections take", *manyConns)) {
		t.Errorf("it does not say why:\n%s", log)
	}
	// Not: it stood still, and goes on.
	testutil.Eventually(t, rig.Limit, func() bool { return strings.Contains(i.Log(), "the taker has not become ready") }, "the process before says so")
	if s, err := i.Status(context.Background()); err != nil || s.Pid != before || !s.Ready {
		t.Fatalf("the process before does not go on: %+v, %v", s, err)
	}
	ask()
	for range 2 {
		start := time.Now()
		i.Replace(t, binary)
		s, err := i.Status(context.Background())
		if err != nil || s.TakenOver == nil || s.TakenOver.Connections != *manyConns {
			t.Fatalf("taken over: %+v, %v", s.TakenOver, err)
		}
		t.Logf("%d connections paused for %v; in all it took %v", *manyConns, s.TakenOver.Pause.Round(time.Millisecond), time.Since(start).Round(time.Millisecond))
		ask()
	}
}
