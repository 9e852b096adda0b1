package kubernetes

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
	"github.com/pillion-project/pillion/redirect/upstream/discover/kube"
	"github.com/pillion-project/pillion/tests/testutil"
)

const httpPort = `{"name":"http","port":8080,"protocol":"TCP"}`

// follower collects what a source says.
type follower struct {
	c     *cluster
	mu    sync.Mutex
	last  *discover.Snapshot
	empty int // good sets without endpoints
}

// follow runs a source until the test ends.
func (c *cluster) follow(t *testing.T, s discover.Source) *follower {
	t.Helper()
	f := &follower{c: c}
	ctx, cancel := context.WithCancel(context.Background())
	out, done := make(chan discover.Snapshot), make(chan error, 1)
	go func() { done <- s.Run(ctx, out) }()
	var collect sync.WaitGroup
	collect.Go(func() { f.collect(ctx, out) })
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		collect.Wait()
	})
	return f
}

func (f *follower) collect(ctx context.Context, out <-chan discover.Snapshot) {
	for {
		select {
		case s := <-out:
			f.mu.Lock()
			f.last = &s
			if s.Err == nil && len(s.Endpoints) == 0 {
				f.empty++
			}
			f.mu.Unlock()
		case <-ctx.Done():
			return
		}
	}
}

// String is the last snapshot in short.
func (f *follower) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.last == nil:
		return "silent"
	case f.last.Err != nil:
		return "error: " + f.last.Err.Error()
	}
	var addrs []string
	for _, e := range f.last.Endpoints {
		a := e.Addr.String()
		if e.Zone != "" {
			a += "=" + e.Zone
		}
		addrs = append(addrs, a)
	}
	return strings.Join(addrs, " ")
}

// waitFor waits until the last snapshot begins like want, which is all of a good
// one.
func (f *follower) waitFor(t *testing.T, want string) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		got := f.String()
		if got == want || strings.HasPrefix(want, "error") && strings.Contains(got, strings.TrimPrefix(want, "error: ")) && strings.HasPrefix(got, "error") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("got %q, want %q", got, want)
		}
	}
}

// client is one with the service account of the documentation.
func (c *cluster) client(t *testing.T, options ...func(*kube.Options)) *kube.Client {
	t.Helper()
	o := kube.Options{Server: c.url, CAFile: c.path("ca.crt"), TokenFile: c.path("token")}
	for _, option := range options {
		option(&o)
	}
	client, err := kube.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

// TestKubernetes is about what only a real API server can show: that the
// selectors, versions, bookmarks and rights are what it takes them for.
func TestKubernetes(t *testing.T) {
	c := startCluster(t)
	c.admit()
	for _, tt := range []struct {
		name string
		test func(*testing.T, *cluster)
	}{
		{"Follow", testFollow},
		{"Rules", testRules},
		{"Demand", testDemand},
		{"Namespaced", testNamespaced},
		{"Token", testToken},
		{"Certificate", testCertificate},
		{"Gone", testGone},
		{"Memory", testMemory},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c.t = t
			start := time.Now()
			tt.test(t, c)
			t.Logf("took %v", time.Since(start).Round(time.Millisecond))
		})
		c.t = t
	}
}

// admit gives the service account the rights of the documentation, and a token.
func (c *cluster) admit() {
	c.t.Helper()
	doc, err := os.ReadFile("../../docs/discovery-kubernetes.md")
	if err != nil {
		c.t.Fatal(err)
	}
	_, manifest, _ := strings.Cut(string(doc), "```yaml\napiVersion: v1\n")
	manifest, _, _ = strings.Cut(manifest, "```")
	c.apply("apiVersion: v1\n" + strings.TrimSpace(manifest))
	c.newToken()
}

// testFollow: a dual-stack service, from before it is there until it is gone.
func testFollow(t *testing.T, c *cluster) {
	client := c.client(t)
	f := c.follow(t, client.Source(kube.Ref{Name: "web", Port: "80"}))
	v6 := c.follow(t, client.Source(kube.Ref{Name: "web", Port: "http", Family: kube.FamilyIPv6}))
	f.waitFor(t, "error: not found")
	addrs := c.service("web", `{"ipFamilyPolicy":"RequireDualStack","ports":[{"name":"http","port":80,"targetPort":8080},{"name":"admin","port":81}]}`)
	if len(addrs) != 2 {
		t.Fatalf("ClusterIPs are %v", addrs)
	}
	f.waitFor(t, "")
	c.slice("web-4", "web", "IPv4", httpPort, ep("10.0.0.1"), ep("10.0.0.2", `"zone":"a"`))
	f.waitFor(t, "10.0.0.1:8080 10.0.0.2:8080=a")
	v6.waitFor(t, "")
	c.slice("web-6", "web", "IPv6", httpPort+`,{"name":"admin","port":9090}`, ep("fd00::1"))
	f.waitFor(t, "10.0.0.1:8080 10.0.0.2:8080=a [fd00::1]:8080")
	v6.waitFor(t, "[fd00::1]:8080")
	c.follow(t, client.Source(kube.Ref{Name: "web", Port: "81"})).waitFor(t, "[fd00::1]:9090")
	for i := range 20 { // each is an event
		c.slice("web-4", "web", "IPv4", httpPort, ep(fmt.Sprintf("10.0.1.%d", i)))
		f.waitFor(t, fmt.Sprintf("10.0.1.%d:8080 [fd00::1]:8080", i))
	}
	c.must(http.MethodDelete, slicesPath+"/web-6", "")
	f.waitFor(t, "10.0.1.19:8080")
	c.must(http.MethodPatch, servicesPath+"/web", `{"spec":{"ports":[{"name":"http","port":8000}]}}`)
	f.waitFor(t, `error: no TCP port "80"; it has 8000 (http)`)
	c.must(http.MethodPatch, servicesPath+"/web", `{"spec":{"ports":[{"name":"http","port":80}]}}`)
	f.waitFor(t, "10.0.1.19:8080")
	c.must(http.MethodDelete, servicesPath+"/web", "")
	c.must(http.MethodDelete, slicesPath+"/web-4", "")
	f.waitFor(t, "")

	c.service("headless", `{"clusterIP":"None","ports":[{"name":"sql","port":5432}]}`)
	c.slice("headless-1", "headless", "IPv4", `{"name":"sql","port":5432}`, ep("10.0.0.7"))
	c.follow(t, client.Source(kube.Ref{Name: "headless", Port: "5432"})).waitFor(t, "10.0.0.7:5432")
	c.service("external", `{"type":"ExternalName","externalName":"example.org","ports":[{"port":80}]}`)
	c.follow(t, client.Source(kube.Ref{Name: "external", Port: "80"})).waitFor(t, "error: ExternalName")
	// What the API server says of itself.
	c.follow(t, client.Source(kube.Ref{Name: "kubernetes", Port: "https"})).waitFor(t, "192.0.2.1:"+c.port)
}

// testRules: conditions and hints, as the API server stores them.
func testRules(t *testing.T, c *cluster) {
	here := c.client(t, func(o *kube.Options) { o.Zone, o.Node = "a", "n1" })
	c.service("rules", `{"ports":[{"name":"http","port":80}]}`)
	f := c.follow(t, here.Source(kube.Ref{Name: "rules", Port: "80"}))
	set := func(want string, endpoints ...string) {
		t.Helper()
		c.slice("rules-1", "rules", "IPv4", httpPort, endpoints...)
		f.waitFor(t, want)
	}
	conditions := func(ready, serving, terminating bool) string {
		return fmt.Sprintf(`"conditions":{"ready":%v,"serving":%v,"terminating":%v}`, ready, serving, terminating)
	}
	zone := func(z string) string { return fmt.Sprintf(`"zone":%q,"hints":{"forZones":[{"name":%q}]}`, z, z) }
	set("10.0.0.1:8080", ep("10.0.0.1", conditions(true, true, false)), ep("10.0.0.2", conditions(false, true, true)), ep("10.0.0.3", conditions(false, false, false)))
	set("10.0.0.2:8080", ep("10.0.0.1", conditions(false, false, true)), ep("10.0.0.2", conditions(false, true, true)))
	set("", ep("10.0.0.1", conditions(false, false, true)))
	set("10.0.0.1:8080=a", ep("10.0.0.1", zone("a")), ep("10.0.0.2", zone("b")))
	set("10.0.0.2:8080=b 10.0.0.3:8080=c", ep("10.0.0.2", zone("b")), ep("10.0.0.3", zone("c")))
	set("10.0.0.1:8080=a 10.0.0.2:8080=b", ep("10.0.0.1", zone("a")), ep("10.0.0.2", `"zone":"b"`))
	nodes := func(n string) string {
		return fmt.Sprintf(`"nodeName":%q,"hints":{"forNodes":[{"name":%q}]}`, n, n)
	}
	set("10.0.0.1:8080", ep("10.0.0.1", nodes("n1")), ep("10.0.0.2", nodes("n2")))
	c.must(http.MethodPatch, servicesPath+"/rules", `{"spec":{"internalTrafficPolicy":"Local"}}`)
	set("10.0.0.4:8080", ep("10.0.0.4", `"nodeName":"n1"`), ep("10.0.0.5", `"nodeName":"n2"`))
}

// demanded collects what a Demand says.
type demanded struct {
	*kube.Demand
	mu   sync.Mutex
	last []kube.Service
}

func (c *cluster) demand(t *testing.T, client *kube.Client, o kube.DemandOptions) *demanded {
	t.Helper()
	d := &demanded{Demand: client.Demand(o)}
	ctx, cancel := context.WithCancel(context.Background())
	out, done := make(chan []kube.Service), make(chan error, 1)
	go func() { done <- d.Run(ctx, out) }()
	var collect sync.WaitGroup
	collect.Go(func() {
		for {
			select {
			case list := <-out:
				d.mu.Lock()
				d.last = list
				d.mu.Unlock()
			case <-ctx.Done():
				return
			}
		}
	})
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		collect.Wait()
	})
	return d
}

func (d *demanded) list() []kube.Service {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.last)
}

func (d *demanded) has(addr netip.AddrPort) bool {
	return slices.ContainsFunc(d.list(), func(s kube.Service) bool { return s.Addr == addr })
}

// testDemand: services are found by the addresses that the API server gave them,
// the second ones too, and by name.
func testDemand(t *testing.T, c *cluster) {
	addrs := c.service("asked", `{"ipFamilyPolicy":"RequireDualStack","ports":[{"name":"http","port":80,"targetPort":8080}]}`)
	c.slice("asked-4", "asked", "IPv4", httpPort, ep("10.0.0.1"))
	c.slice("asked-6", "asked", "IPv6", httpPort, ep("fd00::1"))
	first, second := netip.AddrPortFrom(netip.MustParseAddr(addrs[0]), 80), netip.AddrPortFrom(netip.MustParseAddr(addrs[1]), 80)
	d := c.demand(t, c.client(t), kube.DemandOptions{Failed: time.Millisecond})
	// The second one first: it is found without the first one's help.
	for _, a := range []netip.AddrPort{second, first} {
		c.eventually(a.String(), func() bool { d.Asked(a); return d.has(a) })
	}
	for _, s := range d.list() {
		want := map[netip.AddrPort]string{first: "10.0.0.1:8080", second: "[fd00::1]:8080"}[s.Addr]
		c.follow(t, s.Source).waitFor(t, want)
		name := map[netip.AddrPort]string{first: "default/asked:80", second: "default/asked:80/ipv6"}[s.Addr]
		if s.Name != name || s.Host != "asked.default.svc.cluster.local" {
			t.Errorf("got %+v", s)
		}
	}
	before := d.Stats()
	// The API server says where services are; nothing else is looked up.
	d.Asked(netip.MustParseAddrPort("192.0.2.1:443"))
	d.Asked(netip.MustParseAddrPort("10.96.0.254:80")) // nobody's
	c.eventually("one that is none", func() bool { return d.Stats().NotFound == before.NotFound+1 })
	if got := d.Stats().Lookups; got != before.Lookups+1 {
		t.Errorf("%d look-ups, want %d", got, before.Lookups+1)
	}
	d.AskedName("kubernetes.default.svc.cluster.local")
	c.eventually("by name", func() bool { return d.has(netip.MustParseAddrPort("10.96.0.1:443")) })
	c.must(http.MethodDelete, servicesPath+"/asked", "")
	c.eventually("what is deleted leaves", func() bool { return !d.has(first) && !d.has(second) })
}

// testNamespaced: with rights in one namespace, named services work, and what is
// not allowed says so.
func testNamespaced(t *testing.T, c *cluster) {
	c.must(http.MethodDelete, "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/pillion", "")
	client := c.client(t)
	var f *follower
	c.eventually("without rights", func() bool {
		// The API server knows rights a moment after they are given or taken.
		f = c.follow(t, client.Source(kube.Ref{Name: "headless", Port: "5432"}))
		c.eventually("an answer", func() bool { return f.String() != "silent" })
		return strings.Contains(f.String(), "403")
	})
	c.must(http.MethodPost, "/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings",
		`{"apiVersion":"rbac.authorization.k8s.io/v1","kind":"RoleBinding","metadata":{"name":"pillion"},
		"roleRef":{"apiGroup":"rbac.authorization.k8s.io","kind":"ClusterRole","name":"pillion"},
		"subjects":[{"kind":"ServiceAccount","name":"app","namespace":"default"}]}`)
	f.waitFor(t, "10.0.0.7:5432")
	d := c.demand(t, client, kube.DemandOptions{})
	d.AskedName("headless.default.svc")
	c.eventually("by name", func() bool { return len(d.list()) == 1 })
	d.Asked(netip.MustParseAddrPort("10.96.0.1:443"))
	c.eventually("not by address", func() bool { return d.Stats().Failed == 1 })
	c.must(http.MethodPost, "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
		`{"apiVersion":"rbac.authorization.k8s.io/v1","kind":"ClusterRoleBinding","metadata":{"name":"pillion"},
		"roleRef":{"apiGroup":"rbac.authorization.k8s.io","kind":"ClusterRole","name":"pillion"},
		"subjects":[{"kind":"ServiceAccount","name":"app","namespace":"default"}]}`)
}

// testToken: a service account that is made anew has a new token, and the old
// one is refused.
func testToken(t *testing.T, c *cluster) {
	client := c.client(t)
	f := c.follow(t, client.Source(kube.Ref{Name: "headless", Port: "5432"}))
	f.waitFor(t, "10.0.0.7:5432")
	c.must(http.MethodDelete, "/api/v1/namespaces/default/serviceaccounts/app", "")
	c.must(http.MethodPost, "/api/v1/namespaces/default/serviceaccounts", `{"apiVersion":"v1","kind":"ServiceAccount","metadata":{"name":"app"}}`)
	c.restartServer(nil)
	f.waitFor(t, "error: 401")
	c.newToken()
	f.waitFor(t, "10.0.0.7:5432")
	if f.empty > 0 {
		t.Errorf("%d empty sets", f.empty)
	}
}

// restartServer kills the API server, and starts it again after meanwhile.
func (c *cluster) restartServer(meanwhile func()) {
	c.t.Helper()
	c.server.kill()
	if meanwhile != nil {
		meanwhile()
	}
	c.startServer()
}

// testCertificate: the API server's certificate comes from another CA, and then
// the CA's file is replaced.
func testCertificate(t *testing.T, c *cluster) {
	f := c.follow(t, c.client(t).Source(kube.Ref{Name: "headless", Port: "5432"}))
	f.waitFor(t, "10.0.0.7:5432")
	c.restartServer(func() {
		f.waitFor(t, "error: connection refused")
		c.writeCertificate("second")
	})
	f.waitFor(t, "error: unknown authority")
	b, err := os.ReadFile(c.path("next-ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	c.write("ca.crt", b)
	f.waitFor(t, "10.0.0.7:5432")
	if f.empty > 0 {
		t.Errorf("%d empty sets", f.empty)
	}
}

// testGone: who was away for longer than the API server remembers reads all of
// it again, and nobody is without endpoints meanwhile.
func testGone(t *testing.T, c *cluster) {
	var away atomic.Bool
	client := c.client(t, func(o *kube.Options) {
		o.Exempt = func(int) error {
			if away.Load() {
				return errors.New("away")
			}
			return nil
		}
	})
	c.service("gone", `{"ports":[{"name":"http","port":80}]}`)
	c.slice("gone-1", "gone", "IPv4", httpPort, ep("10.0.0.1"))
	f := c.follow(t, client.Source(kube.Ref{Name: "gone", Port: "80"}))
	f.waitFor(t, "10.0.0.1:8080")
	f.mu.Lock()
	f.empty = 0
	f.mu.Unlock()
	away.Store(true)
	c.restartServer(nil)
	f.waitFor(t, "error: away")
	c.slice("gone-1", "gone", "IPv4", httpPort, ep("10.0.0.2"))
	c.slice("gone-2", "gone", "IPv4", httpPort, ep("10.0.0.3"))
	// A server that starts knows nothing of what was before.
	c.restartServer(nil)
	away.Store(false)
	f.waitFor(t, "10.0.0.2:8080 10.0.0.3:8080")
	if f.empty > 0 {
		t.Errorf("%d empty sets", f.empty)
	}
}

// testMemory: 200 services of 50 endpoints each, found one by one, are within 30
// MB of resident memory and 2 KB for each endpoint.
func testMemory(t *testing.T, c *cluster) {
	const services, endpoints = 200, 50
	bin := filepath.Join(t.TempDir(), "resident")
	if out, err := exec.Command("go", "build", "-o", bin, "./resident").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var asked []string
	for i := range services {
		name := fmt.Sprintf("many-%d", i)
		asked = append(asked, c.service(name, `{"ports":[{"name":"http","port":80,"targetPort":8080}]}`)[0]+":80")
		list := make([]string, endpoints)
		for j := range list {
			list[j] = ep(fmt.Sprintf("10.1.%d.%d", i, j+1), fmt.Sprintf(`"conditions":{"ready":true,"serving":true,"terminating":false},"nodeName":"node-%d","zone":"zone-%d","targetRef":{"kind":"Pod","namespace":"default","name":"many-%d-%d","uid":"01234567-89ab-cdef-0123-456789abcdef"}`, j%10, j%3, i, j))
		}
		c.slice(name+"-1", name, "IPv4", httpPort, list...)
	}
	cmd := exec.Command(bin, "-server="+c.url, "-ca="+c.path("ca.crt"), "-token="+c.path("token"))
	cmd.Stderr = os.Stderr
	stdin, stdout := testutil.Pipes(t, cmd)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait() //nolint:errcheck // it is told to end below
	defer stdin.Close()
	lines := bufio.NewScanner(stdout)
	told := func() (n, m, kib int) {
		t.Helper()
		if !lines.Scan() {
			t.Fatalf("it ended: %v", lines.Err())
		}
		if _, err := fmt.Sscan(lines.Text(), &n, &m, &kib); err != nil {
			t.Fatalf("%q: %v", lines.Text(), err)
		}
		return n, m, kib
	}
	_, _, before := told()
	if _, err := io.WriteString(stdin, strings.Join(asked, "\n")+"\n"); err != nil {
		t.Fatal(err)
	}
	var n, m, most int
	for deadline := time.Now().Add(limit); m < services*endpoints; {
		var kib int
		n, m, kib = told()
		most = max(most, kib)
		if time.Now().After(deadline) {
			t.Fatalf("%d services, %d endpoints", n, m)
		}
	}
	for range 10 { // what it takes in the long run, and while things change
		c.slice("many-7-1", "many-7", "IPv4", httpPort, ep("10.1.7."+strconv.Itoa(100+m%100)))
		_, m, after := told()
		most = max(most, after)
		_ = m
	}
	t.Logf("%d services, %d endpoints: %d KiB resident at most, %d KiB before, %d bytes for each endpoint",
		n, services*endpoints, most, before, (most-before)<<10/(services*endpoints))
	if most > 30_000_000>>10 {
		t.Errorf("%d KiB resident, want no more than 30 MB", most)
	}
	if each := (most - before) << 10 / (services * endpoints); each > 2000 {
		t.Errorf("%d bytes for each endpoint, want no more than 2,000", each)
	}
}
