package loader

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/pillion-project/pillion/bpf"
	"golang.org/x/sys/unix"
)

// A process whose descriptors another one shares may die without any of them being
// closed: then the programs, the links, and who has the lock are what they were. To
// load the same programs once more takes most of the time of a start.

// What handles are called: one for the locked directory, and one for each map, program,
// link, and ring, by its name or number.
const (
	pinsHandle    = "pins"
	mapHandle     = "map "
	programHandle = "program "
	linkHandle    = "link "
	ringHandle    = "ring "
)

// handles returns the descriptors that [Options.Handles] takes. The caller has linkMu.
func (d *Datapath) handles() map[string]int {
	all := map[string]int{pinsHandle: int(d.dir.file.Fd())}
	v := reflect.ValueOf(&d.maps).Elem()
	for i := range v.NumField() {
		if m := v.Field(i).Interface().(*ebpf.Map); m != nil {
			all[mapHandle+v.Type().Field(i).Tag.Get("ebpf")] = m.FD()
		}
	}
	for name, p := range d.programs {
		all[programHandle+name] = p.FD()
	}
	for name, l := range d.links {
		if fd, ok := l.(interface{ FD() int }); ok {
			all[linkHandle+name] = fd.FD()
		}
	}
	for i, q := range d.queues {
		all[ringHandle+strconv.Itoa(i)] = q.ring.FD()
	}
	return all
}

// keep tells who keeps handles which there are. The caller has linkMu.
func (d *Datapath) keep() {
	if d.options.Keep != nil && d.attached && !d.left.Load() {
		d.options.Keep(d.handles())
	}
	d.disturbed = false
}

// disturb comes before a handle is closed. The caller has linkMu.
func (d *Datapath) disturb() {
	if d.options.Keep != nil && !d.disturbed {
		d.options.Keep(nil)
	}
	d.disturbed = true
}

// keepNone is disturb for a caller that has not linkMu.
func (d *Datapath) keepNone() {
	d.linkMu.Lock()
	defer d.linkMu.Unlock()
	d.disturb()
}

// Resumed tells whether the datapath goes on with the programs of the earlier process.
func (d *Datapath) Resumed() bool { return d.resumed }

// Resume is [Open] for a process that has the descriptors of the earlier one: see
// [Options.Handles]. They are the datapath's from now on, and are closed on an error.
// [Datapath.Charge] must come before anything is changed.
func Resume(o Options) (*Datapath, error) {
	h := o.Handles
	d, err := resume(o)
	if err == nil {
		return d, nil
	}
	for _, fd := range h {
		unix.Close(fd)
	}
	return nil, fmt.Errorf("resume instance %s: %w", o.Name, err)
}

// resume takes what it uses out of the handles.
func resume(o Options) (_ *Datapath, err error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	d := newDatapath(o)
	d.adopted, d.resumed = true, true
	d.dir = &dir{path: pinDir(o.BPFFS, o.Name)}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if fd, ok := take(o.Handles, pinsHandle); ok {
		d.dir.file = os.NewFile(uintptr(fd), "pins")
	}
	if d.dir.file == nil || !same(d.dir.file, d.dir.path) {
		return nil, errors.New("what is locked are not its pins")
	}
	maps := map[string]*ebpf.Map{}
	v := reflect.ValueOf(&d.maps).Elem()
	for i := range v.NumField() {
		name := v.Type().Field(i).Tag.Get("ebpf")
		if maps[name], err = taken(o.Handles, mapHandle+name, ebpf.NewMapFromFD); err != nil {
			return nil, err
		}
		v.Field(i).Set(reflect.ValueOf(maps[name]))
	}
	for name := range o.Handles {
		if rest, ok := strings.CutPrefix(name, programHandle); ok {
			if d.programs[rest], err = taken(o.Handles, name, ebpf.NewProgramFromFD); err != nil {
				delete(d.programs, rest)
				return nil, err
			}
		}
	}
	_, d.holds = o.Handles[linkHandle+bpf.ProgHold]
	for _, name := range attachOrder(d.holds) {
		if d.links[name], err = taken(o.Handles, linkHandle+name, link.NewFromFD); err != nil {
			delete(d.links, name)
			return nil, err
		}
	}
	return d, d.goOn(maps)
}

// goOn is the part of resume that is like [Datapath.open].
func (d *Datapath) goOn(maps map[string]*ebpf.Map) error {
	if err := d.maps.Instance.Lookup(uint32(0), &d.instance); err != nil {
		return fmt.Errorf("read map %s: %w", instancePin, err)
	}
	// The cgroup may have been made again since, as it may while a process runs: then
	// Watch follows.
	if err := d.sameScope(); err != nil && d.instance.Netns != d.options.Scope.Netns {
		return err
	}
	d.slots = rangeOf(&d.instance)
	var err error
	if d.network, err = openNetwork(); err != nil {
		return err
	}
	d.slots = d.network.usable(d.slots)
	if d.clock, err = bpf.NewClock(); err != nil {
		return err
	}
	if d.state, err = mapState(maps["state"]); err != nil {
		return err
	}
	d.keepMaps(maps)
	d.heldSpec = innerLater("held")
	d.sets.open(&d.maps, innerLater("sets"))
	for i := 0; ; i++ {
		ring, ok := take(d.options.Handles, ringHandle+strconv.Itoa(i))
		if !ok {
			break
		}
		m, err := ebpf.NewMapFromFD(ring)
		if err != nil {
			return fmt.Errorf("the handle of ring %d is none: %w", i, err)
		}
		q, err := d.queueOf(m)
		if err != nil {
			return err
		}
		d.queues = append(d.queues, q)
	}
	return nil
}

// Charge is what Resume puts off, since connections can go on without it.
func (d *Datapath) Charge() error {
	if err := d.takeCharge(); err != nil {
		return fmt.Errorf("resume instance %s: %w", d.options.Name, err)
	}
	return nil
}

func take(h map[string]int, name string) (fd int, ok bool) {
	fd, ok = h[name]
	delete(h, name)
	return fd, ok
}

// taken makes something of a handle. What makes it closes the descriptor when it fails.
func taken[T any](h map[string]int, name string, from func(int) (T, error)) (T, error) {
	fd, ok := take(h, name)
	if !ok {
		var none T
		return none, fmt.Errorf("there is no handle of %s", name)
	}
	t, err := from(fd)
	if err != nil {
		return t, fmt.Errorf("the handle of %s is none: %w", name, err)
	}
	return t, nil
}
