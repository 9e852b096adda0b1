package loader

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// envPublish makes this test binary one that opens an instance and publishes one
// round of sets after the other, until it is killed: the bpf file system, the root
// of the cgroups, and the scope.
const envPublish = "PILLION_TEST_PUBLISH"

// roundSets are sets for twenty services whose endpoints are those of a round: a
// third of them are in the next one too.
func roundSets(round int) map[netip.AddrPort]*flow.Set {
	sets := map[netip.AddrPort]*flow.Set{}
	for n := range 20 {
		var addrs []netip.AddrPort
		for i := range 6 {
			addrs = append(addrs, roundEndpoint(4*round+i))
		}
		sets[netip.AddrPortFrom(shop.Addr(), uint16(100+n))] = setOf(addrs...)
	}
	return sets
}

func roundEndpoint(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), 80)
}

func publishForever() {
	w := strings.Split(os.Getenv(envPublish), "|")
	err := func() error {
		scope, err := FindScope(w[1], w[2])
		if err != nil {
			return err
		}
		d, err := Open(Options{Name: "one", Kind: KindRun, Scope: scope, BPFFS: w[0]})
		if err != nil {
			return err
		}
		for round := 0; ; round++ {
			// Both ways, in turn.
			if round%2 == 0 {
				err = d.SetRules(withServices(roundSets(round % 2000)))
			} else {
				err = d.SetEndpoints(roundSets(round % 2000))
			}
			if err != nil {
				return err
			}
			if round == 0 {
				if err := tryAll(d); err != nil {
					return err
				}
				fmt.Println("go")
			}
		}
	}()
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// tryAll does what else there is to do with a set.
func tryAll(d *Datapath) error {
	service, endpoint := netip.AddrPortFrom(shop.Addr(), 100), roundEndpoint(0)
	if v, err := d.DryRun(netip.Addr{}, service); err != nil || !v.Endpoint.IsValid() {
		return fmt.Errorf("dry run: %+v, %w", v, err)
	}
	_, listed := d.Connections()
	_, ended := d.End(service, endpoint)
	_, states := d.EndpointStates(service)
	return errors.Join(listed, ended, states, d.SetDown(service, endpoint, false), d.recount())
}

// TestKilledPublishing kills a process while it publishes. Every service has one
// whole set, all of its endpoints are known by their indices, and the next process
// goes on with those.
func TestKilledPublishing(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := newPlace(t)
	d := p.create(t, "one")
	defer func() { p.unload(t, d) }()
	setRules(t, d, withServices(roundSets(0)))
	turns := 8
	if testutil.InVM() {
		turns = 3
	}
	for turn := range turns {
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), envPublish+"="+strings.Join([]string{p.bpffs, p.root, p.scope.Path}, "|"))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		errs := &strings.Builder{}
		cmd.Stderr = errs
		// No more than always-on programs may ask for.
		if err := (testutil.Place{NS: p.App}).With(unix.CAP_BPF, unix.CAP_NET_ADMIN).Start(cmd); err != nil {
			t.Fatal(err)
		}
		_, err = out.Read(make([]byte, 3))
		time.Sleep(time.Duration(turn) * 3 * time.Millisecond)
		cmd.Process.Kill()
		cmd.Wait()
		if err != nil || errs.Len() > 0 {
			t.Fatalf("%v: it says %s", err, errs)
		}
		if err := p.do(t, "one", func(o Options) (err error) { d, err = Open(o); return err }); err != nil {
			t.Fatal(err)
		}
		checkRound(t, d, turn)
	}
}

// checkRound looks at what a killed process left.
func checkRound(t *testing.T, d *Datapath, turn int) {
	t.Helper()
	before := map[netip.AddrPort]map[netip.AddrPort]uint32{}
	whose := map[uint32]bpf.EndpointName{}
	rounds := map[int]bool{}
	for service := range roundSets(0) {
		id, got := entry(t, d, service).Id, publishedOf(t, d, service)
		if len(got) != 6 {
			t.Fatalf("turn %d: service %s has %v", turn, service, got)
		}
		first := 1 << 30
		for addr, i := range got {
			var name bpf.EndpointName
			if err := d.maps.EndpointNames.Lookup(i, &name); err != nil {
				t.Fatal(err)
			}
			if name.Weight = 0; name != nameOf(id, addr, 0) {
				t.Errorf("turn %d: index %d is of %+v, want %s of %d", turn, i, name, addr, id)
			}
			if other, taken := whose[i]; taken {
				t.Errorf("turn %d: %+v and %+v have one index", turn, other, name)
			}
			whose[i] = name
			b := addr.Addr().As4()
			first = min(first, int(b[2])<<8|int(b[3]))
		}
		for n := range 6 {
			if _, ok := got[roundEndpoint(first+n)]; !ok || first%4 != 0 {
				t.Errorf("turn %d: service %s has parts of two sets: %v", turn, service, got)
			}
		}
		rounds[first/4] = true
		before[service] = got
	}
	// The kernel replaces one after the other, so it may have been half-way.
	if len(rounds) > 2 {
		t.Errorf("turn %d: sets of rounds %v", turn, rounds)
	}
	for round := range rounds {
		setRules(t, d, withServices(roundSets(round)))
		for service := range before {
			for addr, i := range publishedOf(t, d, service) {
				if was, ok := before[service][addr]; ok && was != i {
					t.Errorf("turn %d: %s of %s had index %d, has %d", turn, addr, service, was, i)
				}
			}
		}
		break
	}
}

// TestKept: who takes over knows the endpoints of every service, and those only that
// were in its last set; rules may leave a set as it is.
func TestKept(t *testing.T) {
	p := newPlace(t)
	d := p.create(t, "one")
	defer func() { p.unload(t, d) }()
	weighted := func(weights ...uint16) *flow.Set {
		var addrs []netip.AddrPort
		for n, w := range weights {
			if w > 0 {
				addrs = append(addrs, roundEndpoint(n))
			}
		}
		set := setOf(addrs...)
		for n := range set.Endpoints {
			b := addrs[n].Addr().As4()
			set.Endpoints[n].Weight = weights[b[3]]
		}
		return set
	}
	other, empty := netip.AddrPortFrom(shop.Addr(), 81), netip.AddrPortFrom(shop.Addr(), 82)
	kept := func(service netip.AddrPort, want bool, weights ...uint16) {
		t.Helper()
		got, ok := d.Kept(service)
		var all []KeptEndpoint
		for n, w := range weights {
			if w > 0 {
				all = append(all, KeptEndpoint{Addr: roundEndpoint(n), Weight: w})
			}
		}
		if ok != want || !slices.Equal(got, all) {
			t.Errorf("service %s: %v, %v; want %v, %v", service, ok, got, want, all)
		}
	}
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: weighted(1, 2, 3), other: weighted(5, 5), empty: setOf()}))
	kept(shop, false) // it is its own
	// One goes, one comes, one weighs something else, one comes back.
	setEndpoints(t, d, map[netip.AddrPort]*flow.Set{shop: weighted(0, 2, 7, 4)})
	setEndpoints(t, d, map[netip.AddrPort]*flow.Set{shop: weighted(9, 2, 7, 0)})
	d = p.restart(t, d)
	kept(shop, true, 9, 2, 7)
	kept(other, true, 5, 5)
	kept(empty, true)
	kept(netip.MustParseAddrPort("192.0.2.1:1"), false)
	inner, id := innerOf(t, d, shop), entry(t, d, shop).Id
	rules := plain
	rules.Services = []Service{{Addr: shop, Path: flow.PathRelay, Keep: true}, {Addr: other, Path: flow.PathDirect, Set: weighted(5, 6)}}
	setRules(t, d, rules)
	if got := entry(t, d, shop); got.Id != id || innerOf(t, d, shop) != inner || uint32(got.Path) != bpf.PathRelay {
		t.Errorf("the set is another: %+v", got)
	}
	kept(shop, true, 9, 2, 7)
	kept(other, false)
	kept(empty, false)
	states, err := d.EndpointStates(shop)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range states {
		if e.InSet != (e.Addr != roundEndpoint(3)) {
			t.Errorf("%s is in the set: %v", e.Addr, e.InSet)
		}
	}
	d = p.restart(t, d)
	kept(shop, true, 9, 2, 7)
	setRules(t, d, withServices(map[netip.AddrPort]*flow.Set{shop: weighted(0, 0, 1)}))
	kept(shop, false)
	d = p.restart(t, d)
	kept(shop, true, 0, 0, 1)
	// Without a word of it, it goes.
	setRules(t, d, plain)
	kept(shop, false)
}
