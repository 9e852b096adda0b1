package app

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// lasting and ending are all kinds with a head.
var (
	lasting = []Kind{Echo, Urgent, Marked, Stream, Duplex, Half, FarHalf, Blocked, Stuffed, Idle}
	ending  = []Kind{Once, Both, AppFirst, FarFirst, AppResets, FarResets}
)

// listen serves until the end of the test.
func listen(t *testing.T, serve func(net.Conn)) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				serve(c)
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		all.Wait()
	})
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// TestKinds has a connection of each kind, of which both sides count the same.
func TestKinds(t *testing.T) {
	server := NewServer("somebody")
	to := []netip.AddrPort{listen(t, server.Serve)}
	l := start(&Load{
		To: to, Named: true, Stay: 2 * len(lasting), Kinds: lasting, Every: time.Millisecond,
		Come: 3, Visits: append([]Kind{Greet, Empty}, ending...), Most: 50_000,
	}, rig.Limit)
	var turn *Report
	answered := map[int]bool{} // of those that answer
	testutil.Eventually(t, rig.Limit, func() bool {
		turn = l.turn(false)
		for n, took := range turn.Slowest {
			answered[n] = answered[n] || took > 0
		}
		return turn.Opened > 2*len(lasting)+200 && len(answered) == 4 && !slices.Contains(slices.Collect(maps.Values(answered)), false)
	}, "connections come, and are answered")
	server.Finish()
	r := l.unload()
	r.Check(t)
	server.Check(t)
	if len(turn.Failed)+len(turn.Broken) > 0 || len(turn.Stayed)+len(turn.Came) > 0 || len(turn.Slowest) != 4 {
		t.Errorf("meanwhile: %+v", turn)
	}
	if len(r.Stayed) != 2*len(lasting) || len(r.Came) == 0 || r.Names["somebody"]+len(r.Stayed) != r.Opened || r.Rounds == 0 || r.Bytes == 0 {
		t.Errorf("in the end: %+v", r)
	}
	all := slices.Concat(r.Stayed, r.Came)
	var seen map[uint32]Bytes
	testutil.Eventually(t, rig.Limit, func() bool {
		seen = server.Seen()
		return !slices.ContainsFunc(all, func(c Conn) bool { _, ok := seen[c.ID]; return !ok })
	}, "the server has seen all")
	kinds := map[Kind]bool{}
	for _, c := range all {
		kinds[c.Kind] = true
		if got := seen[c.ID]; got != c.Bytes || c.Up+c.Down == 0 {
			t.Errorf("%d (%c): the server counts %+v, the application %+v", c.ID, c.Kind, got, c.Bytes)
		}
	}
	if want := len(lasting) + len(ending) - 2; len(kinds) != want { // but for resets
		t.Errorf("%d kinds were seen, want %d", len(kinds), want)
	}
}

// TestSpoiled has a byte lost, doubled or changed, in either direction of each kind:
// one of the two sides says so.
func TestSpoiled(t *testing.T) {
	for name, how := range map[string]func([]byte) []byte{
		"lost":    func([]byte) []byte { return nil },
		"doubled": func(b []byte) []byte { return []byte{b[0], b[0]} },
		"changed": func(b []byte) []byte { return []byte{b[0] ^ 1} },
	} {
		for _, kind := range slices.Concat(lasting, ending[:4]) {
			for _, up := range []bool{true, false} {
				if !up && (kind == FarHalf || kind == Stuffed) {
					continue // nothing comes
				}
				t.Run(fmt.Sprintf("%s %c %v", name, kind, up), func(t *testing.T) { spoiled(t, kind, up, how) })
			}
		}
	}
}

func spoiled(t *testing.T, kind Kind, up bool, how func([]byte) []byte) {
	const place = 2
	server := NewServer("")
	from := listen(t, server.Serve)
	to := listen(t, func(c net.Conn) {
		far, err := net.Dial("tcp", from.String())
		if err != nil {
			t.Error(err)
			return
		}
		defer far.Close()
		there, back := ill(HeadSize+place, how), ill(-1, how)
		if !up {
			there, back = ill(-1, how), ill(place, how)
		}
		var both sync.WaitGroup
		both.Go(func() { carry(far, c, there) })
		carry(c, far, back)
		both.Wait()
	})
	l := start(&Load{To: []netip.AddrPort{to}, Every: time.Millisecond}, rig.Limit)
	if slices.Contains(ending, kind) {
		if err := l.visit(to, head{Kind: kind, Up: 1000, Down: 1000}); err != nil {
			return
		}
	} else {
		l = start(&Load{To: []netip.AddrPort{to}, Stay: 1, Kinds: []Kind{kind}, Every: time.Millisecond}, rig.Limit)
	}
	server.Finish()
	if r := l.unload(); len(r.Broken) > 0 {
		return
	}
	testutil.Eventually(t, rig.Limit, func() bool { return len(server.Seen()) > 0 }, "the server has seen it")
	if len(server.errs) == 0 {
		t.Error("nobody has noticed")
	}
}

// carry passes on what comes, and the end; when one side fails, both do.
func carry(to, from net.Conn, spoil func([]byte) []byte) {
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		if _, werr := to.Write(spoil(b[:n])); werr != nil {
			from.Close()
			return
		}
		if err != nil {
			to.(*net.TCPConn).CloseWrite()
			return
		}
	}
}

// ill spoils the nth byte.
func ill(n int, how func([]byte) []byte) func([]byte) []byte {
	return func(b []byte) []byte {
		m := n
		n -= len(b)
		if m < 0 || m >= len(b) {
			return b
		}
		return slices.Concat(b[:m], how(b[m:m+1]), b[m+1:])
	}
}
