package l4_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/l4"
	"golang.org/x/sys/unix"
)

// memoryOf is what outlives a process with a registry.
func memoryOf(t testing.TB) int {
	t.Helper()
	fd, err := unix.MemfdCreate("pillion", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// openRegistry is what a process begins with.
func openRegistry(t testing.TB, memory int) *l4.Registry {
	t.Helper()
	r, err := l4.OpenRegistry(memory, 0)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// What was written down of connections that another process has still is forgotten
// without a trace, and that one goes on with every byte.
func TestForsake(t *testing.T) {
	server, conns := serveTo(t, loopback4)
	r := newRig(t, setup{endpoints: []netip.AddrPort{server}})
	c := r.dial()
	b := randomBytes(12 << 20)
	done := make(chan error, 1)
	go func() {
		_, err := c.Write(b)
		done <- err
	}()
	s := accept(t, conns)
	wantBytes(t, s, b[:100])
	idle := r.dial()
	time.Sleep(20 * time.Millisecond) // bytes are under way, as a rule
	f := r.freeze()
	f.Copied()
	g := encoded(t, f)
	memory := memoryOf(t)
	before := openRegistry(t, memory)
	before.SetListeners([2][]int{{1000}, {}})
	before.SetTaking(l4.TakingHas, 7)
	before.Keep(g)
	after := openRegistry(t, memory)
	if how, fd := after.Taking(); how != l4.TakingHas || fd != 7 {
		t.Errorf("it was at %v, with descriptor %d", how, fd)
	}
	known := after.Names()
	for _, k := range g.Conns {
		if !known[k.Down.FD] || k.Up.FD >= 0 && !known[k.Up.FD] || k.Down.PipeRead >= 0 && !known[k.Down.PipeRead] {
			t.Errorf("not all of %+v are known: %v", k, known)
		}
	}
	after.Forsake()
	if again := openRegistry(t, memory); len(again.Names())+len(again.Recover(false).Conns) > 0 {
		t.Errorf("descriptors %v and connections %v are left", again.Names(), again.Recover(false).Conns)
	}
	closeAll(g)
	f.Thaw()
	wantBytes(t, s, b[100:])
	if err := <-done; err != nil {
		t.Error(err)
	}
	c.Close()
	wantEOF(t, s)
	s.Close()
	other := accept(t, conns)
	mustWrite(t, idle, []byte("hello"))
	wantBytes(t, other, []byte("hello"))
	idle.Close()
	other.Close()
	r.awaitEnded(2)
	r.close()
}
