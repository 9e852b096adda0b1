package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
)

// TestEndpoints is about which endpoints there are, given the objects.
func TestEndpoints(t *testing.T) {
	const (
		zoneA  = `"zone":"a","hints":{"forZones":[{"name":"a"}]}`
		zoneB  = `"zone":"b","hints":{"forZones":[{"name":"b"}]}`
		nodeN1 = `"nodeName":"n1","hints":{"forNodes":[{"name":"n1"}],"forZones":[{"name":"a"}]}`
		nodeN2 = `"nodeName":"n2","hints":{"forNodes":[{"name":"n2"}],"forZones":[{"name":"a"}]}`
		local  = `{"spec":{"clusterIP":"10.96.0.10","internalTrafficPolicy":"Local","ports":[{"name":"http","port":80}]}}`
		dual   = `{"spec":{"clusterIP":"10.96.0.10","clusterIPs":["10.96.0.10","fd00::10"],"ports":[{"name":"http","port":80}]}}`
		none   = `{"spec":{"clusterIP":"None","clusterIPs":["None"],"ports":[{"name":"http","port":80}]}}`
		dns    = `{"spec":{"clusterIP":"10.96.0.10","ports":[{"name":"dns","port":53,"protocol":"UDP"},{"name":"dns-tcp","port":53,"protocol":"TCP"}]}}`
	)
	v4 := func(endpoints ...string) string { return sliceOf("IPv4", httpPort, endpoints...) }
	for _, tt := range []struct {
		name       string
		service    string // webSpec if empty, absent if "-"
		slices     []string
		port       string // 80 if empty
		family     Family
		node, zone string
		want       string // addresses, "!" and a part of the error, or nothing
	}{
		{name: "ready", slices: []string{v4(ep("10.0.0.2"), ep("10.0.0.1"), ep("10.0.0.3", notReady))}, want: "10.0.0.1:8080 10.0.0.2:8080"},
		{name: "not said is ready", slices: []string{v4(ep("10.0.0.1", `"conditions":{"ready":null,"serving":null}`))}, want: "10.0.0.1:8080"},
		{name: "terminating is left out", slices: []string{v4(ep("10.0.0.1"), ep("10.0.0.2", lingering))}, want: "10.0.0.1:8080"},
		{name: "unless there is nothing else", slices: []string{v4(ep("10.0.0.1", notReady), ep("10.0.0.2", lingering))}, want: "10.0.0.2:8080"},
		{name: "terminating and published all the same", slices: []string{v4(ep("10.0.0.1", `"conditions":{"ready":true,"serving":false,"terminating":true}`))}, want: "10.0.0.1:8080"},
		{name: "nobody", slices: []string{v4(ep("10.0.0.1", notReady))}, want: ""},
		{name: "no slice", want: ""},
		{name: "two slices", slices: []string{v4(ep("10.0.0.2")), v4(ep("10.0.0.1"))}, want: "10.0.0.1:8080 10.0.0.2:8080"},
		{name: "on its way from one slice to another", slices: []string{v4(ep("10.0.0.1", notReady)), v4(ep("10.0.0.1"))}, want: "10.0.0.1:8080"},
		{name: "one is no address", slices: []string{v4(ep("10.0.0.1"), ep("010.0.0.2"), ep("fd00::1"), `{"addresses":[]}`)}, want: "10.0.0.1:8080"},
		{name: "more addresses of one", slices: []string{v4(`{"addresses":["10.0.0.1","10.0.0.9"]}`)}, want: "10.0.0.1:8080"},

		{name: "port by name", port: "http", slices: []string{v4(ep("10.0.0.1"))}, want: "10.0.0.1:8080"},
		{name: "only port", port: "-", slices: []string{v4(ep("10.0.0.1"))}, want: "10.0.0.1:8080"},
		{name: "no such port", port: "81", slices: []string{v4(ep("10.0.0.1"))}, want: "!no TCP port \"81\"; it has 80 (http)"},
		{name: "no such port name", port: "https", slices: []string{v4(ep("10.0.0.1"))}, want: "!no TCP port \"https\""},
		{name: "a number per slice", slices: []string{v4(ep("10.0.0.1")), sliceOf("IPv4", `{"name":"http","port":9090}`, ep("10.0.0.2"))}, want: "10.0.0.1:8080 10.0.0.2:9090"},
		{name: "a slice without the port", slices: []string{v4(ep("10.0.0.1")), sliceOf("IPv4", `{"name":"admin","port":9090}`, ep("10.0.0.2"))}, want: "10.0.0.1:8080"},
		{name: "a port without a number", slices: []string{sliceOf("IPv4", `{"name":"http"}`, ep("10.0.0.2"))}, want: ""},
		{name: "a port without a name", service: `{"spec":{"clusterIP":"10.96.0.10","ports":[{"port":80}]}}`, slices: []string{sliceOf("IPv4", `{"name":"","port":8080}`, ep("10.0.0.2"))}, want: "10.0.0.2:8080"},
		{name: "TCP and UDP at one number", service: dns, port: "53", slices: []string{sliceOf("IPv4", `{"name":"dns","port":5353,"protocol":"UDP"},{"name":"dns-tcp","port":5354,"protocol":"TCP"}`, ep("10.0.0.2"))}, want: "10.0.0.2:5354"},
		{name: "UDP only", service: dns, port: "dns", want: "!no TCP port"},

		{name: "headless", service: none, slices: []string{v4(ep("10.0.0.1"))}, want: "10.0.0.1:8080"},
		{name: "headless, the endpoints' port", service: none, port: "9000", slices: []string{v4(ep("10.0.0.1"))}, want: "10.0.0.1:9000"},
		{name: "external", service: `{"spec":{"type":"ExternalName","externalName":"example.org","ports":[{"port":80}]}}`, want: "!ExternalName"},
		{name: "slices alone, by name", service: "-", port: "http", slices: []string{v4(ep("10.0.0.1"))}, want: "10.0.0.1:8080"},
		{name: "slices alone, by number", service: "-", slices: []string{v4(ep("10.0.0.1"))}, want: "!not found"},

		{name: "dual stack", service: dual, slices: []string{v4(ep("10.0.0.1")), sliceOf("IPv6", httpPort, ep("fd00::1"))}, want: "10.0.0.1:8080 [fd00::1]:8080"},
		{name: "dual stack, IPv6 alone", service: dual, family: FamilyIPv6, slices: []string{v4(ep("10.0.0.1")), sliceOf("IPv6", httpPort, ep("fd00::1"))}, want: "[fd00::1]:8080"},
		{name: "dual stack, IPv4 alone", service: dual, family: FamilyIPv4, slices: []string{v4(ep("10.0.0.1")), sliceOf("IPv6", httpPort, ep("fd00::1"))}, want: "10.0.0.1:8080"},
		{name: "names for addresses", slices: []string{v4(ep("10.0.0.1")), sliceOf("FQDN", httpPort, ep("example.org"))}, want: "10.0.0.1:8080"},

		{name: "zone", zone: "a", slices: []string{v4(ep("10.0.0.1", zoneA), ep("10.0.0.2", zoneB))}, want: "10.0.0.1:8080=a"},
		{name: "zone unknown", slices: []string{v4(ep("10.0.0.1", zoneA), ep("10.0.0.2", zoneB))}, want: "10.0.0.1:8080=a 10.0.0.2:8080=b"},
		{name: "zone without an endpoint", zone: "c", slices: []string{v4(ep("10.0.0.1", zoneA), ep("10.0.0.2", zoneB))}, want: "10.0.0.1:8080=a 10.0.0.2:8080=b"},
		{name: "one without a hint", zone: "a", slices: []string{v4(ep("10.0.0.1", zoneA), ep("10.0.0.2"))}, want: "10.0.0.1:8080=a 10.0.0.2:8080"},
		{name: "one without a hint that is not ready", zone: "a", slices: []string{v4(ep("10.0.0.1", zoneA), ep("10.0.0.2", zoneB), ep("10.0.0.3", notReady))}, want: "10.0.0.1:8080=a"},
		{name: "the zone's are not ready", zone: "a", slices: []string{v4(ep("10.0.0.1", zoneA, lingering), ep("10.0.0.2", zoneB))}, want: "10.0.0.2:8080=b"},
		{name: "node", node: "n1", zone: "a", slices: []string{v4(ep("10.0.0.1", nodeN1), ep("10.0.0.2", nodeN2))}, want: "10.0.0.1:8080"},
		{name: "node without an endpoint: zone", node: "n3", zone: "a", slices: []string{v4(ep("10.0.0.1", nodeN1), ep("10.0.0.2", nodeN2))}, want: "10.0.0.1:8080 10.0.0.2:8080"},
		{name: "local", service: local, node: "n1", slices: []string{v4(ep("10.0.0.1", `"nodeName":"n1"`), ep("10.0.0.2", `"nodeName":"n2"`))}, want: "10.0.0.1:8080"},
		{name: "local and terminating", service: local, node: "n1", slices: []string{v4(ep("10.0.0.1", `"nodeName":"n1"`, lingering), ep("10.0.0.2", `"nodeName":"n2"`))}, want: "10.0.0.1:8080"},
		{name: "local, nobody there", service: local, node: "n3", slices: []string{v4(ep("10.0.0.1", `"nodeName":"n1"`))}, want: ""},
		{name: "local, node unknown", service: local, slices: []string{v4(ep("10.0.0.1", `"nodeName":"n1"`))}, want: "!name of the node"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := &Client{node: tt.node}
			c.zone.Store(&tt.zone)
			var v view
			object := func(text string) func(any) error {
				text = `{"metadata":{"name":"web","namespace":"default","resourceVersion":"1"},` + text[1:]
				return func(to any) error { return json.Unmarshal([]byte(text), to) }
			}
			if tt.service == "" {
				tt.service = webSpec
			}
			if tt.service != "-" {
				o, err := decodeService(object(tt.service))
				if err != nil {
					t.Fatal(err)
				}
				v.service = o.value
			}
			for _, text := range tt.slices {
				o, err := decodeSlice(object(text), tt.node)
				if err != nil {
					t.Fatal(err)
				}
				v.slices = append(v.slices, o.value)
			}
			ref := Ref{Namespace: "default", Name: "web", Port: tt.port, Family: tt.family}
			switch ref.Port {
			case "":
				ref.Port = "80"
			case "-":
				ref.Port = ""
			}
			got, err := c.endpoints(ref, v)
			if part, bad := strings.CutPrefix(tt.want, "!"); bad {
				if err == nil || !strings.Contains(err.Error(), part) {
					t.Fatalf("got %v, error %v, want one that says %s", got, err, part)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var text []string
			for _, e := range got {
				if e.Weight != 1 {
					t.Errorf("%s has weight %d", e.Addr, e.Weight)
				}
				s := e.Addr.String()
				if e.Zone != "" {
					s += "=" + e.Zone
				}
				text = append(text, s)
			}
			if diff := cmp.Diff(strings.Fields(tt.want), text); diff != "" && tt.want+strings.Join(text, "") != "" {
				t.Errorf("want -, got +:\n%s", diff)
			}
		})
	}
}

// TestFollow: a source follows what becomes of the objects.
func TestFollow(t *testing.T) {
	k := startKube(t)
	k.web("10.0.0.1")
	c := k.client(t)
	h := listen(t, c.Source(Ref{Name: "web", Port: "80"}))
	h.waitFor("10.0.0.1")
	k.webSlice("10.0.0.1", "10.0.0.2")
	h.waitFor("10.0.0.1", "10.0.0.2")
	k.put("endpointslices", "default", "web-2", "web", sliceOf("IPv4", httpPort, ep("10.0.0.3")))
	h.waitFor("10.0.0.1", "10.0.0.2", "10.0.0.3")
	k.delete("endpointslices", "default", "web-1")
	h.waitFor("10.0.0.3")
	if errs, empty := h.counts(); errs+empty > 0 {
		t.Errorf("%d errors, %d empty sets", errs, empty)
	}
	// Nobody is an answer.
	k.put("endpointslices", "default", "web-2", "web", sliceOf("IPv4", httpPort))
	h.waitFor()
	k.put("endpointslices", "default", "web-2", "web", sliceOf("IPv4", httpPort, ep("10.0.0.4")))
	h.waitFor("10.0.0.4")
	k.delete("endpointslices", "default", "web-2")
	h.waitFor()

	// Of those that are hinted to zones, those of the zone, also when that is another.
	hinted := func(addr, zone string) string {
		return ep(addr, fmt.Sprintf(`"zone":%q,"hints":{"forZones":[{"name":%q},{"name":"both"}]}`, zone, zone))
	}
	k.put("endpointslices", "default", "web-2", "web", sliceOf("IPv4", httpPort, hinted("10.0.0.4", "a"), hinted("10.0.0.5", "ab")))
	h.waitFor("10.0.0.4", "10.0.0.5")
	for _, tt := range []struct {
		zone string
		want []string
	}{
		{"a", []string{"10.0.0.4"}}, {"ab", []string{"10.0.0.5"}}, {"both", []string{"10.0.0.4", "10.0.0.5"}},
		{"b", []string{"10.0.0.4", "10.0.0.5"}}, {"a", []string{"10.0.0.4"}},
	} {
		c.SetZone(tt.zone)
		h.waitFor(tt.want...)
	}
	c.SetZone("")
	h.waitFor("10.0.0.4", "10.0.0.5")
	k.put("endpointslices", "default", "web-2", "web", sliceOf("IPv4", httpPort, ep("10.0.0.4")))
	h.waitFor("10.0.0.4")

	// The Service says which of the endpoints' ports it is.
	k.put("endpointslices", "default", "web-2", "web", sliceOf("IPv4", httpPort+`,{"name":"admin","port":9090}`, ep("10.0.0.4")))
	h.waitFor("10.0.0.4")
	k.put("services", "default", "web", "", strings.ReplaceAll(webSpec, "http", "admin"))
	h.waitFor("10.0.0.4:9090")
	k.put("services", "default", "web", "", strings.ReplaceAll(webSpec, `"port":80`, `"port":81`))
	h.waitErr(`no TCP port "80"`)
	k.put("services", "default", "web", "", webSpec)
	h.waitFor("10.0.0.4")
}

// TestDeleted: what is gone has no endpoints as soon as its slices are gone, and
// what comes back is found again.
func TestDeleted(t *testing.T) {
	k := startKube(t)
	c := k.client(t)
	h := listen(t, c.Source(Ref{Name: "web", Port: "80"}))
	h.waitErr("service default/web: not found")
	k.web("10.0.0.1")
	h.waitFor("10.0.0.1")
	k.delete("services", "default", "web")
	k.webSlice("10.0.0.2")
	h.waitFor("10.0.0.2")
	k.delete("endpointslices", "default", "web-1")
	h.waitFor()
	k.web("10.0.0.3")
	h.waitFor("10.0.0.3")
}

// TestGone: a history that the server has forgotten is read again, and the set
// is never empty in between.
func TestGone(t *testing.T) {
	for _, how := range []string{"event", "status"} {
		t.Run(how, func(t *testing.T) {
			k := startKube(t)
			k.web("10.0.0.1")
			h := listen(t, k.client(t).Source(Ref{Name: "web", Port: "80"}))
			h.waitFor("10.0.0.1")
			var refused atomic.Int32
			for i := range 3 {
				k.webSlice(fmt.Sprintf("10.0.1.%d", i))
				k.forget()
				if how == "status" {
					k.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
						if !isWatch(r) || refused.Add(1)%3 == 0 {
							return false
						}
						status(w, http.StatusGone, "too old")
						return true
					})
				}
				k.CloseClientConnections()
				h.waitFor(fmt.Sprintf("10.0.1.%d", i))
			}
			if _, empty := h.counts(); empty > 0 {
				t.Errorf("%d empty sets", empty)
			}
			if how == "event" {
				relist := func(r *http.Request) bool {
					return isSlices(r) && !isWatch(r) && r.URL.Query().Get("resourceVersion") == ""
				}
				// What came over the old watch just in time may have spared some.
				eventually(t, "a list of the newest state", func() bool { return k.count(relist) > 0 })
			}
		})
	}
}

// TestBookmark: a watch goes on from the newest version that the last one told.
func TestBookmark(t *testing.T) {
	k := startKube(t)
	k.web("10.0.0.1")
	h := listen(t, k.client(t).Source(Ref{Name: "web", Port: "80"}))
	h.waitFor("10.0.0.1")
	eventually(t, "two watches", func() bool { return k.count(isWatch) >= 2 })
	isList := func(r *http.Request) bool { return !isWatch(r) }
	eventually(t, "two watches from a bookmark, without a list", func() bool {
		before := k.count(isList)
		k.bookmark()
		k.mu.Lock()
		version := k.version
		k.mu.Unlock()
		resumed := func(r *http.Request) bool {
			return isWatch(r) && r.URL.Query().Get("resourceVersion") == fmt.Sprint(version)
		}
		// It may not have arrived yet when the connection ends: then once more.
		time.Sleep(20 * time.Millisecond)
		watches := k.count(isWatch)
		k.CloseClientConnections()
		eventually(t, "two new watches", func() bool { return k.count(isWatch) >= watches+2 })
		return k.count(resumed) >= 2 && k.count(isList) == before
	})
	k.webSlice("10.0.0.3")
	h.waitFor("10.0.0.3")
	if _, empty := h.counts(); empty > 0 {
		t.Errorf("%d empty sets", empty)
	}
}

// TestEmptyCache: nothing, out of a cache, is asked for again before it is
// believed.
func TestEmptyCache(t *testing.T) {
	k := startKube(t)
	k.web("10.0.0.1")
	k.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if isWatch(r) || r.URL.Query().Get("resourceVersion") != "0" {
			return false
		}
		fmt.Fprint(w, `{"kind":"List","metadata":{"resourceVersion":"7"},"items":[]}`)
		return true
	})
	h := listen(t, k.client(t).Source(Ref{Name: "web", Port: "80"}))
	h.waitFor("10.0.0.1")
	if errs, empty := h.counts(); errs+empty > 0 {
		t.Errorf("%d errors, %d empty sets", errs, empty)
	}
}

// TestShared: sources of one service have the same two watches, which end with
// the last of them.
func TestShared(t *testing.T) {
	k := startKube(t)
	k.web("10.0.0.1")
	k.put("endpointslices", "default", "web-1", "web", sliceOf("IPv4", httpPort+`,{"name":"admin","port":9090}`, ep("10.0.0.1")))
	c := k.client(t)
	t.Run("three", func(t *testing.T) {
		for _, tt := range []struct{ port, want string }{{"80", "10.0.0.1:8080"}, {"http", "10.0.0.1:8080"}, {"", "10.0.0.1:8080"}} {
			listen(t, c.Source(Ref{Name: "web", Port: tt.port})).waitFor(tt.want)
		}
		eventually(t, "two watches", func() bool { return k.count(isWatch) == 2 })
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.watchers) > 0 {
		t.Errorf("%d watchers are left", len(c.watchers))
	}
}

// TestBadRef: what can never work is an error at once, and no request.
func TestBadRef(t *testing.T) {
	k := startKube(t)
	c := k.client(t)
	for _, ref := range []Ref{{}, {Name: "a/b"}, {Name: "-a"}, {Name: "a", Namespace: "B"}, {Name: "a", Port: "0"}, {Name: "a", Port: "65536"}, {Name: "a?watch=1"}} {
		if err := c.Source(ref).Run(t.Context(), make(chan discover.Snapshot)); err == nil {
			t.Errorf("%+v is accepted", ref)
		}
	}
	if n := k.count(func(*http.Request) bool { return true }); n > 0 {
		t.Errorf("%d requests", n)
	}
}

// TestNamespace: what is not said is the service account's, or the kubeconfig's.
func TestNamespace(t *testing.T) {
	k := startKube(t)
	k.put("services", "prod", "web", "", webSpec)
	k.put("endpointslices", "prod", "web-1", "web", sliceOf("IPv4", httpPort, ep("10.0.0.7")))
	c := k.client(t, func(o *Options) { o.Namespace = "prod" })
	listen(t, c.Source(Ref{Name: "web", Port: "80"})).waitFor("10.0.0.7")
}

// TestExempt: every socket is exempt before it connects, or does not connect.
func TestExempt(t *testing.T) {
	k := startKube(t)
	k.web("10.0.0.1")
	var n atomic.Int32
	c := k.client(t, func(o *Options) {
		o.Exempt = func(fd int) error {
			if n.Add(1) == 1 {
				return os.ErrPermission
			}
			return nil
		}
	})
	h := listen(t, c.Source(Ref{Name: "web", Port: "80"}))
	h.waitFor("10.0.0.1")
	h.mu.Lock()
	defer h.mu.Unlock()
	if !slices.ContainsFunc(h.all, func(s discover.Snapshot) bool {
		return s.Err != nil && strings.Contains(s.Err.Error(), "permission denied")
	}) {
		t.Errorf("heard %v: the socket that could not be exempt connected", h.all)
	}
	if n.Load() < 2 {
		t.Errorf("%d sockets", n.Load())
	}
}

// TestUnmapped: a mapped address has one form.
func TestUnmapped(t *testing.T) {
	if got := familyOf(netip.MustParseAddr("::ffff:10.0.0.1").Unmap()); got != FamilyIPv4 {
		t.Errorf("family %d", got)
	}
}

// TestFollowWhileChanging: a source begins while others' watches of its service tell
// of changes.
func TestFollowWhileChanging(t *testing.T) {
	k := startKube(t)
	k.web("10.0.0.1")
	c := k.client(t)
	s := c.Source(Ref{Name: "web", Port: "80"})
	listen(t, s).waitFor("10.0.0.1")
	w := c.acquire(key{"default", "web"})
	defer c.release(w)
	var wakers sync.WaitGroup
	ended, end := context.WithCancel(t.Context())
	defer wakers.Wait()
	defer end()
	for range 4 {
		wakers.Go(func() {
			for ended.Err() == nil {
				w.mu.Lock()
				w.wake(false)
				w.mu.Unlock()
			}
		})
	}
	for range 2000 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		told := 0
		if err := s.(discover.Follower).Follow(ctx, func(discover.Snapshot) { told++; cancel() }); err != nil || told != 1 {
			t.Fatalf("told %d times, %v", told, err)
		}
	}
}
