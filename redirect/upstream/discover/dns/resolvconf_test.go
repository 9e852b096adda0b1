package dns

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/tests/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

var equal = cmp.Options{
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.AllowUnexported(resolver{}),
}

func servers(addrs ...string) []netip.AddrPort {
	var all []netip.AddrPort
	for _, a := range addrs {
		all = append(all, netip.MustParseAddrPort(a))
	}
	return all
}

func TestParseConf(t *testing.T) {
	base := func(change func(r *resolver)) *resolver {
		r := &resolver{servers: servers("127.0.0.1:53"), ndots: 1, timeout: 5 * time.Second, attempts: 2}
		change(r)
		return r
	}
	for _, tt := range []struct {
		name, text, host string
		want             *resolver
	}{
		{"nothing", "", "box", base(func(*resolver) {})},
		{"a pod of Kubernetes", `search shop.svc.cluster.local svc.cluster.local cluster.local
nameserver 10.96.0.10
options ndots:5
`, "web-0", base(func(r *resolver) {
			r.servers = servers("10.96.0.10:53")
			r.search = []string{"shop.svc.cluster.local", "svc.cluster.local", "cluster.local"}
			r.ndots = 5
		})},
		{"comments", "# nameserver 192.0.2.1\n; nameserver 192.0.2.2\nnameserver 192.0.2.3 # that one\n", "box", base(func(r *resolver) {
			r.servers = servers("192.0.2.3:53")
		})},
		{"three servers at most", "nameserver 192.0.2.1\nnameserver bad\nnameserver fe80::1%eth0\nnameserver ::ffff:192.0.2.3\nnameserver 192.0.2.4\n", "box",
			base(func(r *resolver) { r.servers = servers("192.0.2.1:53", "[fe80::1%eth0]:53", "192.0.2.3:53") })},
		{"options", "options timeout:1 attempts:3 rotate use-vc no-aaaa edns0 trust-ad ndots:x\n", "box", base(func(r *resolver) {
			r.timeout, r.attempts, r.rotate, r.tcp, r.noAAAA = time.Second, 3, true, true, true
		})},
		{"bounds", "options timeout:1000000 attempts:99 ndots:99\n", "box", base(func(r *resolver) {
			r.timeout, r.attempts, r.ndots = 30*time.Second, 5, 15
		})},
		{"bounds below", "options timeout:0 attempts:0 ndots:0\n", "box", base(func(r *resolver) {
			r.timeout, r.attempts, r.ndots = time.Second, 1, 0
		})},
		{"the host's own domain", "", "box.example.com", base(func(r *resolver) { r.search = []string{"example.com"} })},
		{"domain and search: the last holds", "search a b\ndomain c d\n", "box.example", base(func(r *resolver) { r.search = []string{"c"} })},
		{"search nothing", "search .\n", "box.example.com", base(func(*resolver) {})},
		{"no newline, and Windows", "search a.\r\nnameserver 192.0.2.1", "box", base(func(r *resolver) {
			r.servers, r.search = servers("192.0.2.1:53"), []string{"a"}
		})},
	} {
		if diff := cmp.Diff(tt.want, parseConf(tt.text, tt.host), equal); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.name, diff)
		}
	}
}

func TestCandidates(t *testing.T) {
	for _, tt := range []struct {
		name  string
		ndots int
		want  string
	}{
		{"web", 1, "web.a. web.b.c. web."},
		{"web", 0, "web. web.a. web.b.c."},
		{"web.shop", 1, "web.shop. web.shop.a. web.shop.b.c."},
		{"web.shop", 5, "web.shop.a. web.shop.b.c. web.shop."},
		{"web.shop.", 5, "web.shop."},
		{strings.Repeat("x.", 125) + "x", 200, strings.Repeat("x.", 125) + "x.a. " + strings.Repeat("x.", 125) + "x."},
	} {
		r := &resolver{search: []string{"a", "b.c"}, ndots: tt.ndots}
		if got := strings.Join(r.candidates(tt.name), " "); got != tt.want {
			t.Errorf("%s with ndots:%d: %s, want %s", tt.name, tt.ndots, got, tt.want)
		}
	}
}

func TestResolver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	pipe := path + ".pipe"
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (Options{ResolvConf: pipe}).resolver(); err == nil || !strings.Contains(err.Error(), "is a pipe") {
		t.Errorf("of a pipe: %v", err)
	}
	if _, err := (Options{ResolvConf: path}).resolver(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that was named and is missing: %v", err)
	}
	if err := os.WriteFile(path, []byte("nameserver 192.0.2.1\noptions timeout:9 attempts:4\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	o := Options{ResolvConf: path, Timeout: time.Second, Attempts: 1, Servers: servers("192.0.2.9:5353")}
	r, err := o.resolver()
	if err != nil || r.timeout != time.Second || r.attempts != 1 || !cmp.Equal(r.servers, o.Servers, equal) {
		t.Errorf("%+v, %v", r, err)
	}
	// It is read anew each time.
	if err := os.WriteFile(path, []byte("nameserver 192.0.2.2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	r, err = (Options{ResolvConf: path}).resolver()
	if err != nil || !cmp.Equal(r.servers, servers("192.0.2.2:53"), equal) {
		t.Errorf("%+v, %v", r, err)
	}
	// With servers of its own it needs no file.
	if _, err := (Options{ResolvConf: path + "x", Servers: o.Servers}).resolver(); err != nil {
		t.Error(err)
	}
}

func TestValidate(t *testing.T) {
	for _, tt := range []struct {
		options Options
		want    string // of the error, or empty
	}{
		{Options{Name: "web", Port: 80}, ""},
		{Options{Name: "_http._tcp.web.example.", SRV: true}, ""},
		{Options{Name: "web", Port: 80, MinTTL: time.Hour}, ""},
		{Options{Name: "web", Port: 80, MaxTTL: time.Second}, ""},
		{Options{Name: "web"}, "port: want one from 1 to 65535"},
		{Options{Name: "web", SRV: true, Port: 80}, "port 80: SRV records bring their own"},
		{Options{Port: 80}, "name: empty"},
		{Options{Name: ".", Port: 80}, "name: empty"},
		{Options{Name: "a..b", Port: 80}, "want labels of 1 to 63 bytes"},
		{Options{Name: strings.Repeat("x", 64), Port: 80}, "want labels of 1 to 63 bytes"},
		{Options{Name: strings.Repeat("x.", 127), Port: 80}, ""},
		{Options{Name: strings.Repeat("x.", 128), Port: 80}, "want at most 253"},
		{Options{Name: "bücher.example", Port: 80}, "in its xn-- form"},
		{Options{Name: "web.example:80", Port: 80}, "want letters"},
		{Options{Name: "192.0.2.1", Port: 80}, "is an address"},
		{Options{Name: "web", Port: 80, Families: 3}, "families: 3"},
		{Options{Name: "web", Port: 80, MinTTL: time.Minute, MaxTTL: time.Second}, "the least is more than the most"},
		{Options{Name: "web", Port: 80, MinTTL: -1}, "want positive"},
		{Options{Name: "web", Port: 80, MinTTL: time.Millisecond}, "not asked more often"},
		{Options{Name: "web", Port: 80, Attempts: -1}, "want positive"},
		{Options{Name: "web", Port: 80, Servers: servers("192.0.2.1:0")}, "server 192.0.2.1:0: want ADDR:PORT"},
	} {
		err := tt.options.Validate()
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%+v: %v", tt.options, err)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%+v: %v, want %q", tt.options, err, tt.want)
		default:
		}
		if _, nerr := New(tt.options); (nerr == nil) != (err == nil) {
			t.Errorf("%+v: New says %v, Validate %v", tt.options, nerr, err)
		}
	}
}
