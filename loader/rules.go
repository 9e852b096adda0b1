package loader

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

// Rules are what the kernel side decides by.
type Rules struct {
	Services      []Service
	Deny, Exclude []Rule
	// Default is the path of destinations that nothing names: flow.PathRelay or
	// flow.PathPass.
	Default flow.Path
	// Closed refuses what cannot be redirected; otherwise it goes where it was
	// going.
	Closed bool
	// Connect is when the handshakes of connections end that no service names.
	Connect flow.ConnectMode
	// Workers is how many listeners the handler has per family.
	Workers int
	// MaxConns is how many redirected connections may be open at once,
	// ConnQuota how many of one container and SlotQuota how many unnamed
	// destinations one container may have (0: no quota).
	MaxConns, ConnQuota, SlotQuota int
}

// Service is an address that has endpoints of its own.
type Service struct {
	Addr   netip.AddrPort
	Closed bool // as in Rules, for this one
	// Connect is when the handshakes of its connections end.
	Connect flow.ConnectMode
	// NoEndpoint is what a connect returns while [Datapath.Unavailable] says so, or
	// none of Set can be picked.
	NoEndpoint syscall.Errno
	// Path is flow.PathPass, flow.PathDirect or flow.PathRelay, which is also what
	// the zero value means.
	Path flow.Path
	// Set is what the connect hook picks from on flow.PathDirect, and on
	// flow.PathRelay when the handler is gone. Nil: there is none.
	Set *flow.Set
	// Keep leaves the set that an earlier process has published; see [Datapath.Kept].
	Keep bool
}

// Rule names destinations: a prefix, and one port or any (0).
type Rule struct {
	Prefix netip.Prefix
	Port   uint16
}

// SetRules makes the kernel side go by rules. New ones are in force before old
// ones go, so that a connect meets either. On an error some may be in force
// already; calling again with good ones mends that.
func (d *Datapath) SetRules(r Rules) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r.relay() {
		d.setRelays(true) // before anything is sent there
	}
	if err := d.reserveSlots(r.Services); err != nil {
		return err
	}
	// First what there may be no room for: what fails then is all that has changed.
	// The old ones stay until all else is in force: a destination may go from one
	// list to the other, or become a service.
	deny, err := extend(d.maps.Deny, ruleKeys(r.Deny), nil)
	if err != nil {
		return err
	}
	exclude, err := extend(d.maps.Exclude, ruleKeys(r.Exclude), nil)
	if err != nil {
		return err
	}
	if err := d.lookAtRules(r); err != nil {
		return err
	}
	d.sets.mu.Lock()
	defer d.sets.mu.Unlock()
	services, lacking, err := d.publishAll(r.Services)
	if err != nil {
		return err
	}
	if err := d.replaceServices(services); err != nil {
		return err
	}
	// Only now: nobody is sent to these any more.
	if err := d.sets.use(r.Services); err != nil {
		return err
	}
	if err := d.applySettings(r); err != nil {
		return err
	}
	if err := errors.Join(remove(d.maps.Deny, deny), remove(d.maps.Exclude, exclude)); err != nil {
		return err
	}
	d.setRelays(r.relay())
	if len(lacking) > 0 {
		return &RoomError{lacking}
	}
	return nil
}

// relay tells whether there is a destination on flow.PathRelay.
func (r *Rules) relay() bool {
	return r.Default != flow.PathPass ||
		slices.ContainsFunc(r.Services, func(s Service) bool { return servicePath(s.Path) == bpf.PathRelay })
}

// Relays tells whether the rules send any connection to a slot.
func (d *Datapath) Relays() bool { return d.relays.Load() }

// Relayed has something to be received once they do so, and did not before.
func (d *Datapath) Relayed() <-chan struct{} { return d.relayed }

func (d *Datapath) setRelays(now bool) {
	if d.relays.Swap(now) || !now {
		return
	}
	select {
	case d.relayed <- struct{}{}:
	default: // nobody has received the last one yet
	}
}

// publishAll publishes the sets of services, and returns the entries that point to
// them. One for whose set there is no room goes by on_failure if it has none.
func (d *Datapath) publishAll(services []Service) (map[bpf.EndpointKey]bpf.Service, map[netip.AddrPort]error, error) {
	sets := make([]proposal, 0, len(services))
	for _, s := range services {
		sets = append(sets, proposal{unmapped(s.Addr), s.Set})
	}
	lacking, err := d.sets.publish(sets)
	if err != nil {
		return nil, nil, err
	}
	entries := make(map[bpf.EndpointKey]bpf.Service, len(services))
	for _, s := range services {
		v := bpf.Service{
			Id: noSet, OnFailure: uint8(onFailure(s.Closed)),
			Connect: uint8(d.connect(s.Connect)), NoEndpoint: uint8(s.NoEndpoint), Path: uint8(servicePath(s.Path)),
		}
		addr := unmapped(s.Addr)
		own := d.sets.byAddr[addr]
		switch {
		case s.Set != nil && lacking[addr] == nil:
			own.gone = time.Time{}
			v.Id = own.id
		case own != nil && own.gone.IsZero() && (s.Set != nil || s.Keep):
			v.Id = own.id
		case s.Set != nil && s.Path == flow.PathDirect && !s.Closed:
			v.Path = uint8(bpf.PathPass)
		}
		entries[serviceKey(s.Addr)] = v
	}
	return entries, lacking, nil
}

// keeps tells whether a service stays with the set that it has.
func (s *Service) keeps(own *serviceSet) bool { return s.Keep && own != nil && own.gone.IsZero() }

func serviceKey(a netip.AddrPort) bpf.EndpointKey {
	return bpf.EndpointKey{Addr: bpf.FromAddr(a.Addr()), Port: a.Port()}
}

func servicePath(p flow.Path) uint32 {
	switch p {
	case flow.PathPass:
		return bpf.PathPass
	case flow.PathDirect:
		return bpf.PathDirect
	default:
		return bpf.PathRelay
	}
}

func (d *Datapath) replaceServices(services map[bpf.EndpointKey]bpf.Service) error {
	d.servicesMu.Lock()
	defer d.servicesMu.Unlock()
	// That a service has no endpoint for a while is not the rules' to say.
	return replace(d.maps.Services, services, func(old bpf.Service, v *bpf.Service) { v.Unavailable = old.Unavailable })
}

// lookAtRules has hooks look at lists of rules that were empty before.
func (d *Datapath) lookAtRules(r Rules) error {
	before := d.settings
	d.settings.DenyRules = max(before.DenyRules, uint32(len(r.Deny)))
	d.settings.ExcludeRules = max(before.ExcludeRules, uint32(len(r.Exclude)))
	if d.settings == before {
		return nil
	}
	return d.putSettings()
}

func (d *Datapath) applySettings(r Rules) error {
	path := bpf.PathRelay
	if r.Default == flow.PathPass {
		path = bpf.PathPass
	}
	d.settings = bpf.Settings{
		Workers:      uint32(r.Workers),
		DenyRules:    uint32(len(r.Deny)),
		ExcludeRules: uint32(len(r.Exclude)),
		DefaultPath:  path,
		OnFailure:    onFailure(r.Closed),
		SlotQuota:    uint32(r.SlotQuota),
		ConnQuota:    uint32(r.ConnQuota),
		LiveMax:      uint32(r.MaxConns),
		Families:     d.slots.families &^ d.lost.Load(),
		Connect:      uint32(d.connect(r.Connect)),
		Draining:     d.settings.Draining, // for good, whatever a reload says
		OwnGroup:     d.options.Own,
	}
	return d.putSettings()
}

func (d *Datapath) putSettings() error {
	if err := d.maps.Settings.Put(uint32(0), d.settings); err != nil {
		return fmt.Errorf("write settings: %w", err)
	}
	return nil
}

// connect is the mode that this kernel can do.
func (d *Datapath) connect(m flow.ConnectMode) flow.ConnectMode {
	if !d.holds {
		return flow.ConnectEarly
	}
	return m
}

// Unavailable makes connects to a service fail at once for this long from now: it
// has no endpoint that may be picked. 0 takes that back. The time is bounded, so
// that what a dead process last said does not hold for ever. It does not wait for
// what takes long, since a worker of the handler calls it. It fails with [ErrNoService].
func (d *Datapath) Unavailable(service netip.AddrPort, wait time.Duration) error {
	d.servicesMu.Lock()
	defer d.servicesMu.Unlock()
	key := serviceKey(service)
	var s bpf.Service
	err := d.maps.Services.Lookup(key, &s)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		err = ErrNoService
	}
	if err != nil {
		return fmt.Errorf("look up service %s: %w", service, err)
	}
	s.Unavailable = 0
	if wait > 0 {
		s.Unavailable = uint64(d.monotonic() + int64(wait))
	}
	if err := d.maps.Services.Update(key, s, ebpf.UpdateExist); err != nil {
		return fmt.Errorf("write service %s: %w", service, err)
	}
	return nil
}

// Drain makes new connections go by on_failure, for good.
func (d *Datapath) Drain() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.settings.Draining = 1
	return d.putSettings()
}

func onFailure(closed bool) uint32 {
	if closed {
		return bpf.OnFailureClosed
	}
	return bpf.OnFailureOpen
}

func ruleKeys(rules []Rule) map[bpf.RuleKey]uint32 {
	keys := make(map[bpf.RuleKey]uint32, len(rules))
	for i, r := range rules {
		k := bpf.RuleKey{Port: r.Port, Family: 6, Addr: bpf.FromAddr(r.Prefix.Addr())}
		bits := r.Prefix.Bits()
		if r.Prefix.Addr().Is4() {
			k.Family = 4
			bits += 96
		}
		k.Prefixlen = uint32(bpf.RulePortBits + bits)
		keys[k] = uint32(i)
	}
	return keys
}

// replace makes a map hold what want has, and nothing else. keep, unless it is nil, has
// a value take over what it has of the old one.
func replace[K comparable, V comparable](m *ebpf.Map, want map[K]V, keep func(old V, v *V)) error {
	rest, err := extend(m, want, keep)
	if err != nil {
		return err
	}
	return remove(m, rest)
}

// extend is replace without the end: it returns what else the map holds.
func extend[K comparable, V comparable](m *ebpf.Map, want map[K]V, keep func(old V, v *V)) (rest []K, err error) {
	have := map[K]V{}
	var k K
	var v V
	for it := m.Iterate(); it.Next(&k, &v); {
		have[k] = v
	}
	var keys []K
	var values []V
	for k, v := range want {
		old, ok := have[k]
		if ok && keep != nil {
			keep(old, &v)
		}
		if ok && old == v {
			continue
		}
		keys, values = append(keys, k), append(values, v)
	}
	if err := putAll(m, keys, values); err != nil {
		return nil, err
	}
	for k := range have {
		if _, ok := want[k]; !ok {
			rest = append(rest, k)
		}
	}
	return rest, nil
}

func remove[K any](m *ebpf.Map, keys []K) error {
	for _, k := range keys {
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("delete from map %s: %w", m, err)
		}
	}
	return nil
}

// putAll writes entries of a map.
func putAll[K, V any](m *ebpf.Map, keys []K, values []V) error {
	if len(keys) == 0 {
		return nil
	}
	_, err := m.BatchUpdate(keys, values, nil)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.E2BIG) {
		return fmt.Errorf("write map %s: %w: %d are new, and there is room for %d with those that they replace", m, err, len(keys), m.MaxEntries())
	}
	if err != nil {
		return fmt.Errorf("write map %s: %w", m, err)
	}
	return nil
}

// reserveSlots gives the address of every service on relay a slot that no scan can
// take from it, as far as there are flow.ServiceSlots: those that were found may be more.
// Addresses that none has any more become like others.
func (d *Datapath) reserveSlots(services []Service) error {
	want := map[bpf.IPAddr]bool{}
	for _, s := range services {
		if s.Path != flow.PathDirect && s.Path != flow.PathPass {
			want[bpf.FromAddr(s.Addr.Addr())] = true
		}
	}
	// To look at all slots takes thousands of system calls, with every change.
	if maps.Equal(want, d.reserved) {
		return nil
	}
	d.reserved = nil
	now := uint64(d.monotonic())
	free := []uint32{}
	for n := uint32(bpf.SlotFirst); n < bpf.SlotFirst+reservedSlots; n++ {
		s, err := d.slot(n)
		if err != nil {
			return fmt.Errorf("read slot %d: %w", n, err)
		}
		switch {
		case s.State == bpf.SlotFree:
			free = append(free, n)
		case s.State == bpf.SlotReserved && !want[s.Orig]:
			s.State, s.Used = bpf.SlotNamed, now
			if err := d.putSlot(n, s); err != nil {
				return fmt.Errorf("release slot %d: %w", n, err)
			}
		}
	}
	for addr := range want {
		var err error
		if free, err = d.reserve(addr, free, now); err != nil {
			return err
		}
	}
	if len(free) > 0 {
		d.reserved = want // all of them have one
	}
	return nil
}

// reserve reserves the slot that an address has, or one of free.
func (d *Datapath) reserve(addr bpf.IPAddr, free []uint32, now uint64) ([]uint32, error) {
	var n uint32
	slot := bpf.Slot{Orig: addr, Used: now, State: bpf.SlotReserved}
	err := d.maps.SlotByOrig.Lookup(addr, &n)
	switch {
	case err == nil:
		s, err := d.slot(n)
		if err != nil {
			return free, fmt.Errorf("read slot %d: %w", n, err)
		}
		d.release(s.Group)
		return free, d.putSlot(n, slot)
	case !errors.Is(err, ebpf.ErrKeyNotExist):
		return free, fmt.Errorf("look up slot: %w", err)
	case len(free) == 0:
		// There are too many, or the others are held by services that are no more,
		// until they retire. The address is named at its first use, like any.
		return free, nil
	}
	n = free[0]
	// The way back first, as the hook does it.
	if err := d.putSlot(n, slot); err != nil {
		return free, fmt.Errorf("reserve slot %d: %w", n, err)
	}
	err = d.maps.SlotByOrig.Update(addr, n, ebpf.UpdateNoExist)
	if errors.Is(err, ebpf.ErrKeyExist) {
		// A hook named it between the look-up and now.
		if err := d.putSlot(n, bpf.Slot{}); err != nil {
			return free, fmt.Errorf("free slot %d: %w", n, err)
		}
		return d.reserve(addr, free, now)
	}
	if err != nil {
		return free, fmt.Errorf("reserve slot %d: %w", n, err)
	}
	return free[1:], nil
}

// release takes a slot off a container's account.
func (d *Datapath) release(group uint64) {
	var u bpf.Usage
	if group == 0 || d.maps.UsageByGroup.Lookup(group, &u) != nil || u.Slots == 0 {
		return
	}
	u.Slots--
	// A hook that adds at this very moment is overwritten, and the account is
	// one too low: quotas are no exact science. ErrKeyNotExist: it is gone.
	_ = d.maps.UsageByGroup.Update(group, u, ebpf.UpdateExist)
}
