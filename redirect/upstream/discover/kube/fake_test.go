package kube

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
	"github.com/pillion-project/pillion/tests/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// kube is an API server, as far as it is needed here: it lists and watches what
// it was given, with versions, selectors and a history that can be cut off.
type kube struct {
	*httptest.Server
	t *testing.T

	mu       sync.Mutex // orders the rest
	changed  chan struct{}
	version  int
	objects  map[string]stored // by path and name
	history  []change
	oldest   int // the first version that can be watched from
	token    string
	requests []*http.Request
	// intercept, if set, may answer a request, and then returns true.
	intercept func(w http.ResponseWriter, r *http.Request) bool
}

type stored struct {
	resource, namespace, name string
	labels                    map[string]string
	body                      map[string]any
}

type change struct {
	version int
	kind    string
	object  stored
	json    []byte
}

func startKube(t *testing.T) *kube {
	t.Helper()
	k := newKube(t)
	k.Server = httptest.NewUnstartedServer(k)
	k.EnableHTTP2 = true
	k.Config.ErrorLog = log.New(io.Discard, "", 0)
	k.StartTLS()
	t.Cleanup(func() {
		k.CloseClientConnections()
		k.Server.Close()
	})
	return k
}

func newKube(t *testing.T) *kube {
	return &kube{t: t, changed: make(chan struct{}), version: 100, objects: make(map[string]stored), token: "secret"}
}

// client returns a client of the server that tries again at once.
func (k *kube) client(t *testing.T, options ...func(*Options)) *Client {
	t.Helper()
	dir := t.TempDir()
	o := Options{
		Server: k.URL, Namespace: "default",
		CAFile:    writeFile(t, dir, "ca.crt", k.ca()),
		TokenFile: writeFile(t, dir, "token", []byte(k.token+"\n")),
	}
	for _, option := range options {
		option(&o)
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	c.gate.first, c.gate.longest = 2*time.Millisecond, 20*time.Millisecond
	t.Cleanup(c.Close)
	return c
}

func (k *kube) ca() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: k.Certificate().Raw})
}

func writeFile(t *testing.T, dir, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// put stores an object: resource is services or endpointslices, text its JSON
// without metadata.
func (k *kube) put(resource, namespace, name, service, text string) {
	k.t.Helper()
	var body map[string]any
	if err := json.Unmarshal([]byte(text), &body); err != nil {
		k.t.Fatalf("%v in %s", err, text)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	id := resource + "/" + namespace + "/" + name
	kind := "ADDED"
	if _, there := k.objects[id]; there {
		kind = "MODIFIED"
	}
	o := stored{resource, namespace, name, map[string]string{"kubernetes.io/service-name": service}, body}
	if labels, ok := body["labels"].(map[string]any); ok {
		for name, value := range labels {
			o.labels[name] = value.(string)
		}
	}
	k.objects[id] = o
	k.record(kind, o)
}

func (k *kube) delete(resource, namespace, name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	id := resource + "/" + namespace + "/" + name
	o, there := k.objects[id]
	if !there {
		k.t.Fatalf("no %s", id)
	}
	delete(k.objects, id)
	k.record("DELETED", o)
}

func (k *kube) record(kind string, o stored) {
	k.version++
	o.body = maps.Clone(o.body)
	o.body["metadata"] = map[string]any{
		"name": o.name, "namespace": o.namespace, "labels": o.labels, "resourceVersion": strconv.Itoa(k.version),
		"managedFields": []any{map[string]any{"manager": "test", "fieldsV1": map[string]any{"f:spec": map[string]any{}}}},
	}
	if kind != "DELETED" {
		k.objects[o.resource+"/"+o.namespace+"/"+o.name] = o
	}
	b, err := json.Marshal(o.body)
	if err != nil {
		k.t.Fatal(err)
	}
	k.history = append(k.history, change{k.version, kind, o, b})
	k.wake()
}

func (k *kube) wake() {
	close(k.changed)
	k.changed = make(chan struct{})
}

// bookmark tells every watch the newest version, of something else.
func (k *kube) bookmark() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.version += 10
	b := fmt.Appendf(nil, `{"kind":"EndpointSlice","metadata":{"resourceVersion":"%d","creationTimestamp":null}}`, k.version)
	k.history = append(k.history, change{k.version, "BOOKMARK", stored{}, b})
	k.wake()
}

// forget makes the server forget its history.
func (k *kube) forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.version += 10
	k.oldest, k.history = k.version, nil
}

func (k *kube) setIntercept(f func(w http.ResponseWriter, r *http.Request) bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.intercept = f
}

// count returns how many requests there were that has is true for.
func (k *kube) count(has func(*http.Request) bool) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := 0
	for _, r := range k.requests {
		if has(r) {
			n++
		}
	}
	return n
}

func isWatch(r *http.Request) bool { return r.URL.Query().Get("watch") == "1" }

func isSlices(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/endpointslices") }

func (k *kube) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	k.mu.Lock()
	k.requests = append(k.requests, r)
	intercept, token := k.intercept, k.token
	k.mu.Unlock()
	if r.Header.Get("Authorization") != "Bearer "+token {
		status(w, http.StatusUnauthorized, "Unauthorized")
		return
	}
	if intercept != nil && intercept(w, r) {
		return
	}
	part := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	resource := part[len(part)-1]
	if !slices.Contains([]string{"services", "endpointslices"}, resource) {
		status(w, http.StatusNotFound, "the server could not find the requested resource")
		return
	}
	var namespace string
	if i := slices.Index(part, "namespaces"); i >= 0 {
		namespace = part[i+1]
	}
	matches := func(o stored) bool {
		return o.resource == resource && (namespace == "" || o.namespace == namespace) && o.selected(r)
	}
	if isWatch(r) {
		k.watch(w, r, matches)
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	list := map[string]any{"kind": "List", "metadata": map[string]any{"resourceVersion": strconv.Itoa(k.version)}}
	items := []any{}
	for _, id := range slices.Sorted(maps.Keys(k.objects)) {
		if matches(k.objects[id]) {
			items = append(items, k.objects[id].body)
		}
	}
	list["items"] = items
	if err := json.NewEncoder(w).Encode(list); err != nil {
		k.t.Log(err)
	}
}

func (o stored) selected(r *http.Request) bool {
	for _, selector := range []string{r.URL.Query().Get("labelSelector"), r.URL.Query().Get("fieldSelector")} {
		name, value, found := strings.Cut(selector, "=")
		var got string
		switch name {
		case "metadata.name":
			got = o.name
		case "spec.clusterIP":
			spec, _ := o.body["spec"].(map[string]any)
			got, _ = spec["clusterIP"].(string)
		default:
			got = o.labels[name]
		}
		if found && got != value {
			return false
		}
	}
	return true
}

func status(w http.ResponseWriter, code int, message string) {
	w.WriteHeader(code)
	fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":%q,"code":%d}`, message, code)
}

func (k *kube) watch(w http.ResponseWriter, r *http.Request, matches func(stored) bool) {
	from, err := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	if err != nil {
		status(w, http.StatusBadRequest, "watch from where?")
		return
	}
	w.WriteHeader(http.StatusOK)
	for {
		k.mu.Lock()
		gone, changed := from < k.oldest, k.changed
		var events []change
		for _, c := range k.history {
			if c.version > from && (c.kind == "BOOKMARK" || matches(c.object)) {
				events = append(events, c)
			}
		}
		k.mu.Unlock()
		if gone {
			fmt.Fprintln(w, `{"type":"ERROR","object":{"kind":"Status","status":"Failure","message":"too old resource version","reason":"Expired","code":410}}`)
			return
		}
		for _, c := range events {
			fmt.Fprintf(w, "{\"type\":%q,\"object\":%s}\n", c.kind, c.json)
			from = c.version
		}
		http.NewResponseController(w).Flush()
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

// endpoint is one of a slice in short: an address, and more in JSON.
func sliceOf(family string, ports string, endpoints ...string) string {
	return fmt.Sprintf(`{"addressType":%q,"ports":[%s],"endpoints":[%s]}`, family, ports, strings.Join(endpoints, ","))
}

func ep(addr string, more ...string) string {
	return fmt.Sprintf(`{"addresses":[%q]%s}`, addr, strings.Join(append([]string{""}, more...), ","))
}

const (
	httpPort  = `{"name":"http","port":8080,"protocol":"TCP"}`
	notReady  = `"conditions":{"ready":false,"serving":false}`
	lingering = `"conditions":{"ready":false,"serving":true,"terminating":true}`
	webSpec   = `{"spec":{"type":"ClusterIP","clusterIP":"10.96.0.10","clusterIPs":["10.96.0.10"],"ports":[{"name":"http","port":80,"protocol":"TCP","targetPort":8080}]}}`
)

// web puts the service web with endpoints at 8080.
func (k *kube) web(addrs ...string) {
	k.t.Helper()
	k.put("services", "default", "web", "", webSpec)
	k.webSlice(addrs...)
}

func (k *kube) webSlice(addrs ...string) {
	k.t.Helper()
	var list []string
	for _, a := range addrs {
		list = append(list, ep(a))
	}
	k.put("endpointslices", "default", "web-1", "web", sliceOf("IPv4", httpPort, list...))
}

// heard is what a source said.
type heard struct {
	t  *testing.T
	mu sync.Mutex
	// all is what it said, in short.
	all   []discover.Snapshot
	errs  int
	empty int
}

// listen runs a source until the test ends.
func listen(t *testing.T, s discover.Source) *heard {
	t.Helper()
	h := &heard{t: t}
	ctx, cancel := context.WithCancel(context.Background())
	out, done := make(chan discover.Snapshot), make(chan error, 1)
	go func() { done <- s.Run(ctx, out) }()
	var collect sync.WaitGroup
	collect.Go(func() { h.collect(ctx, out) })
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		collect.Wait()
	})
	return h
}

func (h *heard) collect(ctx context.Context, out <-chan discover.Snapshot) {
	for {
		select {
		case s := <-out:
			h.mu.Lock()
			h.all = append(h.all, s)
			switch {
			case s.Err != nil:
				h.errs++
			case len(s.Endpoints) == 0:
				h.empty++
			}
			h.mu.Unlock()
		case <-ctx.Done():
			return
		}
	}
}

// waitFor waits until the last snapshot is a good one of these addresses.
func (h *heard) waitFor(addrs ...string) {
	h.t.Helper()
	want := make([]netip.AddrPort, 0, len(addrs))
	for _, a := range addrs {
		if !strings.Contains(a, ":") {
			a += ":8080"
		}
		want = append(want, netip.MustParseAddrPort(a))
	}
	h.wait(fmt.Sprint(want), func(last discover.Snapshot) bool {
		var got []netip.AddrPort
		for _, e := range last.Endpoints {
			got = append(got, e.Addr)
		}
		return last.Err == nil && slices.Equal(got, want)
	})
}

// waitErr waits until the last snapshot is an error that says text.
func (h *heard) waitErr(text string) {
	h.t.Helper()
	h.wait("an error: "+text, func(last discover.Snapshot) bool {
		return last.Err != nil && strings.Contains(last.Err.Error(), text)
	})
}

func (h *heard) wait(what string, ok func(last discover.Snapshot) bool) {
	h.t.Helper()
	var all []discover.Snapshot
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		h.mu.Lock()
		all = slices.Clone(h.all)
		h.mu.Unlock()
		if len(all) > 0 && ok(all[len(all)-1]) {
			return
		}
	}
	h.t.Fatalf("no %s; heard %d, last %v", what, len(all), all[max(0, len(all)-3):])
}

// counts returns how many errors and how many empty sets there were.
func (h *heard) counts() (errs, empty int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.errs, h.empty
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}
