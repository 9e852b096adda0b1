package loader

import (
	"maps"
	"os"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"golang.org/x/sys/unix"
)

// kept is who keeps handles.
type kept struct{ told []map[string]int }

func (k *kept) keep(h map[string]int) { k.told = append(k.told, maps.Clone(h)) }

func (k *kept) last() map[string]int {
	if len(k.told) == 0 {
		return nil
	}
	return k.told[len(k.told)-1]
}

// programIDs are those that links have attached, by name.
func programIDs(t *testing.T, d *Datapath) map[string]ebpf.ProgramID {
	t.Helper()
	all := map[string]ebpf.ProgramID{}
	for name, l := range d.links {
		info, err := l.Info()
		if err != nil {
			t.Fatal(err)
		}
		all[name] = info.Program
	}
	return all
}

// TestResume has a datapath go on with the descriptors of one that is gone: the same
// programs stay attached, the lock never is anybody else's, and all works as before.
func TestResume(t *testing.T) {
	p := newPlace(t)
	k := &kept{}
	first := p.create(t, "one", func(o *Options) { o.Keep = k.keep })
	setRules(t, first, plain)
	if _, err := first.Queues(2); err != nil {
		t.Fatal(err)
	}
	p.handler(t, first)
	if k.last() != nil {
		t.Errorf("before it is attached there are handles: %v", k.last())
	}
	p.attach(t, first)
	if k.last() == nil {
		t.Fatal("there are no handles of what is attached")
	}
	before, queues := programIDs(t, first), len(first.queues)
	// As a table of descriptors that outlives its process.
	left := map[string]int{}
	for name, fd := range k.last() {
		left[name] = dup(t, fd)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if k.last() != nil {
		t.Error("handles that are closed are kept")
	}

	var d *Datapath
	err := p.do(t, "one", func(o Options) (err error) {
		o.Keep, o.Handles, o.FrameTag, o.Own = k.keep, left, first.frameTag, 42
		if d, err = Resume(o); err != nil {
			return err
		}
		return d.Charge()
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("handles that nobody took: %v", left)
	}
	if !d.Resumed() || !d.Adopted() || len(d.Joined()) != queues || d.settings.OwnGroup != 42 {
		t.Errorf("resumed %v, adopted %v, %d queues, settings %+v", d.Resumed(), d.Adopted(), len(d.Joined()), d.settings)
	}
	p.handler(t, d)
	p.attach(t, d)
	if after := programIDs(t, d); !maps.Equal(after, before) {
		t.Errorf("attached are %v, it was %v", after, before)
	}
	if got, want := slices.Sorted(maps.Keys(k.last())), slices.Sorted(maps.Keys(k.told[0])); !slices.Equal(got, want) {
		t.Errorf("handles %v, want %v", got, want)
	}
	// With the maps, and the sets, whose spec is read late.
	setRules(t, d, withServices(roundSets(0)))
	if err := tryAll(d); err != nil {
		t.Error(err)
	}
	// A link that is made again has another handle.
	was := k.last()[linkHandle+bpf.ProgBind4]
	if err := detach(d.links[bpf.ProgBind4]); err != nil {
		t.Fatal(err)
	}
	told := len(k.told)
	if mended, err := d.Reattach(); err != nil || !slices.Equal(mended, []string{bpf.ProgBind4}) {
		t.Fatalf("attached again: %v, %v", mended, err)
	}
	if news := k.told[told:]; len(news) != 2 || news[0] != nil || news[1] == nil {
		t.Errorf("who keeps handles is told %v, when %d was closed", news, was)
	}
	p.unload(t, d)
	p.clean(t)
}

// TestResumeFails wants nothing left of handles that are no use, and the usual start to
// work then.
func TestResumeFails(t *testing.T) {
	p := newPlace(t)
	k := &kept{}
	first := p.create(t, "one", func(o *Options) { o.Keep = k.keep })
	setRules(t, first, plain)
	p.handler(t, first)
	p.attach(t, first)
	told := maps.Clone(k.last())
	spoil := map[string]func(map[string]int){
		"no lock": func(h map[string]int) { unix.Close(h[pinsHandle]); delete(h, pinsHandle) },
		"no map":  func(h map[string]int) { unix.Close(h[mapHandle+"live"]); delete(h, mapHandle+"live") },
		"no link": func(h map[string]int) {
			unix.Close(h[linkHandle+bpf.ProgSockops])
			delete(h, linkHandle+bpf.ProgSockops)
		},
		"another program": func(h map[string]int) { h[programHandle+bpf.ProgInject] = replaced(t, h[programHandle+bpf.ProgInject]) },
		"another link":    func(h map[string]int) { h[linkHandle+bpf.ProgBind4] = replaced(t, h[linkHandle+bpf.ProgBind4]) },
	}
	for what, f := range spoil {
		left := map[string]int{}
		for name, fd := range told {
			left[name] = dup(t, fd)
		}
		f(left)
		err := p.do(t, "one", func(o Options) error {
			o.Handles, o.FrameTag = left, first.frameTag
			d, err := Resume(o)
			if err == nil {
				d.Close()
			}
			return err
		})
		if err == nil {
			t.Errorf("%s: it goes on", what)
		}
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	var d *Datapath
	if err := p.do(t, "one", func(o Options) (err error) { d, err = Open(o); return err }); err != nil {
		t.Fatal(err)
	}
	p.unload(t, d)
	p.clean(t)
}

// replaced makes a descriptor one of something else.
func replaced(t *testing.T, fd int) int {
	t.Helper()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if err := unix.Dup3(int(null.Fd()), fd, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	return fd
}
