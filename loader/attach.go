package loader

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/pillion-project/pillion/bpf"
	"golang.org/x/sys/unix"
)

// attachOrder is such that nothing is redirected before what it is redirected
// to is there, and that sockops sees every connection that connect does. Without
// holds there is no program that holds answers back: the kernel has no tcx.
func attachOrder(holds bool) []string {
	order := []string{
		bpf.ProgLookup,
		bpf.ProgGetpeername4, bpf.ProgGetpeername6,
		bpf.ProgGetsockname4, bpf.ProgGetsockname6,
		bpf.ProgBind4, bpf.ProgBind6,
		bpf.ProgRelease,
		bpf.ProgSockops,
		bpf.ProgHold,
		bpf.ProgConnect4, bpf.ProgConnect6,
	}
	if !holds {
		order = slices.DeleteFunc(order, func(name string) bool { return name == bpf.ProgHold })
	}
	return order
}

// attachTypes are those of bpf_attach_type, by program.
var attachTypes = map[string]ebpf.AttachType{
	bpf.ProgLookup:       ebpf.AttachSkLookup,
	bpf.ProgGetpeername4: ebpf.AttachCgroupInet4GetPeername,
	bpf.ProgGetpeername6: ebpf.AttachCgroupInet6GetPeername,
	bpf.ProgGetsockname4: ebpf.AttachCgroupInet4GetSockname,
	bpf.ProgGetsockname6: ebpf.AttachCgroupInet6GetSockname,
	bpf.ProgBind4:        ebpf.AttachCGroupInet4Bind,
	bpf.ProgBind6:        ebpf.AttachCGroupInet6Bind,
	bpf.ProgRelease:      ebpf.AttachCgroupInetSockRelease,
	bpf.ProgSockops:      ebpf.AttachCGroupSockOps,
	bpf.ProgConnect4:     ebpf.AttachCGroupInet4Connect,
	bpf.ProgConnect6:     ebpf.AttachCGroupInet6Connect,
	bpf.ProgHold:         ebpf.AttachTCXIngress,
}

// makeLink attaches a program to what it is for.
func (d *Datapath) makeLink(name string, prog *ebpf.Program) (link.Link, error) {
	path := d.options.Scope.dir()
	switch name {
	case bpf.ProgHold:
		// First: a foreign program that lets a packet pass (TC_ACT_OK, as most
		// do that only look) ends the round, and nothing would be held.
		return link.AttachTCX(link.TCXOptions{
			Interface: d.network.loopback, Program: prog, Attach: attachTypes[name], Anchor: link.Head(),
		})
	case bpf.ProgLookup:
		path = "/proc/thread-self/ns/net"
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open what %s is attached to: %w", name, err)
	}
	defer f.Close()
	return link.AttachRawLink(link.RawLinkOptions{Target: int(f.Fd()), Program: prog, Attach: attachTypes[name]})
}

// Attach makes the programs live, or replaces those that an earlier process
// attached. It returns the connections in scope that are older than it: they
// are not captured.
//
// Links only: a program that is attached in the old way lives on unseen when
// its owner dies, and two owners overwrite each other.
func (d *Datapath) Attach() ([]Existing, error) {
	d.linkMu.Lock()
	defer d.linkMu.Unlock()
	var before []Existing
	var err error
	order := attachOrder(d.holds)
	if d.moving.Load() != nil {
		order = swapOrder(order)
	}
	for _, name := range order {
		if d.links[name] != nil {
			continue // AttachLookup was here
		}
		if name == bpf.ProgSockops || name == bpf.ProgConnect4 {
			if err := d.catchUp(d.moving.Load()); err != nil {
				return nil, err
			}
		}
		if name == bpf.ProgConnect4 && !d.pinned(name) {
			// From here on sockops counts what connect has not decided on.
			if before, err = d.existing(); err != nil {
				return nil, err
			}
		}
		if name == bpf.ProgGetpeername4 {
			if err := d.copyOutlived(d.moving.Load()); err != nil {
				return nil, err
			}
		}
		if err := d.attach(name); err != nil {
			return nil, fmt.Errorf("attach %s: %w", name, err)
		}
	}
	if err := d.moveOut(); err != nil {
		return nil, err
	}
	d.attached = true
	d.keep()
	if d.renewedLocked() {
		d.Kick()
	}
	return before, nil
}

// swapOrder is attachOrder for hooks that take over from those of another layout: from
// sockops on what is stored with sockets is the new ones', and only connect makes what
// the old ones do not know; what sockops enters in live the old ones of lookup and hold
// would not find. See bpf/include/decision.h and former.h.
func swapOrder(order []string) []string {
	first := slices.DeleteFunc([]string{bpf.ProgLookup, bpf.ProgHold, bpf.ProgSockops, bpf.ProgRelease},
		func(name string) bool { return !slices.Contains(order, name) })
	return append(first, slices.DeleteFunc(order, func(name string) bool { return slices.Contains(first, name) })...)
}

// pinned tells whether an earlier process attached a program.
func (d *Datapath) pinned(name string) bool {
	_, err := os.Stat(d.dir.pin(linkPrefix + name))
	return err == nil
}

// AttachLookup makes the lookup program alone live: connections to slots then
// reach the handler, but nobody is sent there yet. It lets the handler prove
// that it works before the first application depends on it.
func (d *Datapath) AttachLookup() error {
	d.linkMu.Lock()
	defer d.linkMu.Unlock()
	if d.links[bpf.ProgLookup] != nil {
		return nil
	}
	if err := d.attach(bpf.ProgLookup); err != nil {
		return fmt.Errorf("attach %s: %w", bpf.ProgLookup, err)
	}
	return nil
}

// attach makes one program live.
func (d *Datapath) attach(name string) error {
	prog := d.programs[name]
	pin := d.dir.pin(linkPrefix + name)
	l, err := link.LoadPinnedLink(pin, nil)
	switch {
	case err == nil:
		// Swapped in one step: there is no moment without the program.
		err := l.Update(prog)
		if err == nil {
			d.links[name] = l
			return nil
		}
		l.Close()
		if !errors.Is(err, unix.ENOLINK) {
			return fmt.Errorf("update link %s: %w", pin, err)
		}
		// What it was attached to is gone.
		if err := os.Remove(pin); err != nil {
			return fmt.Errorf("remove dead link: %w", err)
		}
	case !errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("open link %s: %w", pin, err)
	}
	raw, err := d.makeLink(name, prog)
	if err != nil {
		return err
	}
	d.links[name] = raw
	if err := raw.Pin(pin); err != nil {
		return fmt.Errorf("pin link: %w", err)
	}
	// Opened again: a raw link does not tell what it is attached to, and
	// Reattach has to know.
	typed, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return fmt.Errorf("open link %s: %w", pin, err)
	}
	d.links[name] = typed
	return raw.Close()
}

// detach ends a link also where its pin was removed by hand.
func detach(l link.Link) error {
	d, ok := l.(interface{ Detach() error })
	if !ok {
		return nil
	}
	// ENOLINK: what it was attached to is gone already.
	if err := d.Detach(); err != nil && !errors.Is(err, unix.ENOLINK) {
		return fmt.Errorf("detach: %w", err)
	}
	return nil
}

// Reattach looks whether every link and every pin still stands, and mends those
// that do not. It returns the names of the programs that it attached, and of what
// it pinned again. Before Attach it does nothing.
func (d *Datapath) Reattach() ([]string, error) {
	d.linkMu.Lock()
	defer d.linkMu.Unlock()
	if !d.attached || d.left.Load() {
		return nil, nil
	}
	defer func() {
		if d.disturbed {
			d.keep()
		}
	}()
	// Without a place for pins a link that is gone is made again all the same.
	mended, lost := d.repin()
	gone := d.follow()
	for _, name := range attachOrder(d.holds) {
		if attached(d.links[name]) && (lost != nil || d.pinned(name)) {
			continue
		}
		if err := d.reattach(name); err != nil && (lost == nil || !attached(d.links[name])) {
			return mended, errors.Join(fmt.Errorf("attach %s again: %w", name, err), lost, gone)
		}
		mended = append(mended, name)
	}
	return mended, errors.Join(lost, gone)
}

// standing tells whether every link is attached.
func (d *Datapath) standing() bool {
	d.linkMu.Lock()
	defer d.linkMu.Unlock()
	if _, err := cgroupID(d.options.Scope.dir()); err != nil {
		return false // perhaps attached still, to a cgroup that nobody can be in
	}
	return !slices.ContainsFunc(attachOrder(d.holds), func(name string) bool { return !attached(d.links[name]) })
}

// attached tells whether a link is attached to anything.
func attached(l link.Link) bool {
	if l == nil {
		return false
	}
	info, err := l.Info()
	if err != nil {
		return false
	}
	if cg := info.Cgroup(); cg != nil {
		return cg.CgroupId != 0
	}
	if ns := info.NetNs(); ns != nil {
		return ns.NetnsInode != 0
	}
	if tcx := info.TCX(); tcx != nil {
		return tcx.Ifindex != 0
	}
	return true
}

func (d *Datapath) reattach(name string) error {
	pin := d.dir.pin(linkPrefix + name)
	if l := d.links[name]; attached(l) {
		// Only its pin is gone: it would end with this process.
		raw, ok := l.(interface{ Pin(string) error })
		if ok {
			_ = l.Unpin()
			return raw.Pin(pin)
		}
	}
	d.disturb()
	if l := d.links[name]; l != nil {
		l.Close()
		delete(d.links, name)
	}
	if err := os.Remove(pin); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return d.attach(name)
}
