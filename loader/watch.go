package loader

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/pace"
	"golang.org/x/sys/unix"
)

const (
	// settle lets a burst of changes come in before they are looked at.
	settle = 20 * time.Millisecond
	// lookEvery is how often links and pins are looked at: somebody may have
	// removed one, which gives no news.
	lookEvery = time.Second
	// scopeEvery is how often the scope's cgroup is, where its birth gave no news:
	// whoever starts in one that was made again is not captured until then.
	scopeEvery = 200 * time.Millisecond
	// syncEvery is how often addresses and routes are read without news.
	syncEvery = 30 * time.Second
)

// Sync tells the kernel side of the namespace's addresses and routes, and
// brings the slots' own routes and the links back if they are gone or wrong.
// It returns what it had to mend, in words.
func (d *Datapath) Sync() ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.left.Load() {
		return nil, nil
	}
	mended, lost, err := d.network.repair(d.slots)
	err = errors.Join(err, d.lose(lost))
	// One route that cannot be had is no reason to miss the other news.
	return mended, errors.Join(err, d.syncNetwork())
}

// lose makes the connections of families without a slot route go by on_failure.
func (d *Datapath) lose(families uint32) error {
	if before := d.lost.Swap(families); before == families {
		return nil
	}
	if families != 0 {
		d.options.Log.Warn("IPv6 is switched off: its connections are not redirected", "reason", flow.ReasonNoFamily)
	}
	if d.settings.Families == 0 {
		return nil // SetRules comes later
	}
	d.settings.Families = d.slots.families &^ families
	return d.putSettings()
}

// Usable tells whether the slots of a family can be reached at all.
func (d *Datapath) Usable(v6 bool) bool {
	bit := uint32(1)
	if v6 {
		bit = 2
	}
	return d.slots.families&^d.lost.Load()&bit != 0
}

func (d *Datapath) syncNetwork() error {
	addrs, err := d.network.addresses()
	if err != nil {
		return err
	}
	routes, err := d.network.routeTable(addrs)
	if err != nil {
		return err
	}
	own, classes := make(map[bpf.IPAddr]uint32, len(addrs)), ^uint64(0)
	for _, a := range addrs {
		ip := bpf.FromAddr(a)
		own[ip] = 1
		// To these a connect is left alone whoever has them.
		if !a.IsLoopback() && !a.IsLinkLocalUnicast() {
			classes &^= bpf.ClassOf(ip)
		}
	}
	ways := make(map[bpf.PrefixKey]bpf.Route, len(routes))
	for p, w := range routes {
		ways[prefixKey(p)] = bpf.Route{Kind: w.kind, Source: bpf.FromAddr(w.source)}
	}
	for _, p := range Supernets() { // maglev by source goes by these: hash_on
		source := d.network.source(p.Addr().Is6())
		ways[prefixKey(p)] = bpf.Route{Kind: bpf.RouteUnicast, Source: bpf.FromAddr(source)}
	}
	return errors.Join(d.replaceOwn(own, classes), replace(d.maps.Routes, ways, nil))
}

// replaceOwn tells the hooks of the own addresses, and of the classes that have none that
// counts. At no moment, and whatever of it fails, is such an address in a class that has none.
func (d *Datapath) replaceOwn(own map[bpf.IPAddr]uint32, classes uint64) error {
	var before uint64
	if err := d.maps.NotOwn.Lookup(uint32(0), &before); err != nil {
		return fmt.Errorf("read map not_own: %w", err)
	}
	if err := d.putNotOwn(before & classes); err != nil {
		return err
	}
	if err := replace(d.maps.OwnAddrs, own, nil); err != nil {
		return err
	}
	return d.putNotOwn(classes)
}

func (d *Datapath) putNotOwn(classes uint64) error {
	if err := d.maps.NotOwn.Put(uint32(0), classes); err != nil {
		return fmt.Errorf("write map not_own: %w", err)
	}
	return nil
}

func prefixKey(p netip.Prefix) bpf.PrefixKey {
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	return bpf.PrefixKey{Prefixlen: uint32(bits), Addr: bpf.FromAddr(p.Masked().Addr())}
}

// Kick makes [Datapath.Watch] look at once: something seems to be wrong.
func (d *Datapath) Kick() { signal(d.kick) }

// Watch keeps the kernel side in step with the namespace until ctx is done, and
// mends what others break: routes, links, pins. Everything it mends is logged.
func (d *Datapath) Watch(ctx context.Context) error {
	news, born := make(chan struct{}, 1), make(chan struct{}, 1)
	done := make(chan struct{})
	scopeBirth, err := openBirth(&d.options.Scope)
	if err != nil {
		d.options.Log.Warn("hears late of a cgroup that is made again", "error", err)
	}
	defer scopeBirth.close()
	go d.listen(ctx, scopeBirth, news, born, done)
	defer func() { <-done }()
	look, scope := time.NewTimer(pace.Next(lookEvery)), time.NewTimer(pace.Next(scopeEvery))
	sync := time.NewTicker(syncEvery)
	defer look.Stop()
	defer scope.Stop()
	defer sync.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
			look.Reset(pace.Next(lookEvery))
			d.mendLinks()
			continue
		case <-scope.C:
			scope.Reset(pace.Next(scopeEvery))
			scopeBirth.arm()
			if d.renewed() {
				d.mendLinks()
			}
			continue
		case <-born:
			if d.renewed() {
				d.mendLinks()
			}
			continue
		case <-news:
			pause(ctx, settle)
		case <-d.kick:
			d.mendLinks()
		case <-sync.C:
		}
		d.mendNetwork()
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func (d *Datapath) mendNetwork() {
	mended, err := d.Sync()
	for _, what := range mended {
		d.options.Log.Warn("mended a slot route", "route", what)
	}
	if err != nil {
		d.options.Log.Error("cannot follow the namespace's routes", "error", err)
	}
}

func (d *Datapath) mendLinks() {
	names, err := d.Reattach()
	if len(names) > 0 {
		d.options.Log.Warn("mended a link or a pin", "names", names)
	}
	d.detached.Store(err != nil && !d.standing())
	d.unpinned.Store(err != nil && !d.detached.Load())
	if err == nil {
		d.linkTrouble = ""
	} else if text := err.Error(); text != d.linkTrouble {
		// Once: it is tried again every second.
		d.linkTrouble = text
		d.options.Log.Error("cannot keep the programs attached and pinned", "error", err)
	}
}

// Detached tells whether a program is not attached, and cannot be: what it was
// attached to may be gone.
func (d *Datapath) Detached() bool { return d.detached.Load() }

// Unpinned tells whether pins are gone and cannot be made again: what is in force
// ends with this process.
func (d *Datapath) Unpinned() bool { return d.unpinned.Load() }

// listen turns the kernel's news into signals: born is of the scope's cgroup, news of
// all else. It ends with ctx.
func (d *Datapath) listen(ctx context.Context, scope *birth, news, born chan<- struct{}, done chan<- struct{}) {
	defer close(done)
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		d.options.Log.Error("cannot hear of route changes", "error", fmt.Errorf("create eventfd: %w", err))
		return // syncEvery still holds
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		// The counter cannot be full.
		_, _ = unix.Write(wake, []byte{7: 1})
	})
	for {
		ready := []unix.PollFd{{Fd: int32(d.network.events.GetFd()), Events: unix.POLLIN}, {Fd: int32(wake), Events: unix.POLLIN}, scope.poll()}
		if !d.hear(ctx, ready) {
			break
		}
		if ready[2].Revents != 0 && scope.born() {
			signal(born)
		}
		if ready[0].Revents != 0 {
			signal(news)
		}
	}
	if !stop() {
		<-stopped
	}
	unix.Close(wake)
}

// signal wakes who waits, or who is about to.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// hear waits for news. It returns false when ctx is done.
func (d *Datapath) hear(ctx context.Context, ready []unix.PollFd) bool {
	if _, err := unix.Poll(ready, -1); err != nil && !errors.Is(err, unix.EINTR) {
		d.options.Log.Error("cannot hear of route changes", "error", fmt.Errorf("poll: %w", err))
		return false
	}
	if ctx.Err() != nil {
		return false
	}
	if ready[0].Revents == 0 {
		return true
	}
	// ENOBUFS: some were lost, which is as good a reason to look.
	if _, _, err := d.network.events.Receive(); err != nil && !errors.Is(err, unix.ENOBUFS) {
		d.options.Log.Error("cannot hear of route changes", "error", fmt.Errorf("receive: %w", err))
		pause(ctx, lookEvery)
	}
	return true
}
