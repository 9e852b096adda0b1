package loader

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/cilium/ebpf/link"
	"github.com/pillion-project/pillion/bpf"
)

// allPinsEvery is how many looks it is from one at every pin to the next, where the
// time of their directory says that none was removed: its grain is coarse.
const allPinsEvery = 16

// repin brings back what somebody removed of the pins that no link is: the file
// system, the directory and its lock, the maps. Without them all would end with
// this process, and the next one would know nothing. It returns the names of
// what it made again. The caller holds linkMu.
func (d *Datapath) repin() ([]string, error) {
	var mended []string
	now, err := os.Stat(d.dir.path)
	if err != nil || !d.dir.is(now) {
		if err := d.renewDir(); err != nil {
			return nil, err
		}
		mended = append(mended, "the directory")
	} else if d.pinsLooked++; now.ModTime().Equal(d.pinsChanged) && d.pinsLooked%allPinsEvery != 0 {
		return nil, nil
	} else {
		// What is pinned below changes it again: one look more.
		d.pinsChanged = now.ModTime()
	}
	// The record is the first pin, whatever the order of the maps: see create.
	names, all := []string{instancePin}, d.mapsByName()
	for name := range all {
		if name != instancePin {
			names = append(names, name)
		}
	}
	for _, name := range names {
		pin := d.dir.pin(name)
		if _, err := os.Stat(pin); err == nil {
			continue
		} else if !errors.Is(err, os.ErrNotExist) {
			return mended, fmt.Errorf("look at pin: %w", err)
		}
		// Else it takes itself for pinned.
		_ = all[name].Unpin()
		if err := all[name].Pin(pin); err != nil {
			return mended, fmt.Errorf("pin map %s again: %w", name, err)
		}
		mended = append(mended, name)
	}
	if _, err := os.Stat(d.dir.pin(layoutsPin)); errors.Is(err, os.ErrNotExist) {
		if err := d.describe(layoutsPin); err != nil {
			return mended, err
		}
		mended = append(mended, layoutsPin)
	}
	return mended, nil
}

// renewDir makes the directory of the pins again, and locks it. It fails with
// [ErrInUse] when another process was faster.
func (d *Datapath) renewDir() error {
	if err := mountBPFFS(d.options.BPFFS); err != nil {
		return err
	}
	root, err := lockRoot(d.options.BPFFS)
	if err != nil {
		return err
	}
	defer root.unlock()
	path := pinDir(d.options.BPFFS, d.options.Name)
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("create pins again: %w", err)
	}
	locked, err := lockDir(path, false)
	if err != nil {
		return err
	}
	d.disturb()
	d.dir.unlock()
	d.dir = locked
	return nil
}

// renewed tells whether the scope's cgroup is another one than the links are
// attached to.
func (d *Datapath) renewed() bool {
	d.linkMu.Lock()
	defer d.linkMu.Unlock()
	return d.renewedLocked()
}

// renewedLocked is renewed for who holds linkMu.
func (d *Datapath) renewedLocked() bool {
	id, err := cgroupID(d.options.Scope.dir())
	return err == nil && id != d.instance.Cgroup
}

// follow looks whether the scope's cgroup was removed and made again. Links do not
// tell: while a socket of the removed one is open, the kernel keeps it, and they
// stay attached to it. They are kept for such sockets, and pl_ programs are to be
// attached to the new cgroup; the record then names that, since an instance of a
// cgroup that is gone would be swept. The caller holds linkMu.
func (d *Datapath) follow() error {
	id, err := cgroupID(d.options.Scope.dir())
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %s was removed", ErrNoScope, d.options.Scope.Path)
	}
	if err != nil || id == d.instance.Cgroup {
		return err
	}
	d.options.Log.Warn("the cgroup was removed and made again", "cgroup", d.options.Scope.Path)
	d.disturb()
	d.earlier = slices.DeleteFunc(d.earlier, func(l link.Link) bool {
		if attached(l) {
			return false
		}
		l.Close()
		return true
	})
	for _, name := range attachOrder(d.holds) {
		if name == bpf.ProgLookup || name == bpf.ProgHold || d.links[name] == nil {
			continue
		}
		d.earlier = append(d.earlier, d.links[name])
		delete(d.links, name)
		if err := os.Remove(d.dir.pin(linkPrefix + name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove the link to a cgroup that is gone: %w", err)
		}
	}
	d.instance.Cgroup = id
	return d.putInstance()
}
