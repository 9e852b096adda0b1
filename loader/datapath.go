package loader

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/pillion-project/pillion/bpf"
)

// Kind says what ends an instance.
type Kind uint32

// The kinds of an instance. One around a command is dead when the process that
// made it is and its cgroup is empty; a standing one when its cgroup is gone.
const (
	KindRun  = Kind(bpf.InstanceRun)
	KindExec = Kind(bpf.InstanceExec)
	// KindInit is a standing one that no process has run yet.
	KindInit = Kind(bpf.InstanceInit)
)

// String returns the name of the command that makes such an instance.
func (k Kind) String() string {
	switch k {
	case KindExec:
		return "exec"
	case KindInit:
		return "init"
	default:
		return "run"
	}
}

// Options say what an instance is. Name and Scope are fixed for its life; of Kind,
// an init becomes a run when a run takes it over.
type Options struct {
	Name  string
	Kind  Kind
	Scope Scope
	// Own is the id of the cgroup of this process's container, where that is one
	// of several in scope (see [FindPod]): its connections are not captured.
	Own uint64
	// Sandbox is the id of the cgroup of the pod's sandbox, and 0 where it is not
	// known. An instance remembers what its maker knew.
	Sandbox uint64
	// BPFFS is where pins are kept; [BPFFS] if empty.
	BPFFS string
	// SlotIdle is how long a slot is kept that nobody uses, SlotGrace how long
	// it still resolves after that: longer than any SYN in flight. The defaults
	// are 10 and 3 minutes.
	SlotIdle, SlotGrace time.Duration
	// FrameTag is as in [Handover]; 0 is a new one.
	FrameTag uint64
	// Keep, if set, is told by which descriptors a process of this very build that
	// shares them may go on with the instance after this one is killed: when all
	// programs are attached, and when one has changed. nil says that there are none
	// for now. Handles are what it was told, by a process that is dead: for [Resume].
	Keep    func(handles map[string]int)
	Handles map[string]int
	Log     *slog.Logger
}

func (o *Options) fill() error {
	if o.BPFFS == "" {
		o.BPFFS = BPFFS
	}
	if o.SlotIdle == 0 {
		o.SlotIdle = 10 * time.Minute
	}
	if o.SlotGrace == 0 {
		o.SlotGrace = 3 * time.Minute
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return CheckName(o.Name)
}

// Datapath is the kernel side of one instance, in the hands of the process that
// runs it. Its methods are safe for concurrent use unless they say otherwise.
type Datapath struct {
	options  Options
	dir      *dir
	network  *network
	slots    slotRange
	instance bpf.Instance
	adopted  bool
	resumed  bool

	maps     bpf.Maps
	programs map[string]*ebpf.Program
	links    map[string]link.Link
	earlier  []link.Link // to cgroups that were removed: see follow
	state    *sharedState
	clock    bpf.Clock

	liveFD, departedFD int

	// Holding handshakes back: see mirror.go.
	holds    bool
	frameTag uint64
	heldSpec innerSpec
	queues   []*Queue

	layouts *description         // of this build's maps
	moving  atomic.Pointer[move] // nil: the maps have that layout
	moved   *move                // the same, also when that is done
	former  formerHooks          // what hooks of other layouts write to

	left atomic.Bool // another process has the instance

	linkMu   sync.Mutex // orders changes of links
	attached bool       // all of them are made
	// disturbed: who keeps handles was told that there are none.
	disturbed bool

	detached    atomic.Bool // one is gone, and cannot be made again
	unpinned    atomic.Bool // only pins are
	linkTrouble string      // why, as it was logged; Watch's own

	pinsChanged time.Time // of their directory, when they were last looked at
	pinsLooked  int

	// servicesMu orders changes of services. It is taken after mu, which is held
	// while all sockets of the namespace are listed, and never for long.
	servicesMu sync.Mutex

	sets setTable // see sets.go

	lost     atomic.Uint32 // families without a route, as in slotRange
	relays   atomic.Bool   // rules send connections to slots
	relayed  chan struct{} // they do so now, and did not before
	mu       sync.Mutex    // orders changes of the configuration and of slots
	settings bpf.Settings
	reserved map[bpf.IPAddr]bool  // addresses of which every one has a reserved slot; nil: not known
	retiring map[uint32]time.Time // when each slot was taken out of use
	missing  map[bpf.LiveKey]bool // live entries without a socket, when last looked
	counts   counts
	kick     chan struct{} // asks Watch to look at once
}

// Create makes an instance: it claims slots, loads the programs, and pins their
// maps. Nothing is attached: see [Datapath.Attach]. It fails with [ErrExists]
// when there is one of that name, and leaves nothing behind when it fails.
func Create(o Options) (*Datapath, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	if err := mountBPFFS(o.BPFFS); err != nil {
		return nil, err
	}
	root, err := lockRoot(o.BPFFS)
	if err != nil {
		return nil, err
	}
	d, err := createIn(root, o)
	root.unlock()
	if err != nil {
		removeRoot(o.BPFFS)
		return nil, err
	}
	return d, nil
}

func createIn(root *dir, o Options) (*Datapath, error) {
	path := pinDir(o.BPFFS, o.Name)
	if err := os.Mkdir(path, 0o700); err != nil {
		if errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("create instance %s: %w", o.Name, ErrExists)
		}
		return nil, fmt.Errorf("create instance %s: %w", o.Name, err)
	}
	d := newDatapath(o)
	var err error
	if d.dir, err = lockDir(path, false); err == nil {
		err = d.create()
	}
	if err != nil {
		if d.dir == nil {
			os.Remove(path)
			return nil, err
		}
		return nil, errors.Join(fmt.Errorf("create instance %s: %w", o.Name, err), d.undo())
	}
	return d, nil
}

// Open takes over an instance that an earlier process made. The maps, and with
// them slots and open connections, are what they were. It fails with
// [ErrNotFound], [ErrInUse], [ErrIncomplete], [ErrOtherScope] or [ErrABI], and then
// changes nothing.
func Open(o Options) (*Datapath, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	dir, err := lockInstance(o.BPFFS, o.Name)
	if err != nil {
		return nil, fmt.Errorf("open instance %s: %w", o.Name, err)
	}
	d := newDatapath(o)
	d.dir, d.adopted = dir, true
	d.relays.Store(true) // by rules of the earlier process, perhaps
	if err := d.open(); err != nil {
		d.Close()
		return nil, fmt.Errorf("open instance %s: %w", o.Name, err)
	}
	return d, nil
}

func newDatapath(o Options) *Datapath {
	return &Datapath{
		options:  o,
		frameTag: o.FrameTag,
		programs: map[string]*ebpf.Program{},
		links:    map[string]link.Link{},
		former:   formerHooks{left: map[string][]formerMap{}},
		retiring: map[uint32]time.Time{},
		kick:     make(chan struct{}, 1),
		relayed:  make(chan struct{}, 1),
	}
}

// Adopted tells whether an earlier process made the instance.
func (d *Datapath) Adopted() bool { return d.adopted }

// Name returns the instance's name.
func (d *Datapath) Name() string { return d.options.Name }

// ListenAddrs returns where the handler is to listen; an address is invalid if
// its family cannot be used here.
func (d *Datapath) ListenAddrs() (v4, v6 netip.Addr) { return d.slots.addrs(bpf.SlotListener) }

// SlotPrefixes returns the ranges that the instance's slots are in; one is
// invalid if its family cannot be used here.
func (d *Datapath) SlotPrefixes() (v4, v6 netip.Prefix) {
	for _, p := range d.slots.prefixes() {
		if p.Addr().Is4() {
			v4 = p
		} else {
			v6 = p
		}
	}
	return v4, v6
}

// Events returns the ring buffer of what the kernel side reports. It stays the
// datapath's.
func (d *Datapath) Events() *ebpf.Map { return d.maps.Events }

// Close frees the handles and the lock. The kernel side goes on, by on_failure
// since nobody beats any more; see [Datapath.Unload].
func (d *Datapath) Close() error {
	d.keepNone()
	var errs []error
	for _, l := range d.links {
		errs = append(errs, l.Close())
	}
	for _, l := range d.earlier {
		errs = append(errs, l.Close())
	}
	for _, p := range d.programs {
		errs = append(errs, p.Close())
	}
	for _, q := range d.queues {
		errs = append(errs, q.close())
	}
	errs = append(errs, d.sets.close(), d.maps.Close(), d.moved.close(), d.former.close())
	if d.state != nil {
		errs = append(errs, d.state.close())
	}
	if d.network != nil {
		d.network.close()
	}
	if d.dir != nil {
		d.dir.unlock()
	}
	return errors.Join(errs...)
}

// Unload ends the instance: it detaches the programs, removes the pins and the
// routes, and frees the handles.
func (d *Datapath) Unload() error {
	err := d.undo()
	removeRoot(d.options.BPFFS)
	if err != nil {
		return fmt.Errorf("unload instance %s: %w", d.options.Name, err)
	}
	return nil
}

// undo is the reverse of create and attach, as far as they got.
func (d *Datapath) undo() error {
	var errs []error
	// Also without their pins, links hold until their last handle is closed.
	for _, name := range slices.Backward(attachOrder(d.holds)) {
		if l := d.links[name]; l != nil {
			errs = append(errs, detach(l))
		}
	}
	errs = append(errs, d.dir.remove(d.releaseRange), d.Close())
	return errors.Join(errs...)
}

// releaseRange gives the slots back.
func (d *Datapath) releaseRange() error {
	if d.network == nil || d.slots.families == 0 {
		return nil
	}
	return d.network.removeRoutes(d.slots)
}
