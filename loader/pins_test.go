package loader

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/testutil"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestOpenBeside takes an instance over and over while others look at it and sweep:
// these hold its pins for moments, which is not to be taken for a process that runs
// it. One that does is found in spite of them.
func TestOpenBeside(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	var others sync.WaitGroup
	var stop atomic.Bool
	defer func() {
		stop.Store(true)
		others.Wait()
		if !t.Failed() {
			p.unload(t, d)
		}
	}()
	look := func() error {
		_, err := List(p.bpffs, p.root)
		return err
	}
	sweep := func() error {
		_, err := Sweep(p.bpffs, p.root)
		return err
	}
	for _, do := range []func() error{look, sweep, look} {
		others.Go(func() {
			for !stop.Load() {
				if err := do(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for n := range 10 {
		err := p.do(t, "one", func(o Options) error {
			if _, err := Open(o); !errors.Is(err, ErrInUse) {
				t.Errorf("open what is open: %v, want %v", err, ErrInUse)
			}
			if err := d.Close(); err != nil {
				return err
			}
			again, err := Open(o)
			if err == nil {
				d = again
			}
			return err
		})
		if err != nil {
			_ = Remove(p.bpffs, p.root, "one")
			t.Fatalf("time %d: %v", n, err)
		}
	}
}

// TestSweepNamespaceGone sweeps an instance whose cgroup is there still, as podman
// leaves it, when nothing is in it and its network namespace is gone; and not one of
// the same cgroup whose namespace is not.
func TestSweepNamespaceGone(t *testing.T) {
	p := newPlace(t)
	stays := p.create(t, "stays")
	setRules(t, stays, plain)
	p.attach(t, stays)
	if err := stays.Close(); err != nil {
		t.Fatal(err)
	}
	inside := exec.Command("sleep", "1000")
	if err := (testutil.Place{Cgroup: p.scope}).Start(inside); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go p.makeAndGo("goes", done)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	var swept []string
	look := func() bool {
		err := p.do(t, "goes", func(Options) (err error) {
			swept, err = Sweep(p.bpffs, p.root)
			return err
		})
		if err != nil {
			t.Error(err)
		}
		return len(swept) > 0
	}
	for range 5 {
		if look() {
			t.Errorf("swept %v, and something is in the cgroup", swept)
		}
		time.Sleep(20 * time.Millisecond)
	}
	inside.Process.Kill()
	_ = inside.Wait()
	testutil.Eventually(t, 30*time.Second, look, "it is swept")
	if !slices.Equal(swept, []string{"goes"}) {
		t.Errorf("swept %v", swept)
	}
	if look() {
		t.Errorf("swept %v", swept)
	}
	if err := p.do(t, "stays", func(Options) error { return Remove(p.bpffs, p.root, "stays") }); err != nil {
		t.Error(err)
	}
}

// makeAndGo makes an instance in a network namespace that ends with this goroutine's
// thread: it does not let go of it.
func (p *place) makeAndGo(name string, done chan<- error) {
	runtime.LockOSThread()
	done <- func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return err
		}
		o, err := p.options(name)
		if err != nil {
			return err
		}
		d, err := Create(o)
		if err != nil {
			return err
		}
		return errors.Join(d.SetRules(plain), d.AttachLookup(), d.Close())
	}()
}

// TestDots has an instance with a name like a unit's go through its life: the bpf file
// system keeps names with dots for itself, and has no such wish about the @ of a template.
func TestDots(t *testing.T) {
	const name = "system.slice-shop@1.service"
	p := newPlace(t)
	d := p.create(t, name)
	p.attach(t, d)
	all, err := List(p.bpffs, p.root)
	if err != nil || len(all) != 1 || all[0].Name != name || !all[0].Running {
		t.Errorf("listed: %+v, %v", all, err)
	}
	if err := Remove(p.bpffs, p.root, name); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), name) {
		t.Errorf("removed while it is open: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	err = p.do(t, name, func(o Options) (err error) { d, err = Open(o); return err })
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if err := p.do(t, name, func(Options) error { return Remove(p.bpffs, p.root, name) }); err != nil {
		t.Error(err)
	}
	p.clean(t)
}

func TestCheckName(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]bool{
		"shop": true, "my-app.v2": true, "_": true, "shop@1": true, "shop@eu-1.b": true, strings.Repeat("x", 64): true,
		"": false, ".shop": false, "..": false, "@": false, "@1": false, "shop:1": false, "shop/1": false, `shop\x401`: false, "a b": false,
		"é": false, "shop\n": false, strings.Repeat("x", 65): false,
	} {
		if err := CheckName(name); (err == nil) != want || err != nil && !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// TestMountOverFiles takes a directory of somebody else's for that of the bpf file
// system: what is in it stays to be seen.
func TestMountOverFiles(t *testing.T) {
	testutil.RequireRoot(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := mountBPFFS(dir)
	if err == nil {
		unix.Unmount(dir, unix.MNT_DETACH)
	}
	if !errors.Is(err, unix.ENOTEMPTY) {
		t.Errorf("mounted: %v", err)
	}
}
