package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// hello answers every connection with a line of HTTP.
func hello(body string) func(net.Conn) {
	return func(c net.Conn) {
		buf := make([]byte, 4096)
		if _, err := c.Read(buf); err != nil {
			return
		}
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
	}
}

// TestUnnamedDestination is the default: a destination that no service names is
// relayed to where it was going, for both families.
func TestUnnamedDestination(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "curl")
	r := rig.New(t)
	at4 := r.Serve(t, netip.AddrPortFrom(rig.Far4, 8080), hello("four"))
	at6 := r.Serve(t, netip.AddrPortFrom(rig.Far6, 8080), hello("six"))
	i := r.Run(t, "")
	if got := r.Output(t, "curl", "-sS", "-m10", "http://"+at4.String()+"/"); got != "four" {
		t.Errorf("IPv4: %q", got)
	}
	if got := r.Output(t, "curl", "-sS", "-m10", "-g", "http://"+at6.String()+"/"); got != "six" {
		t.Errorf("IPv6: %q", got)
	}
	records := i.Ended(t, 2)
	rig.Relayed(t, records)
	for _, rec := range records {
		if rec.OrigDst != rec.Endpoint || rec.Reason != flow.ReasonDefault || rec.End != flow.ReasonClosed || rec.Received == 0 {
			t.Errorf("record %+v", rec)
		}
	}
}

// TestExecService is the first example of the README.
func TestExecService(t *testing.T) {
	t.Parallel()
	testutil.Need(t, "curl")
	r := rig.New(t)
	a := r.Serve(t, netip.AddrPortFrom(rig.Far4, 8081), hello("a"))
	b := r.Serve(t, netip.AddrPortFrom(rig.Far4, 8082), hello("b"))
	out, stderr, err := r.Exec(t, []string{"--service", fmt.Sprintf("10.96.0.12:80=%s,%s", a, b), "--summary"},
		"sh", "-c", "for i in $(seq 32); do curl -sS http://10.96.0.12/; done")
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr)
	}
	if len(out) != 32 || strings.Count(out, "a") == 0 || strings.Count(out, "b") == 0 {
		t.Errorf("answers %q, want some of both", out)
	}
	if n := strings.Count(stderr, "10.96.0.12:80"); n < 32 {
		t.Errorf("%d lines of 32 in the summary:\n%s", n, stderr)
	}
	flows, err := r.Pillion(t, "flows", "-o", "json")
	// On a busy machine the handler may be late: these go by on_failure, and say so.
	relayed, late := strings.Count(flows, `"relay"`), strings.Count(flows, `"handler_stale"`)
	if err != nil || relayed < 24 || relayed+late != 32 {
		t.Errorf("flows: %v\n%s", err, flows)
	}
}

// TestBulkHashes moves random bytes both ways at once and compares their hashes.
func TestBulk(t *testing.T) {
	testutil.Need(t, "python3")
	r := rig.New(t)
	at := r.Serve(t, netip.AddrPortFrom(rig.Far4, 9000), func(c net.Conn) { io.Copy(c, c) })
	i := r.Run(t, "")
	out := r.Output(t, "python3", "-c", `
import socket, hashlib, os, threading, sys
s = socket.create_connection(("198.51.100.7", 9000))
block = os.urandom(1 << 20)
n = 256
sent = hashlib.sha256(); got = hashlib.sha256()
def send():
    for i in range(n):
        s.sendall(block); sent.update(block)
    s.shutdown(socket.SHUT_WR)
t = threading.Thread(target=send); t.start()
total = 0
while True:
    b = s.recv(1 << 20)
    if not b: break
    got.update(b); total += len(b)
t.join()
print(total == n << 20 and sent.digest() == got.digest())
`)
	if strings.TrimSpace(out) != "True" {
		t.Errorf("bytes differ: %s", out)
	}
	rig.Relayed(t, i.Ended(t, 1))
	_ = at
}
