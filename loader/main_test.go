package loader

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if os.Getenv(envCrash) != "" {
		crash()
	}
	if os.Getenv(envPublish) != "" {
		publishForever()
	}
	if os.Getenv(envFind) != "" {
		findPodHere()
	}
	testutil.Main(m)
}

// place is where a test's instances live: a namespace, a cgroup and a bpf file
// system that nobody else uses.
type place struct {
	*testutil.Pair
	scope *testutil.Cgroup
	root  string // of the cgroup hierarchy
	bpffs string
}

func newPlace(t *testing.T) *place {
	t.Helper()
	testutil.CheckLeaks(t)
	p := &place{Pair: testutil.NewPair(t), scope: testutil.NewCgroup(t), root: testutil.CgroupRoot(t), bpffs: t.TempDir()}
	t.Cleanup(func() {
		if err := unix.Unmount(p.bpffs, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Errorf("unmount: %v", err)
			unix.Unmount(p.bpffs, unix.MNT_DETACH) // a failed test has not closed all
		}
	})
	return p
}

// options are those of an instance here. Call it inside the namespace.
func (p *place) options(name string) (Options, error) {
	scope, err := FindScope(p.root, p.scope.Path)
	return Options{Name: name, Kind: KindRun, Scope: scope, BPFFS: p.bpffs}, err
}

// do calls f inside the namespace with the options of an instance.
func (p *place) do(t testing.TB, name string, f func(Options) error) error {
	t.Helper()
	return p.App.Run(func() error {
		o, err := p.options(name)
		if err != nil {
			return err
		}
		return f(o)
	})
}

// create makes an instance, which is unloaded at the end of the test unless it
// was closed.
func (p *place) create(t testing.TB, name string, change ...func(*Options)) *Datapath {
	t.Helper()
	var d *Datapath
	err := p.do(t, name, func(o Options) (err error) {
		for _, c := range change {
			c(&o)
		}
		d, err = Create(o)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// unload ends an instance.
func (p *place) unload(t testing.TB, d *Datapath) {
	t.Helper()
	if err := d.Unload(); err != nil {
		t.Error(err)
	}
}

// attach makes an instance live.
func (p *place) attach(t testing.TB, d *Datapath) []Existing {
	t.Helper()
	var old []Existing
	err := p.App.Run(func() (err error) {
		if _, err := d.Sync(); err != nil {
			return err
		}
		old, err = d.Attach()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return old
}

// pins returns the names of an instance's pins.
func (p *place) pins(name string) []string {
	all, _ := filepath.Glob(filepath.Join(p.bpffs, "pillion", name, "*"))
	for n := range all {
		all[n] = filepath.Base(all[n])
	}
	return all
}

// routes returns the slot routes of the namespace.
func (p *place) routes(t testing.TB) (all []string) {
	t.Helper()
	p.App.Do(t, func() error {
		list, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
		for i := range list {
			if to, ok := routePrefix(&list[i]); ok && inSupernet(to.Addr()) {
				all = append(all, to.String())
			}
		}
		return err
	})
	return all
}

// clean fails the test if anything is left.
func (p *place) clean(t testing.TB) {
	t.Helper()
	if left, _ := filepath.Glob(filepath.Join(p.bpffs, "pillion*")); len(left) > 0 {
		inside, _ := filepath.Glob(filepath.Join(p.bpffs, "pillion", "*", "*"))
		t.Errorf("pins are left: %v %v", left, inside)
	}
	if left := p.routes(t); len(left) > 0 {
		t.Errorf("routes are left: %v", left)
	}
}

// handler stands for the relay: it listens where slots lead to, and beats.
func (p *place) handler(t testing.TB, d *Datapath) {
	t.Helper()
	var fds [2][]int
	v4, v6 := d.ListenAddrs()
	p.App.Do(t, func() error {
		for n, a := range []netip.Addr{v4, v6} {
			fd, err := listen(a)
			if err != nil {
				return err
			}
			t.Cleanup(func() { unix.Close(fd) })
			fds[n] = append(fds[n], fd)
		}
		return nil
	})
	if err := d.SetListeners(fds[0], fds[1]); err != nil {
		t.Fatal(err)
	}
	if err := d.Beat(true, false, int64(time.Hour)); err != nil {
		t.Fatal(err)
	}
}

func listen(a netip.Addr) (int, error) {
	family, sa := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: a.As16()})
	level, option := unix.IPPROTO_IPV6, unix.IPV6_FREEBIND
	if a.Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Addr: a.As4()}
		level, option = unix.IPPROTO_IP, unix.IP_FREEBIND
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	err = errors.Join(unix.SetsockoptInt(fd, level, option, 1), unix.Bind(fd, sa), unix.Listen(fd, 128))
	if err != nil {
		unix.Close(fd)
	}
	return fd, err
}

// connect connects from inside the scope, and closes the connection.
func (p *place) connect(t testing.TB, to netip.AddrPort) error {
	t.Helper()
	c, err := p.open(t, to)
	if err == nil {
		c.Close()
	}
	return err
}

// open connects from inside the scope.
func (p *place) open(t testing.TB, to netip.AddrPort, change ...func(*net.Dialer)) (net.Conn, error) {
	t.Helper()
	var c net.Conn
	var err error
	p.inScope(t, func() {
		err = p.App.Run(func() (err error) {
			if err := testutil.Pin(); err != nil {
				return err
			}
			d := net.Dialer{Timeout: patience}
			d.SetMultipathTCP(false)
			for _, f := range change {
				f(&d)
			}
			c, err = d.DialContext(context.Background(), "tcp", to.String())
			return err
		})
	})
	return c, err
}

// inScope calls f inside the scope: a thread of a process cannot be in a cgroup of
// its own, so the whole test moves there for a moment.
func (p *place) inScope(t testing.TB, f func()) {
	t.Helper()
	home := "0::"
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		if rest, ok := strings.CutPrefix(line, "0::"); ok {
			home = filepath.Join(p.root, rest)
		}
	}
	enter := func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			t.Fatal(err)
		}
	}
	enter(p.scope.Path)
	defer enter(home)
	f()
}

// reason returns a counter of the kernel side.
func reason(t testing.TB, d *Datapath, r flow.Reason) uint64 {
	t.Helper()
	return stats(t, d).Reasons[r]
}

func stats(t testing.TB, d *Datapath) Stats {
	t.Helper()
	s, err := d.Stats()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// slotOf returns the slot of an address, and what is in it.
func slotOf(t testing.TB, d *Datapath, a netip.Addr) (n uint32, s bpf.Slot, ok bool) {
	t.Helper()
	if d.maps.SlotByOrig.Lookup(bpf.FromAddr(a), &n) != nil {
		return 0, s, false
	}
	if err := d.maps.Slots.Lookup(n, &s); err != nil {
		t.Fatal(err)
	}
	return n, s, true
}
