package loader

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// TestRepin takes the pins away, in two ways. All of them are made again, and
// the next process takes over what this one had.
func TestRepin(t *testing.T) {
	ways := map[string]func(p *place) error{
		"deleted":   func(p *place) error { return os.RemoveAll(filepath.Join(p.bpffs, "pillion", "one")) },
		"unmounted": func(p *place) error { return unix.Unmount(p.bpffs, unix.MNT_DETACH) },
	}
	for name, take := range ways {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			d := p.create(t, "one")
			setRules(t, d, plain)
			p.attach(t, d)
			p.handler(t, d)
			want := p.pins("one")
			if err := take(p); err != nil {
				t.Fatal(err)
			}
			if got := p.pins("one"); len(got) > 0 {
				t.Fatalf("pins %v are there still", got)
			}
			for range 2 { // the second time there is nothing to do
				p.reattach(t, d)
				if diff := cmp.Diff(want, p.pins("one")); diff != "" {
					t.Errorf("pins:\n%s", diff)
				}
			}
			if err := p.connect(t, far); err != nil {
				t.Errorf("captured: %v", err)
			}
			// The lock is on what is there now.
			if err := p.do(t, "one", func(o Options) error { _, err := Open(o); return err }); err == nil {
				t.Error("two processes have it")
			}
			slots := d.slots
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if err := p.do(t, "one", func(o Options) (err error) { d, err = Open(o); return err }); err != nil {
				t.Fatal(err)
			}
			if d.slots != slots {
				t.Errorf("slots %v, before %v", d.slots, slots)
			}
			p.unload(t, d)
			p.clean(t)
		})
	}
}

func (p *place) reattach(t *testing.T, d *Datapath) (mended []string) {
	t.Helper()
	p.App.Do(t, func() (err error) {
		mended, err = d.Reattach()
		return err
	})
	return mended
}

// TestCgroupRenewed removes the scope's cgroup and makes it again: the programs
// are attached to the new one, and nobody takes the instance for dead.
func TestCgroupRenewed(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	setRules(t, d, plain)
	p.attach(t, d)
	p.handler(t, d)
	if d.renewed() {
		t.Error("it is taken for another cgroup")
	}
	p.scope.Renew(t)
	if !d.renewed() {
		t.Error("it is taken for the same cgroup")
	}
	if mended := p.reattach(t, d); slices.Contains(mended, "pl_lookup") || !slices.Contains(mended, "pl_connect6") {
		t.Errorf("mended %v", mended)
	}
	if mended := p.reattach(t, d); len(mended) > 0 || d.renewed() {
		t.Errorf("mended %v again", mended)
	}
	if err := p.connect(t, far); err != nil {
		t.Errorf("captured: %v", err)
	}
	if !d.standing() {
		t.Error("it says that the programs are not attached")
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	p.App.Do(t, func() error {
		swept, err := Sweep(p.bpffs, p.root)
		if len(swept) > 0 {
			t.Errorf("swept %v", swept)
		}
		return err
	})
	if err := p.do(t, "one", func(o Options) (err error) { d, err = Open(o); return err }); err != nil {
		t.Fatal(err)
	}
	p.unload(t, d)
	p.clean(t)
}

// TestCgroupRemoved: a scope that is gone is told, and no link says so.
func TestCgroupRemoved(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	setRules(t, d, plain)
	p.attach(t, d)
	if err := os.Remove(p.scope.Path); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Reattach(); !errors.Is(err, ErrNoScope) || d.standing() || d.renewed() {
		t.Errorf("%v, standing %v, another cgroup %v", err, d.standing(), d.renewed())
	}
	p.unload(t, d)
	p.clean(t)
}

// TestCgroupBorn: that the scope's cgroup was made again is heard at once, and not
// taken from what happens beside it.
func TestCgroupBorn(t *testing.T) {
	p := newPlace(t)
	o, err := p.options("one")
	if err != nil {
		t.Fatal(err)
	}
	b, err := openBirth(&o.Scope)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	heard := func() bool {
		ready := []unix.PollFd{b.poll()}
		n, err := unix.Poll(ready, 0)
		return err == nil && n > 0 && b.born()
	}
	p.scope.Child(t, "below")
	beside := testutil.NewCgroup(t)
	if heard() {
		t.Errorf("%s is taken for the scope", beside.Path)
	}
	testutil.Eventually(t, time.Minute, func() bool { return os.Remove(filepath.Join(p.scope.Path, "below")) == nil }, "the one below is gone")
	p.scope.Renew(t)
	b.arm() // which must not hide what happened before
	if !heard() {
		t.Error("nothing is heard of it")
	}
	if heard() {
		t.Error("it is heard of twice")
	}
	hidden := Scope{Path: "/pods/pod", Level: 2, hidden: os.Stdin}
	if b, err := openBirth(&hidden); b != nil || err != nil {
		t.Errorf("where nothing can be heard: %v, %v", b, err)
	}
}
