package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// TestSendAndForget has an application connect, send and close before the
// handler gets to run, as happens on a busy machine. What it sent arrives, as it
// does without Pillion.
func TestSendAndForget(t *testing.T) {
	testutil.Need(t, "python3")
	r := rig.New(t)
	var conns, bytes atomic.Int64
	r.Serve(t, at4(8080), func(c net.Conn) {
		n, _ := io.Copy(io.Discard, c)
		bytes.Add(n)
		conns.Add(1)
	})
	i := r.Run(t, "connect: early")

	const rounds, each = 10, 10
	cmd := r.Command("python3", "-c", `
import socket
print("ready", flush=True)
while input():
    for _ in range(10):
        s = socket.create_connection(("198.51.100.7", 8080))
        s.sendall(b"sixteen bytes...")
        s.close()
    print("done", flush=True)
`)
	in, out := testutil.Pipes(t, cmd)
	if err := r.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	said := bufio.NewScanner(out)
	said.Scan() // ready
	for range rounds {
		// If this takes too long, connections are passed by; they arrive
		// all the same.
		i.Halt(t)
		fmt.Fprintln(in, "go")
		said.Scan()
		i.Signal(t, unix.SIGCONT)
		if said.Text() != "done" {
			t.Fatalf("the application says %q", said.Text())
		}
	}
	i.Idle(t)
	got := number(0)
	testutil.Eventually(t, rig.Limit, func() bool {
		got = number(conns.Load())
		return got == rounds*each
	}, "the server has had ", rounds*each, " connections; it had ", &got)
	if n := bytes.Load(); n != 16*rounds*each {
		t.Errorf("the server got %d bytes, want %d", n, 16*rounds*each)
	}
}

// lingers is longer than the halves of a record wait for each other.
const lingers = 3 * time.Second

// TestServerOutlivesApplication has an application that is gone while the
// server still holds its end: one connection, one record.
func TestServerOutlivesApplication(t *testing.T) {
	testutil.Need(t, "python3")
	r := rig.New(t)
	r.Serve(t, at4(8080), func(c net.Conn) {
		io.Copy(io.Discard, c)
		time.Sleep(lingers)
	})
	i := r.Run(t, "")
	runApp(t, r, "", "python3", "-c", `
import socket
s = socket.create_connection(("198.51.100.7", 8080))
s.sendall(b"sixteen bytes...")
s.close()
`)
	i.Idle(t)
	records := i.Ended(t, 1)
	if len(records) != 1 || records[0].End != flow.ReasonClosed || records[0].Sent != 16 {
		t.Errorf("records of one connection: %+v", records)
	}
}
