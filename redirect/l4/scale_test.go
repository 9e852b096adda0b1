package l4_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// needDescriptors skips the test where a process may not have that many.
func needDescriptors(t testing.TB, n uint64) {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Cur < n {
		t.Skipf("needs %d descriptors, the limit is %d", n, limit.Cur)
	}
}

func TestManyConnectionsAtOnce(t *testing.T) {
	const n = 2000
	needDescriptors(t, 4*n+200)
	families(t, func(t *testing.T, loopback netip.Addr) {
		r := newRig(t, setup{loopback: loopback, workers: 2, endpoints: []netip.AddrPort{serve(t, loopback, echo)}})
		conns := make([]*net.TCPConn, n)
		for i := range conns {
			conns[i] = r.dial()
		}
		results := make(chan error, n)
		open := make(chan struct{})
		var up sync.WaitGroup
		up.Add(n)
		for i, c := range conns {
			go exchangeTwice(c, i, &up, open, results)
		}
		up.Wait()
		if live := r.relay.Stats().Live; live != n {
			t.Errorf("%d connections are open, want %d", live, n)
		}
		close(open)
		for range n {
			if err := receive(t, results); err != nil {
				t.Error(err)
			}
		}
		for _, rec := range r.awaitEnded(n) {
			if rec.End != flow.ReasonClosed || rec.Sent != rec.Received {
				t.Errorf("record: %+v", rec)
			}
		}
	})
}

func exchangeTwice(c *net.TCPConn, i int, up *sync.WaitGroup, open <-chan struct{}, result chan<- error) {
	err := exchange(c, fmt.Appendf(nil, "I am %d", i))
	up.Done()
	<-open
	err = errors.Join(err, exchange(c, randomBytes(1000+i)), c.CloseWrite())
	rest, end := io.ReadAll(c)
	if len(rest) > 0 {
		err = errors.Join(err, fmt.Errorf("%d bytes too many", len(rest)))
	}
	result <- errors.Join(err, end, c.Close())
}

// 20,000 short connections, and not one wrong byte: with listings, statistics
// and garbage collections all the time.
func TestManyShortConnections(t *testing.T) {
	testutil.CheckLeaks(t)
	const n, clients = 20000, 50
	r := newRig(t, setup{workers: 2, endpoints: []netip.AddrPort{serve(t, loopback4, echo), serve(t, loopback4, echo)}})
	over := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() { watch(r.relay, over) })
	var running sync.WaitGroup
	var failed atomic.Int64
	for client := range clients {
		running.Go(func() {
			for i := range n / clients {
				if err := shortConnection(r, client*n+i); err != nil {
					if failed.Add(1) < 5 {
						t.Errorf("connection %d of client %d: %v", i, client, err)
					}
				}
			}
		})
	}
	running.Wait()
	close(over)
	watching.Wait()
	if s := r.relay.Stats(); s.Accepted != n {
		t.Errorf("%d connections were accepted, want %d", s.Accepted, n)
	}
	var sent uint64
	for _, rec := range r.awaitEnded(n) {
		if rec.Sent != rec.Received || rec.End != flow.ReasonClosed {
			t.Fatalf("record: %+v", rec)
		}
		sent += rec.Sent
	}
	if sent == 0 {
		t.Error("the records tell of no byte")
	}
}

func shortConnection(r *rig, id int) error {
	c, err := r.tryDial()
	if err != nil {
		return err
	}
	defer c.Close()
	random := rand.New(rand.NewPCG(uint64(id), 1))
	b := make([]byte, 1+random.IntN(3000))
	for i := range b {
		b[i] = byte(random.Uint32())
	}
	if err := exchange(c, b); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	rest, err := io.ReadAll(c)
	if len(rest) > 0 {
		err = errors.Join(err, errors.New("bytes of somebody else"))
	}
	return err
}

// watch looks at a relay in every way, and collects garbage, until over.
func watch(r *l4.Relay, over <-chan struct{}) {
	for {
		select {
		case <-over:
			return
		default:
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		r.Live(ctx)
		cancel()
		r.Stats()
		r.Backlog()
		runtime.GC()
	}
}

// Garbage collections stop every thread, also one that waits for events.
func TestGarbageCollectionWhileIdle(t *testing.T) {
	testutil.CheckLeaks(t)
	r := newRig(t, setup{workers: 2, endpoints: []netip.AddrPort{serve(t, loopback4, echo)}})
	c := r.dial()
	mustExchange(t, c, "then idle")
	start := time.Now()
	for range 50 {
		runtime.GC()
	}
	if took := time.Since(start); took > patience {
		t.Errorf("50 collections took %v", took)
	}
	mustExchange(t, c, "still there")
}

// Descriptors are closed and used again within one batch of events, by
// connections, refused dials and resets: no event may reach the wrong one.
func TestDescriptorReuse(t *testing.T) {
	families(t, func(t *testing.T, loopback netip.Addr) {
		server := serve(t, loopback, echo)
		resets := serve(t, loopback, func(c *net.TCPConn) {
			_, _ = c.Read(make([]byte, 1))
			reset(c)
		})
		r := newRig(t, setup{
			loopback: loopback, perWorker: 2, direct: twoClusters,
			endpoints: []netip.AddrPort{refusing(t, loopback), server, refusing(t, loopback)},
			others:    []netip.AddrPort{resets},
		})
		var running sync.WaitGroup
		for client := range 32 {
			running.Go(func() {
				for i := range 100 {
					if err := stormConnection(r, client*1000+i); err != nil {
						t.Errorf("connection %d of client %d: %v", i, client, err)
						return
					}
				}
			})
		}
		running.Wait()
	})
}

// stormConnection is a good connection, one that the server resets, or one that
// the application gives up at some point.
func stormConnection(r *rig, id int) error {
	kind := id % 4
	c, err := dialTo(r.listeners[kind/3])
	if err != nil {
		return err
	}
	defer c.Close()
	b := fmt.Appendf(nil, "I am %d", id)
	switch kind {
	case 0, 1:
		return exchange(c, b)
	case 2:
		_, err := c.Write(b)
		reset(c)
		return err
	default:
		if _, err := c.Write(b[:1]); err != nil {
			return err
		}
		return checkReset(c, nil)
	}
}

// A worker with idle connections sleeps.
func TestIdleCostsNoCPU(t *testing.T) {
	const n = 1000
	needDescriptors(t, 4*n+200)
	testutil.CheckLeaks(t)
	r := newRig(t, setup{endpoints: []netip.AddrPort{serve(t, loopback4, echo)}})
	for range n {
		mustExchange(t, r.dial(), "then idle")
	}
	testutil.Eventually(t, patience, func() bool { return settled(t) }, "the process is idle")
	cpu := cpuTime(t)
	<-time.After(2 * time.Second)
	cpu = cpuTime(t) - cpu
	if !r.relay.Moved() {
		t.Error("a worker that waits counts as one that hangs")
	}
	if cpu > 100*time.Millisecond {
		t.Errorf("an idle process used %v in 2s", cpu)
	}
}

// settled tells whether nothing much runs.
func settled(t testing.TB) bool {
	t.Helper()
	before := cpuTime(t)
	<-time.After(100 * time.Millisecond)
	return cpuTime(t)-before < 5*time.Millisecond
}

func cpuTime(t testing.TB) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// An idle connection costs at most 512 bytes. The ends are raw sockets, so that
// what the heap grows by is the relay's.
func TestMemoryPerIdleConnection(t *testing.T) {
	testutil.CheckLeaks(t)
	n := 5000
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	n = min(n, int(limit.Cur-200)/4)
	if n < 1000 {
		t.Skipf("the limit of descriptors, %d, is too low", limit.Cur)
	}
	ln, addr := boundSocket(t, loopback4)
	if err := unix.Listen(ln, 4096); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, setup{endpoints: []netip.AddrPort{addr}})
	ends := make([]int, 0, 2*n)
	t.Cleanup(func() {
		for _, fd := range ends {
			unix.Close(fd)
		}
	})
	// The relay's own table goes by descriptor number: like in a process of its
	// own, it has the low ones.
	keep := func(fd int) int {
		high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 2*n+100)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		ends = append(ends, high)
		return high
	}
	to := sockaddrOf(r.listeners[0])
	rawPair := func() {
		c, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		c = keep(c)
		if err := unix.Connect(c, to); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(c, []byte("then idle")); err != nil {
			t.Fatal(err)
		}
		s, _, err := unix.Accept4(ln, unix.SOCK_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		s = keep(s)
		var b [16]byte
		if n, err := unix.Read(s, b[:]); err != nil || n != 9 {
			t.Fatalf("read %d bytes: %v", n, err)
		}
	}
	rawPair() // what is made once is made now
	before := heapBytes()
	for len(ends) < 2*n {
		rawPair()
	}
	each := (heapBytes() - before) / int64(n-1)
	t.Logf("%d bytes for each of %d connections", each, n)
	if each > 512 {
		t.Errorf("%d bytes per idle connection, want at most 512", each)
	}
	if live := r.relay.Stats().Live; live != n {
		t.Errorf("%d connections are open, want %d", live, n)
	}
}

func heapBytes() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
