package loader

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

func liveKey(source, slot netip.AddrPort) bpf.LiveKey {
	return bpf.LiveKey{
		Source:     bpf.FromAddr(source.Addr()),
		Slot:       bpf.FromAddr(slot.Addr()),
		SourcePort: source.Port(),
		SlotPort:   slot.Port(),
	}
}

// mapAttr is the part of union bpf_attr that calls for one element of a map read
// (include/uapi/linux/bpf.h).
type mapAttr struct {
	mapFD uint32
	_     uint32
	key   unsafe.Pointer
	value unsafe.Pointer
	flags uint64
}

// Live tells about the connection from source, the application, to slot, one of
// ours with the original port. It is false when the kernel side knows none.
//
// The library's Lookup was rejected here: it allocates, and tells the scheduler
// of a system call that takes half a microsecond.
func (d *Datapath) Live(source, slot netip.AddrPort) (flow.Downstream, bool) {
	key := liveKey(source, slot)
	m := d.moving.Load()
	l, ok := lookupLive(d.liveFD, key)
	if !ok && m.has("live") {
		l, ok = d.lookupBefore(m, key)
	}
	if !ok {
		// Its application may have said all, and be gone.
		l, ok = lookupLive(d.departedFD, key)
	}
	if !ok {
		return flow.Downstream{}, false
	}
	if seen := bpf.ToAddr(l.Seen); seen.IsValid() {
		source = netip.AddrPortFrom(seen, source.Port())
	}
	return flow.Downstream{
		Cookie:      l.Cookie,
		Group:       l.Group,
		Cgroup:      l.Cgroup,
		Source:      source,
		OrigDst:     flow.OrigDst{AddrPort: netip.AddrPortFrom(bpf.ToAddr(l.Orig), slot.Port())},
		Waits:       l.Hold == bpf.HoldYes,
		Reason:      flow.Reason(l.Reason),
		Mark:        l.Mark,
		Priority:    l.Priority,
		TOS:         l.Tos,
		KeepAlive:   flow.KeepAlive{Count: l.KeepCount, Idle: l.KeepIdle, Interval: l.KeepInterval},
		UserTimeout: l.UserTimeout,
		Congestion:  l.Congestion,
		BoundSource: bpf.ToAddr(l.Bound),
	}, true
}

// Open tells whether such a connection is open at the application's end. It costs as
// little as [Datapath.Live].
func (d *Datapath) Open(source, slot netip.AddrPort) bool {
	_, ok := d.entry(liveKey(source, slot))
	return ok
}

// entry is the one of a connection that is open, whichever layout it is in.
func (d *Datapath) entry(key bpf.LiveKey) (bpf.Live, bool) {
	m := d.moving.Load()
	l, ok := lookupLive(d.liveFD, key)
	if !ok && m.has("live") {
		if l, ok = m.liveBefore("live", key); !ok {
			l, ok = lookupLive(d.liveFD, key) // moved between the two
		}
	}
	return l, ok
}

func lookupLive(fd int, key bpf.LiveKey) (l bpf.Live, ok bool) {
	attr := mapAttr{mapFD: uint32(fd), key: unsafe.Pointer(&key), value: unsafe.Pointer(&l)}
	_, _, e := syscall.RawSyscall(unix.SYS_BPF, unix.BPF_MAP_LOOKUP_ELEM, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	return l, e == 0
}

// AdmitCanary lets one test connection in, from source to the canary's slot.
func (d *Datapath) AdmitCanary(source, slot netip.AddrPort) error {
	key, l := liveKey(source, slot), bpf.Live{Canary: 1, Opened: uint64(d.monotonic())}
	err := d.maps.Live.Put(key, l)
	if err == nil {
		err = d.moving.Load().admitBefore(key, l)
	}
	if err != nil {
		return fmt.Errorf("admit canary: %w", err)
	}
	return nil
}

// ForgetCanary takes back what [Datapath.AdmitCanary] did.
func (d *Datapath) ForgetCanary(source, slot netip.AddrPort) error {
	key := liveKey(source, slot)
	// The former one first: see bpf/move.bpf.c.
	err := d.moved.forgetBefore(key)
	if err == nil {
		err = d.maps.Live.Delete(key)
	}
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget canary: %w", err)
	}
	return nil
}

// CanaryAddrs returns the slots that test connections go to; an address is
// invalid if its family cannot be used here.
func (d *Datapath) CanaryAddrs() (v4, v6 netip.Addr) { return d.slots.addrs(bpf.SlotCanary) }

// Exempt tags a socket as the handler's own, before it binds or connects, so
// that it is not captured even if the handler is in scope itself.
func (d *Datapath) Exempt(fd int) error {
	// No storage holds more than this one tag yet.
	if err := d.maps.Decisions.Put(uint32(fd), bpf.Decision{Own: 1}); err != nil {
		return fmt.Errorf("tag socket: %w", err)
	}
	if err := d.moving.Load().exemptBefore(fd); err != nil {
		return fmt.Errorf("tag socket: %w", err)
	}
	return nil
}

// SetListeners hands the kernel side the sockets that connections go to: one
// per worker and family. The kernel takes them out when they are closed.
func (d *Datapath) SetListeners(v4, v6 []int) error {
	d.disown()
	for family, fds := range [][]int{v4, v6} {
		for i, fd := range fds {
			key := uint32(family*bpf.WorkersMax + i)
			if err := d.maps.Listeners.Put(key, uint64(fd)); err != nil {
				return fmt.Errorf("register listener: %w", err)
			}
		}
	}
	return nil
}

// SetCanaryListener hands the kernel side the socket that connections to the
// canary's slot of a family go to.
func (d *Datapath) SetCanaryListener(v6 bool, fd int) error {
	key := uint32(bpf.CanaryListener)
	if v6 {
		key++
	}
	if err := d.maps.Listeners.Put(key, uint64(fd)); err != nil {
		return fmt.Errorf("register canary: %w", err)
	}
	return nil
}

// Resolve returns the address that a slot stands for.
func (d *Datapath) Resolve(slot netip.Addr) (netip.Addr, error) {
	for _, p := range d.slots.prefixes() {
		if !p.Contains(slot) {
			continue
		}
		b := slot.As16()
		n := uint32(b[14])<<8 | uint32(b[15])
		s, err := d.slot(n)
		if err != nil {
			return netip.Addr{}, fmt.Errorf("read slot %s: %w", slot, err)
		}
		orig := bpf.ToAddr(s.Orig)
		// Slot n exists once, for an address of either family.
		if s.State == bpf.SlotFree || orig.Is4() != slot.Is4() {
			return netip.Addr{}, fmt.Errorf("slot %s %w", slot, ErrFreeSlot)
		}
		return orig, nil
	}
	return netip.Addr{}, fmt.Errorf("address %s %w", slot, ErrForeignSlot)
}

var (
	// ErrFreeSlot means that a slot stands for nothing at present.
	ErrFreeSlot = errors.New("stands for no address")
	// ErrForeignSlot means that an address is none of this instance's slots.
	ErrForeignSlot = errors.New("is no slot of this instance")
)

// monotonic is bpf_ktime_get_ns().
func (d *Datapath) monotonic() int64 {
	var ts unix.Timespec
	// It cannot fail with this clock.
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return d.clock.Kernel(ts.Nano())
}

// Beat publishes the handler's sign of life, which holds for maxAge ns from
// now. alive is false when the process knows that it cannot serve; busy is true
// when its accept queues are nearly full.
func (d *Datapath) Beat(alive, busy bool, maxAge int64) error {
	b := bpf.Beat{MaxAge: uint64(maxAge)}
	if alive {
		b.Stamp = uint64(d.monotonic())
	}
	if busy {
		b.Busy = 1
	}
	if err := d.maps.Beat.Put(uint32(0), b); err != nil {
		return fmt.Errorf("write heartbeat: %w", err)
	}
	if err := d.moving.Load().beatBefore(b); err != nil {
		return fmt.Errorf("write heartbeat: %w", err)
	}
	return nil
}
