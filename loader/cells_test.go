package loader

import (
	"errors"
	"maps"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

func cookieOf(t testing.TB, fd int) uint64 {
	t.Helper()
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		t.Fatal(err)
	}
	return cookie
}

// mapped maps cells until the test has ended.
func mapped(t testing.TB, open func() (*cells, error)) *cells {
	t.Helper()
	c, err := open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// decisionOn gives the decision on a socket, and tells whether that has a cell.
func decisionOn(t testing.TB, d *Datapath, fd int) (v bpf.Decision, cell bool) {
	t.Helper()
	if raw := mapped(t, d.openCells).of(cookieOf(t, fd)); raw != nil {
		return valueAs[bpf.Decision](raw), true
	}
	if err := d.maps.Decisions.Lookup(uint32(fd), &v); err != nil {
		t.Fatal(err)
	}
	return v, false
}

// withoutCell moves the decision on a socket from its cell to socket storage.
func withoutCell(t testing.TB, d *Datapath, fd int) {
	t.Helper()
	cookie := cookieOf(t, fd)
	v, cell := decisionOn(t, d, fd)
	if !cell {
		t.Fatal("the socket has no cell")
	}
	v.Owner = 0
	if err := d.maps.Decisions.Put(uint32(fd), v); err != nil {
		t.Fatal(err)
	}
	mapped(t, d.openCells).ownerAt(int(cookie % bpf.Cells)).Store(0)
}

// fdOf gives the descriptor of a connection, which stays open until the test ends.
func fdOf(t testing.TB, c net.Conn) (n int) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) { n = int(fd) }); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestLeaveCells: others may take the cells of those that are gone for long, and of nobody
// else; rows follow.
func TestLeaveCells(t *testing.T) {
	p := newPlace(t)
	p.App.Sysctl(t, "net/ipv4/tcp_fastopen", "5")
	at := netip.AddrPortFrom(testutil.WorldV4.Addr(), 8001)
	d, _ := p.direct(t, shop, at)
	own, rows := mapped(t, d.openCells), mapped(t, d.openSent)
	leave := func() {
		t.Helper()
		d.mu.Lock()
		defer d.mu.Unlock()
		if err := d.leaveCells(); err != nil {
			t.Fatal(err)
		}
	}
	if wait := cellMinAge + time.Second - time.Duration(d.monotonic()); wait > 0 {
		t.Logf("the machine has only just started: nothing is old for another %v", wait)
		time.Sleep(wait)
	}
	now := uint64(d.monotonic())
	long, lately := now-uint64(2*cellMinAge), now-uint64(cellMinAge/2)
	if now < uint64(2*cellMinAge) {
		long = 1
	}

	// Those that are there.
	living := map[string]uint64{}
	for _, name := range []string{"open", "left"} {
		c, err := p.open(t, shop)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		living[name] = cookieOf(t, fdOf(t, c))
	}
	var deferred int
	p.inScope(t, func() {
		p.App.Do(t, func() (err error) {
			if err := testutil.Pin(); err != nil {
				return err
			}
			deferred, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			return errors.Join(err, unix.SetsockoptInt(deferred, unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT, 1),
				unix.Connect(deferred, &unix.SockaddrInet4{Addr: shop.Addr().As4(), Port: int(shop.Port())}))
		})
	})
	defer unix.Close(deferred)
	living["deferred"] = cookieOf(t, deferred)
	busy := map[int]bool{}
	for name, cookie := range living {
		n := int(cookie % bpf.Cells)
		busy[n] = true
		if owner := own.ownerAt(n).Load(); owner != cookie {
			t.Fatalf("%s: the cell of %d is %d's", name, cookie, owner)
		}
		own.openedAt(n).Store(long)
		if name == "left" {
			own.ownerAt(n).Store(cookie | bpf.CellLeft)
		}
	}
	if v := valueAs[bpf.Decision](own.of(living["deferred"])); v.Pending != 1 {
		t.Errorf("deferred: %+v", v)
	}
	// Those that are gone: of each a cell and a row.
	next := 0
	gone := func(opened uint64, cell bool) (cookie uint64, n int) {
		for next++; busy[next]; next++ {
		}
		cookie = 1<<50 + uint64(next)
		own.openedAt(next).Store(opened)
		if cell {
			own.ownerAt(next).Store(cookie)
		}
		rows.ownerAt(next).Store(cookie)
		return cookie, next
	}
	expect := func(when string, n int, cell, sent uint64) {
		t.Helper()
		if owner := own.ownerAt(n).Load(); owner != cell {
			t.Errorf("%s: the cell is %#x's, want %#x", when, owner, cell)
		}
		if owner := rows.ownerAt(n).Load(); owner != sent {
			t.Errorf("%s: the row is %#x's, want %#x", when, owner, sent)
		}
	}
	old, oldCell := gone(long, true)
	young, youngCell := gone(lately, true)
	_, noCell := gone(long, false)
	for range 2 {
		leave()
		for _, name := range []string{"open", "left"} {
			owner := living[name]
			if name == "left" {
				owner |= bpf.CellLeft // until a hook runs for it
			}
			expect(name, int(living[name]%bpf.Cells), owner, living[name])
		}
		if owner := own.ownerAt(int(living["deferred"] % bpf.Cells)).Load(); owner != living["deferred"] {
			t.Errorf("deferred: the cell is %#x's", owner)
		}
		expect("young", youngCell, young, young)
		expect("without a cell", noCell, 0, 0)
		expect("gone", oldCell, old|bpf.CellLeft, 0)
	}

	// It is looked for as often as counts are.
	again, againCell := gone(long, true)
	d.counts.last = time.Now()
	if err := d.tidy(); err != nil {
		t.Fatal(err)
	}
	expect("too early", againCell, again, again)
	d.counts.last = time.Now().Add(-countEvery)
	if err := d.tidy(); err != nil {
		t.Fatal(err)
	}
	expect("a minute later", againCell, again|bpf.CellLeft, 0)

	// The deferred one is sent by the first write, however late.
	before := stats(t, d)
	if _, err := unix.Write(deferred, []byte{1}); err != nil {
		t.Fatal(err)
	}
	after := stats(t, d)
	if after.Connects-before.Connects != 1 || after.Escaped != 0 || after.Unaccounted() != 0 || before.Unaccounted() != -1 {
		t.Errorf("%+v, before %+v", after, before)
	}
	for _, n := range []int{oldCell, youngCell, againCell} {
		own.ownerAt(n).Store(0)
		rows.ownerAt(n).Store(0)
	}
}

// TestListedAlike: who has a cell and who has storage is listed, and ended, alike.
func TestListedAlike(t *testing.T) {
	p := newPlace(t)
	at, straight := netip.AddrPortFrom(testutil.WorldV4.Addr(), 8001), netip.AddrPortFrom(testutil.WorldV4.Addr(), 8002)
	d, _ := p.direct(t, shop, at)
	rules := withServices(map[netip.AddrPort]*flow.Set{shop: setOf(at)})
	rules.Default = flow.PathPass
	setRules(t, d, rules)
	serve(t, p.World, straight)
	own, rows := mapped(t, d.openCells), mapped(t, d.openSent)
	listed := func() map[uint64]flow.Record {
		all := map[uint64]flow.Record{}
		for _, r := range connections(t, d) {
			r.Start, r.Duration, r.RTT = time.Time{}, 0, 0
			all[r.Cookie] = r
		}
		return all
	}
	var fds []int
	var conns []net.Conn
	open := func(to netip.AddrPort) {
		t.Helper()
		c, err := p.open(t, to)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		fds, conns = append(fds, fdOf(t, c)), append(conns, c)
	}
	for range 2 {
		open(shop)
		open(straight)
	}
	before := listed()
	withoutCell(t, d, fds[0])
	withoutCell(t, d, fds[1])
	if after := listed(); len(before) != 4 || !maps.Equal(before, after) {
		t.Errorf("listed %+v, when all had cells %+v", after, before)
	}
	// Who never had one.
	for n := range own.count {
		own.ownerAt(n).CompareAndSwap(0, 1<<50+uint64(n))
	}
	open(shop)
	open(straight)
	for n := range own.count {
		own.ownerAt(n).CompareAndSwap(1<<50+uint64(n), 0)
	}
	all := listed()
	for i, fd := range fds {
		_, cell := decisionOn(t, d, fd)
		if want := i == 2 || i == 3; cell != want {
			t.Errorf("number %d has a cell: %v", i, cell)
		}
		r, ok := all[cookieOf(t, fd)]
		want := flow.Record{OrigDst: shop, Endpoint: at, Path: flow.PathDirect}
		if i%2 == 1 {
			want = flow.Record{OrigDst: straight, Endpoint: straight, Path: flow.PathPass}
		}
		if !ok || r.OrigDst != want.OrigDst || r.Endpoint != want.Endpoint || r.Path != want.Path || r.Cgroup != p.scope.ID ||
			r.Source != conns[i].LocalAddr().(*net.TCPAddr).AddrPort() || r.Connect <= 0 {
			t.Errorf("number %d: %+v", i, r)
		}
	}
	if n := stateOf(t, d, shop, at).Live; len(all) != 6 || n != 3 {
		t.Errorf("%d are listed, %d counted", len(all), n)
	}
	// A dump finds the one that others may take.
	third := own.ownerAt(int(cookieOf(t, fds[2]) % bpf.Cells))
	third.Store(third.Load() | bpf.CellLeft)
	if n, err := d.End(shop, at); n != 3 || err != nil {
		t.Errorf("ended %d: %v", n, err)
	}
	testutil.Eventually(t, patience, func() bool { return stateOf(t, d, shop, at).Live == 0 && len(listed()) == 3 }, "three are left")
	if n, err := d.End(shop, at); n != 0 || err != nil {
		t.Errorf("ended %d again: %v", n, err)
	}
	for n := range rows.count {
		if owner := rows.ownerAt(n).Load(); owner != 0 {
			t.Errorf("row %d of sent is %d's", n, owner)
		}
	}
}

// TestStored counts the decisions that have no cell.
func TestStored(t *testing.T) {
	p := newPlace(t)
	d, _ := p.direct(t, shop, netip.AddrPortFrom(testutil.WorldV4.Addr(), 8001))
	connect := func() {
		t.Helper()
		if err := p.connect(t, shop); err != nil {
			t.Fatal(err)
		}
	}
	before := stats(t, d)
	connect()
	own, foreign := mapped(t, d.openCells), uint64(1<<62)
	for n := range own.count {
		own.ownerAt(n).CompareAndSwap(0, foreign)
	}
	connect()
	connect()
	for n := range own.count {
		own.ownerAt(n).CompareAndSwap(foreign, 0)
	}
	connect()
	after := stats(t, d)
	if stored, decided := after.Stored-before.Stored, after.Decided-before.Decided; stored != 2 || decided != 4 {
		t.Errorf("%d of %d decisions are in storage, want 2 of 4", stored, decided)
	}
}
