package route

import (
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream"
)

func dst(s string) flow.OrigDst { return flow.OrigDst{AddrPort: netip.MustParseAddrPort(s)} }

func services() []Service {
	addr := netip.MustParseAddrPort
	return []Service{
		{Name: "web", Addr: addr("10.96.0.12:80"), Cluster: &upstream.Cluster{Name: "web"}},
		{Name: "tls", Addr: addr("10.96.0.12:443"), Cluster: &upstream.Cluster{Name: "tls"}},
		{Name: "six", Addr: addr("[2001:db8::1]:80"), Cluster: &upstream.Cluster{Name: "six"}},
		{Name: "mapped", Addr: addr("[::ffff:10.96.0.13]:80"), Cluster: &upstream.Cluster{Name: "mapped"}},
	}
}

func TestLookup(t *testing.T) {
	table, err := NewTable(services(), flow.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	for to, want := range map[string]string{
		"10.96.0.12:80":    "web",
		"10.96.0.12:443":   "tls",
		"[2001:db8::1]:80": "six",
		"10.96.0.13:80":    "mapped",
		"10.96.0.12:81":    "",
		"10.96.0.14:80":    "",
		"[2001:db8::2]:80": "",
	} {
		s, ok := table.Lookup(dst(to))
		if ok != (want != "") {
			t.Errorf("%s: found %v, want %q", to, ok, want)
			continue
		}
		if ok && (s.Name != want || s.Cluster.Name != want) {
			t.Errorf("%s: service %s with cluster %s, want %s", to, s.Name, s.Cluster.Name, want)
		}
	}
	if _, ok := table.Lookup(flow.OrigDst{}); ok {
		t.Error("a service at no address")
	}
}

// The order of the configuration is the order of listings.
func TestServices(t *testing.T) {
	in := services()
	table, err := NewTable(in, flow.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	in[0].Name = "changed by its owner"
	var names []string
	for _, s := range table.Services() {
		names = append(names, s.Name)
		if s.Addr.Addr().Is4In6() {
			t.Errorf("%s is in mapped form", s.Name)
		}
	}
	if diff := cmp.Diff([]string{"web", "tls", "six", "mapped"}, names); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if s, _ := table.Lookup(dst("10.96.0.12:80")); s.Name != "web" {
		t.Errorf("the table keeps the caller's slice: %s", s.Name)
	}
}

func TestEmpty(t *testing.T) {
	empty, err := NewTable(nil, flow.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	for name, table := range map[string]*Table{"nil": nil, "empty": empty} {
		if s, ok := table.Lookup(dst("10.96.0.12:80")); ok || s != nil {
			t.Errorf("%s: %v, %v", name, s, ok)
		}
		if got := table.Services(); len(got) != 0 {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestNewTableErrors(t *testing.T) {
	in := append(services(),
		Service{Name: "again", Addr: netip.MustParseAddrPort("[::ffff:10.96.0.12]:80"), Cluster: &upstream.Cluster{}},
		Service{Name: "nowhere", Cluster: &upstream.Cluster{}},
		Service{Name: "bare", Addr: netip.MustParseAddrPort("10.96.0.15:80")},
	)
	table, err := NewTable(in, flow.Limits{})
	if err == nil || table != nil {
		t.Fatalf("%v, %v", table, err)
	}
	want := []string{
		`service "again": 10.96.0.12:80 is service "web" already`,
		`service "nowhere": no address`,
		`service "bare": no cluster`,
	}
	if diff := cmp.Diff(want, strings.Split(err.Error(), "\n")); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestLookupDoesNotAllocate(t *testing.T) {
	table, err := NewTable(services(), flow.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	to := dst("[2001:db8::1]:80")
	if n := testing.AllocsPerRun(100, func() { table.Lookup(to) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Workers look up at once, without a lock.
func TestLookupRace(t *testing.T) {
	table, err := NewTable(services(), flow.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	var workers sync.WaitGroup
	defer workers.Wait()
	for range 8 {
		workers.Go(func() {
			for range 1000 {
				if s, ok := table.Lookup(dst("10.96.0.12:80")); !ok || s.Name != "web" {
					t.Errorf("%v, %v", s, ok)
					return
				}
				table.Services()
			}
		})
	}
}
