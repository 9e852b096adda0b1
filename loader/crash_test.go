package loader

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/loader/probe"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
)

// partial are the states that a process leaves which is killed while it creates
// an instance, in the order in which it goes through them. Each makes one by
// the steps of create, and returns what to close.
var partial = []struct {
	name string
	make func(d *Datapath) error
}{
	{"directory only", func(*Datapath) error { return nil }},
	{"record pinned, and empty", func(d *Datapath) error { return d.pinRecord() }},
	{"range intended", func(d *Datapath) error {
		return errors.Join(d.pinRecord(), d.intend(another()))
	}},
	{"another's range intended", func(d *Datapath) error {
		return errors.Join(d.pinRecord(), d.intend(slotRange{number: os.Getpid() % ranges}))
	}},
	{"range claimed by half", func(d *Datapath) error {
		r := another()
		return errors.Join(d.pinRecord(), d.intend(r), d.network.addRoute(r.prefix4()))
	}},
	{"range claimed", func(d *Datapath) error { return errors.Join(d.pinRecord(), d.claimRange()) }},
	{"some maps pinned", func(d *Datapath) error { return errors.Join(d.pinRecord(), d.claimRange(), d.somePins(7)) }},
	{"all maps pinned", func(d *Datapath) error { return errors.Join(d.pinRecord(), d.claimRange(), d.somePins(1000)) }},
}

// another is a range that is not that of an instance which has begun with the one that
// the process number says.
func another() slotRange { return slotRange{number: (os.Getpid() + 1) % ranges} }

func (d *Datapath) pinRecord() error {
	specs, err := bpf.Specs()
	if err != nil {
		return err
	}
	if d.network, err = openNetwork(); err != nil {
		return err
	}
	if d.maps.Instance, err = ebpf.NewMap(specs[0].Maps[instancePin]); err != nil {
		return err
	}
	return d.maps.Instance.Pin(d.dir.pin(instancePin))
}

func (d *Datapath) claimRange() (err error) {
	d.slots, err = d.network.claim(another().number, d.intend)
	return err
}

func (d *Datapath) somePins(most int) error {
	specs, err := bpf.Specs()
	if err != nil {
		return err
	}
	names := []string{}
	all := sharedMaps(specs)
	for name := range all {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names[:min(most, len(names))] {
		if name == instancePin {
			continue
		}
		m, err := ebpf.NewMap(all[name])
		if err != nil {
			return err
		}
		err = m.Pin(d.dir.pin(name))
		m.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// leave makes a partial state, as by a process that is no more.
func (p *place) leave(t *testing.T, name string, make func(*Datapath) error) {
	t.Helper()
	err := p.do(t, name, func(o Options) error {
		if err := o.fill(); err != nil {
			return err
		}
		if err := mountBPFFS(o.BPFFS); err != nil {
			return err
		}
		path := filepath.Join(pinRoot(o.BPFFS), o.Name)
		if err := os.MkdirAll(path, 0o700); err != nil {
			return err
		}
		d := newDatapath(o)
		var err error
		if d.dir, err = lockDir(path, false); err != nil {
			return err
		}
		return errors.Join(make(d), d.Close())
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestPartial finds every state that a killed Create leaves. It cannot be
// opened, nor made over, and that changes nothing; it can be removed and swept,
// and then nothing is left; and another one beside it is not touched.
func TestPartial(t *testing.T) {
	for _, state := range partial {
		for _, verb := range []string{"remove", "sweep"} {
			t.Run(state.name+"/"+verb, func(t *testing.T) {
				p := newPlace(t)
				beside := p.create(t, "beside")
				before := p.routes(t)
				p.leave(t, "one", state.make)
				pins, routes := p.pins("one"), p.routes(t)
				err := p.do(t, "one", func(o Options) error {
					if _, err := Open(o); !errors.Is(err, ErrIncomplete) {
						t.Errorf("open: %v, want %v", err, ErrIncomplete)
					}
					if _, err := Create(o); !errors.Is(err, ErrExists) {
						t.Errorf("create: %v, want %v", err, ErrExists)
					}
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(pins, p.pins("one")); diff != "" {
					t.Errorf("pins changed: %s", diff)
				}
				if diff := cmp.Diff(routes, p.routes(t)); diff != "" {
					t.Errorf("routes changed: %s", diff)
				}
				found, err := List(p.bpffs, p.root)
				if err != nil || len(found) != 2 || !found[0].Running || found[1].Running || found[1].Problem == "" {
					t.Errorf("list: %+v, %v", found, err)
				}
				err = p.do(t, "one", func(o Options) error {
					if verb == "remove" {
						return Remove(p.bpffs, p.root, "one")
					}
					_, err := Sweep(p.bpffs, p.root)
					return err
				})
				if err != nil {
					t.Error(err)
				}
				if left := p.pins(""); !slices.Equal(left, []string{"beside"}) {
					t.Errorf("left: %v", left)
				}
				if diff := cmp.Diff(before, p.routes(t)); diff != "" {
					t.Errorf("routes: %s", diff)
				}
				p.unload(t, p.create(t, "one"))
				p.unload(t, beside)
				p.clean(t)
			})
		}
	}
}

// TestSomeLinks opens what a process left that was killed while it attached.
func TestSomeLinks(t *testing.T) {
	order := attachOrder(probe.TCX() == nil)
	for n := range len(order) + 1 {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			p := newPlace(t)
			d := p.create(t, "one")
			setRules(t, d, plain)
			p.attach(t, d)
			// As if the last ones had not been attached yet.
			for _, name := range order[n:] {
				if err := errors.Join(os.Remove(d.dir.pin(linkPrefix+name)), d.links[name].Close()); err != nil {
					t.Fatal(err)
				}
				delete(d.links, name)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if n%2 == 0 {
				if err := p.do(t, "one", func(Options) error { return Remove(p.bpffs, p.root, "one") }); err != nil {
					t.Error(err)
				}
				p.clean(t)
				return
			}
			if err := p.do(t, "one", func(o Options) (err error) { d, err = Open(o); return err }); err != nil {
				t.Fatal(err)
			}
			setRules(t, d, plain)
			p.attach(t, d)
			p.handler(t, d)
			if err := p.connect(t, far); err != nil {
				t.Errorf("captured: %v", err)
			}
			if got := reason(t, d, flow.ReasonDefault); got != 1 {
				t.Errorf("%d redirected, want 1", got)
			}
			p.unload(t, d)
			p.clean(t)
		})
	}
}

// TestABI finds the pins of another version: nothing opens them, makes over
// them, removes or sweeps them, and they stay as they are.
func TestABI(t *testing.T) {
	specs, err := bpf.Specs()
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Datapath) error{
		"another number": func(d *Datapath) error {
			d.instance.Abi = bpf.ABI + 1
			return d.maps.Instance.Put(uint32(0), d.instance)
		},
		"another record": func(d *Datapath) error {
			if err := os.Remove(d.dir.pin(instancePin)); err != nil {
				return err
			}
			spec := specs[0].Maps[instancePin].Copy()
			spec.ValueSize += 8
			spec.Key, spec.Value = nil, nil
			m, err := ebpf.NewMap(spec)
			if err != nil {
				return err
			}
			defer m.Close()
			return m.Pin(d.dir.pin(instancePin))
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			d := p.create(t, "one")
			setRules(t, d, plain)
			p.attach(t, d)
			original := d.instance
			if err := errors.Join(change(d), d.Close()); err != nil {
				t.Fatal(err)
			}
			pins, routes := p.pins("one"), p.routes(t)
			for what, f := range map[string]func(Options) error{
				"open":   func(o Options) error { _, err := Open(o); return err },
				"remove": func(Options) error { return Remove(p.bpffs, p.root, "one") },
			} {
				err := p.do(t, "one", f)
				if !errors.Is(err, ErrABI) || !strings.Contains(err.Error(), "this build") {
					t.Errorf("%s: %v, want %v", what, err, ErrABI)
				}
			}
			err := p.do(t, "one", func(o Options) error {
				if _, err := Create(o); !errors.Is(err, ErrExists) {
					t.Errorf("create: %v", err)
				}
				swept, err := Sweep(p.bpffs, p.root)
				if len(swept) > 0 {
					t.Errorf("swept %v", swept)
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
			if diff := cmp.Diff(pins, p.pins("one")); diff != "" {
				t.Errorf("pins changed: %s", diff)
			}
			if diff := cmp.Diff(routes, p.routes(t)); diff != "" {
				t.Errorf("routes changed: %s", diff)
			}
			found, err := List(p.bpffs, p.root)
			if err != nil || len(found) != 1 || !strings.Contains(found[0].Problem, ErrABI.Error()) {
				t.Errorf("list: %+v, %v", found, err)
			}
			// The version that made it takes it away.
			err = p.App.Run(func() error {
				held, err := lockDir(filepath.Join(pinRoot(p.bpffs), "one"), false)
				if err != nil {
					return err
				}
				defer held.unlock()
				return removeAll(held, p.root, &original)
			})
			if err != nil {
				t.Error(err)
			}
			removeRoot(p.bpffs)
			p.clean(t)
		})
	}
}

// TestForeignFiles finds what is not Pillion's among the instances and in one.
func TestForeignFiles(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	setRules(t, d, plain)
	p.attach(t, d)
	foreign, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	root := pinRoot(p.bpffs)
	beside, inside := filepath.Join(root, "somebodys"), filepath.Join(root, "one", "theirs")
	if err := errors.Join(foreign.Pin(beside), os.Mkdir(inside, 0o700), os.Mkdir(filepath.Join(inside, "deep"), 0o700)); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	found, err := List(p.bpffs, p.root)
	if err != nil || len(found) != 1 || found[0].Problem != "" || found[0].Name != "one" {
		t.Errorf("list: %+v, %v", found, err)
	}
	if err := p.do(t, "one", func(o Options) (err error) { d, err = Open(o); return err }); err != nil {
		t.Fatal(err)
	}
	p.attach(t, d)
	// What is ours goes; what is not stays, and is named.
	if err := d.Unload(); err == nil || !strings.Contains(err.Error(), inside) {
		t.Errorf("unload: %v", err)
	}
	if left := p.pins("one"); !slices.Equal(left, []string{"theirs"}) {
		t.Errorf("left: %v", left)
	}
	if err := os.RemoveAll(inside); err != nil {
		t.Fatal(err)
	}
	if err := p.do(t, "one", func(Options) error { return Remove(p.bpffs, p.root, "one") }); err != nil {
		t.Error(err)
	}
	if left := p.pins(""); !slices.Equal(left, []string{"somebodys"}) {
		t.Errorf("left: %v", left)
	}
	if err := os.Remove(beside); err != nil {
		t.Error(err)
	}
	removeRoot(p.bpffs)
	p.clean(t)
}

// TestNotPrivate finds a directory of instances that others can enter.
func TestNotPrivate(t *testing.T) {
	p := newPlace(t)
	if err := p.do(t, "one", func(o Options) error { return mountBPFFS(p.bpffs) }); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(pinRoot(p.bpffs), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(pinRoot(p.bpffs), 0o755); err != nil {
		t.Fatal(err)
	}
	err := p.do(t, "one", func(o Options) error { _, err := Create(o); return err })
	if err == nil || !strings.Contains(err.Error(), "755") {
		t.Errorf("create: %v", err)
	}
	if err := os.Remove(pinRoot(p.bpffs)); err != nil {
		t.Error(err)
	}
}

// TestSweepExec sweeps what is around a command when its maker is gone, its
// cgroups too, but not while a process is in one of them.
func TestSweepExec(t *testing.T) {
	p := newPlace(t)
	p.scope = &testutil.Cgroup{Path: filepath.Join(p.scope.Path, ExecCgroupPrefix+"one")}
	below := filepath.Join(p.scope.Path, "made", "below")
	if err := os.MkdirAll(below, 0o755); err != nil {
		t.Fatal(err)
	}
	d := p.create(t, "one", func(o *Options) { o.Kind = KindExec })
	setRules(t, d, plain)
	p.attach(t, d)
	sweep := func(want ...string) {
		t.Helper()
		err := p.do(t, "one", func(Options) error {
			swept, err := Sweep(p.bpffs, p.root)
			if !slices.Equal(swept, want) {
				t.Errorf("swept %v, want %v", swept, want)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	sweep() // it is held
	maker := d.instance
	dead := d.instance
	dead.PidStart++ // another process has the number now
	if err := d.maps.Instance.Put(uint32(0), dead); err != nil {
		t.Fatal(err)
	}
	rec, err := d.maps.Instance.Clone()
	if err != nil {
		t.Fatal(err)
	}
	defer rec.Close()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	command := exec.Command("sleep", "1000")
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	kill := func() {
		command.Process.Kill()
		command.Wait()
	}
	defer kill()
	if err := os.WriteFile(filepath.Join(below, "cgroup.procs"), []byte(fmt.Sprint(command.Process.Pid)), 0); err != nil {
		t.Fatal(err)
	}
	sweep() // its command lives
	kill()
	testutil.Eventually(t, patience, func() bool { return CgroupEmpty(p.scope.Path) }, "the command is gone")
	if err := rec.Put(uint32(0), maker); err != nil {
		t.Fatal(err)
	}
	sweep() // its maker lives
	if err := rec.Put(uint32(0), dead); err != nil {
		t.Fatal(err)
	}
	sweep("one")
	if _, err := os.Stat(p.scope.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the cgroup is left: %v", err)
	}
	removeRoot(p.bpffs)
	p.clean(t)
}

// envCrash makes this test binary one that creates, attaches and unloads an
// instance, until it is killed: the bpf file system, the root of the cgroups,
// the scope and whether to unload.
const envCrash = "PILLION_TEST_CRASH"

func crash() {
	// Whoever counts system calls counts those of one thread.
	runtime.LockOSThread()
	w := strings.Split(os.Getenv(envCrash), "|")
	err := func() error {
		scope, err := FindScope(w[1], w[2])
		if err != nil {
			return err
		}
		d, err := Create(Options{Name: "one", Kind: KindExec, Scope: scope, BPFFS: w[0]})
		if err != nil {
			return err
		}
		// SetRules would read four thousand slots.
		if err := d.applySettings(plain); err != nil {
			return err
		}
		if _, err := d.Sync(); err != nil {
			return err
		}
		if _, err := d.Attach(); err != nil {
			return err
		}
		return d.Unload()
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// TestKilled kills a process at one system call after the other while it
// creates, attaches and unloads an instance. What it leaves is opened and works,
// or is removed, or is swept; then nothing is left.
func TestKilled(t *testing.T) {
	testutil.RequireRoot(t)
	testutil.Need(t, "strace")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	outcomes := map[string]int{}
	for call, plan := range map[string]struct{ least, stride int }{
		"bpf": {60, 9}, "sendto": {6, 3}, "unlinkat": {10, 5}, "mkdirat": {2, 1}, "flock": {2, 1},
	} {
		n, ended := 1, false
		for ok := true; ok && !ended; n += plan.stride {
			ok = t.Run(fmt.Sprintf("%s %d", call, n), func(t *testing.T) {
				p := newPlace(t)
				p.scope = p.scope.Child(t, "scope")
				if err := p.do(t, "one", func(Options) error { return mountBPFFS(p.bpffs) }); err != nil {
					t.Fatal(err)
				}
				cmd := exec.Command("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace="+call,
					"-e", fmt.Sprintf("inject=%s:signal=SIGKILL:when=%d", call, n), self)
				cmd.Env = append(os.Environ(), envCrash+"="+strings.Join([]string{p.bpffs, p.root, p.scope.Path}, "|"))
				out := &strings.Builder{}
				cmd.Stderr = out
				if err := p.App.Start(cmd); err != nil {
					t.Fatal(err)
				}
				ended = cmd.Wait() == nil
				if out.Len() > 0 {
					t.Errorf("it says: %s", out)
				}
				outcomes[p.afterwards(t, n)]++
			})
		}
		if ended && n < plan.least {
			t.Errorf("it makes less than %d calls of %s: the test misses something", n, call)
		}
	}
	t.Log(outcomes)
}

// afterwards cleans up after a killed process, in one of three ways.
func (p *place) afterwards(t *testing.T, way int) (what string) {
	t.Helper()
	err := p.do(t, "one", func(o Options) error {
		o.Kind = KindExec
		if way%3 == 0 {
			what = "swept"
			_, err := Sweep(p.bpffs, p.root)
			return err
		}
		d, err := Open(o)
		switch {
		case errors.Is(err, ErrNotFound):
			what = "not there"
			return nil
		case errors.Is(err, ErrIncomplete):
			what = "incomplete"
			return Remove(p.bpffs, p.root, "one")
		case err != nil:
			return err
		}
		what = "opened"
		if err := d.SetRules(plain); err != nil {
			return errors.Join(err, d.Close())
		}
		if _, err := d.Sync(); err != nil {
			return errors.Join(err, d.Close())
		}
		if _, err := d.Attach(); err != nil {
			return errors.Join(err, d.Close())
		}
		return d.Unload()
	})
	if err != nil {
		t.Error(err)
	}
	removeRoot(p.bpffs)
	p.clean(t)
	return what
}
