package kube

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
)

// TestBadLists: an answer that is not a whole list is an error, and never an
// empty set; the good set comes back by itself.
func TestBadLists(t *testing.T) {
	item := `{"metadata":{"name":"web-1","resourceVersion":"5"},"addressType":"IPv4","ports":[` + httpPort + `],"endpoints":[` + ep("10.0.0.9") + `]}`
	for name, body := range map[string]string{
		"nothing":             ``,
		"html":                `<html>502 Bad Gateway</html>`,
		"null":                `null`,
		"an empty object":     `{}`,
		"a status":            `{"kind":"Status","status":"Success"}`,
		"no version":          `{"kind":"List","metadata":{},"items":[]}`,
		"no items":            `{"kind":"List","metadata":{"resourceVersion":"5"}}`,
		"items of a kind":     `{"kind":"List","metadata":{"resourceVersion":"5"},"items":{}}`,
		"cut off":             `{"kind":"List","metadata":{"resourceVersion":"5"},"items":[`,
		"cut off in an item":  `{"kind":"List","metadata":{"resourceVersion":"5"},"items":[` + item[:len(item)/2],
		"cut off after items": `{"kind":"List","metadata":{"resourceVersion":"5"},"items":[]`,
		"no name":             `{"kind":"List","metadata":{"resourceVersion":"5"},"items":[{"metadata":{}}]}`,
		"no address":          `{"kind":"List","metadata":{"resourceVersion":"5"},"items":[` + strings.Replace(item, `"10.0.0.9"`, ``, 1) + `]}`,
		"a bad address":       `{"kind":"List","metadata":{"resourceVersion":"5"},"items":[` + strings.Replace(item, `10.0.0.9`, `10.0.0`, 1) + `]}`,
		"the wrong family":    `{"kind":"List","metadata":{"resourceVersion":"5"},"items":[` + strings.Replace(item, `10.0.0.9`, `fd00::1`, 1) + `]}`,
		"an unknown family":   `{"kind":"List","metadata":{"resourceVersion":"5"},"items":[` + strings.Replace(item, `IPv4`, `IPv5`, 1) + `]}`,
		"a port of a kind":    `{"kind":"List","metadata":{"resourceVersion":"5"},"items":[` + strings.Replace(item, `8080`, `"8080"`, 1) + `]}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := startKube(t)
			k.web("10.0.0.1")
			h := listen(t, k.client(t).Source(Ref{Name: "web", Port: "80"}))
			h.waitFor("10.0.0.1")
			var bad atomic.Int32
			k.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
				if isWatch(r) || !isSlices(r) || bad.Add(1) > 3 {
					return false
				}
				fmt.Fprint(w, body)
				return true
			})
			k.forget()
			k.CloseClientConnections()
			eventually(t, "three errors", func() bool { errs, _ := h.counts(); return errs >= 3 })
			k.webSlice("10.0.0.2")
			h.waitFor("10.0.0.2")
			if _, empty := h.counts(); empty > 0 {
				t.Errorf("%d empty sets", empty)
			}
		})
	}
}

const smallEvent = 64 << 10

// TestBadEvents: the same for what a watch tells.
func TestBadEvents(t *testing.T) {
	for name, event := range map[string]string{
		"not JSON":              `what?`,
		"not an object":         `[]`,
		"no type":               `{}`,
		"an unknown type":       `{"type":"SYNC","object":{}}`,
		"no object":             `{"type":"ADDED"}`,
		"an object of a kind":   `{"type":"ADDED","object":7}`,
		"a slice without name":  `{"type":"DELETED","object":{"metadata":{"resourceVersion":"5"}}}`,
		"a bookmark of nothing": `{"type":"BOOKMARK","object":{"metadata":{}}}`,
		"an error":              `{"type":"ERROR","object":{"kind":"Status","code":500,"message":"etcd is gone"}}`,
		"an error of a kind":    `{"type":"ERROR","object":[]}`,
		"too much":              `{"type":"ADDED","object":"` + strings.Repeat("x", smallEvent) + `"}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := startKube(t)
			k.web("10.0.0.1")
			var bad atomic.Int32
			k.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
				if !isWatch(r) || !isSlices(r) || bad.Add(1) > 2 {
					return false
				}
				fmt.Fprintln(w, event)
				return true
			})
			c := k.client(t)
			c.eventMax = smallEvent
			h := listen(t, c.Source(Ref{Name: "web", Port: "80"}))
			eventually(t, "two errors", func() bool { errs, _ := h.counts(); return errs >= 2 })
			k.webSlice("10.0.0.2")
			h.waitFor("10.0.0.2")
			if _, empty := h.counts(); empty > 0 {
				t.Errorf("%d empty sets", empty)
			}
		})
	}
}

// TestSpread: events arrive in any pieces, without newlines, and with white
// space in any place.
func TestSpread(t *testing.T) {
	k := startKube(t)
	k.web("10.0.0.1")
	event := func(version int, addr string) string {
		return fmt.Sprintf(` { "type":"MODIFIED", "object":{"metadata":{"name":"web-1","resourceVersion":"%d"},"addressType":"IPv4","ports":[%s],"endpoints":[%s]}}`,
			version, httpPort, ep(addr))
	}
	var once atomic.Bool
	k.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !isWatch(r) || !isSlices(r) || once.Swap(true) {
			return false
		}
		text := event(1000, "10.0.0.2") + event(1001, "10.0.0.3") + "\n\n" + event(1002, "10.0.0.4") + " \r\n\t  \n"
		for i := 0; i < len(text); i += 7 {
			fmt.Fprint(w, text[i:min(i+7, len(text))])
			http.NewResponseController(w).Flush()
		}
		<-r.Context().Done()
		return true
	})
	h := listen(t, k.client(t).Source(Ref{Name: "web", Port: "80"}))
	h.waitFor("10.0.0.4")
	if errs, _ := h.counts(); errs > 0 {
		t.Errorf("%d errors", errs)
	}
}

// TestBroken: a stream that breaks off in the middle of an event is taken up
// where it was, without a list and without a word.
func TestBroken(t *testing.T) {
	k := startKube(t)
	k.web("10.0.0.1")
	var broken atomic.Bool
	k.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !isWatch(r) || !isSlices(r) || broken.Swap(true) {
			return false
		}
		fmt.Fprintf(w, `{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"%s"}}}`+"\n"+`{"type":"MODIFIED","object":{"meta`,
			r.URL.Query().Get("resourceVersion")+"0")
		http.NewResponseController(w).Flush()
		time.Sleep(10 * time.Millisecond)
		panic(http.ErrAbortHandler)
	})
	h := listen(t, k.client(t).Source(Ref{Name: "web", Port: "80"}))
	h.waitFor("10.0.0.1")
	resumed := func(r *http.Request) bool {
		return isWatch(r) && isSlices(r) && strings.HasSuffix(r.URL.Query().Get("resourceVersion"), "0")
	}
	eventually(t, "a watch from the bookmark", func() bool { return k.count(resumed) > 0 })
	if errs, empty := h.counts(); errs+empty > 0 {
		t.Errorf("%d errors, %d empty sets", errs, empty)
	}
	if n := k.count(func(r *http.Request) bool { return isSlices(r) && !isWatch(r) }); n != 1 {
		t.Errorf("%d lists", n)
	}
}

// TestOutage: a server that is away makes the set stale and leaves it as it is;
// one that is back makes it good again, also if nothing happened meanwhile.
func TestOutage(t *testing.T) {
	k := startKube(t)
	k.web("10.0.0.1")
	c := k.client(t)
	h := listen(t, c.Source(Ref{Name: "web", Port: "80"}))
	h.waitFor("10.0.0.1")
	for _, change := range []bool{false, true} {
		k.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Retry-After", "x")
			status(w, http.StatusServiceUnavailable, "etcd leader changed")
			return true
		})
		k.CloseClientConnections()
		h.waitErr("etcd leader changed")
		want := "10.0.0.1"
		if change {
			want = "10.0.0.2"
			k.webSlice(want)
		}
		k.setIntercept(nil)
		h.waitFor(want)
	}
	if _, empty := h.counts(); empty > 0 {
		t.Errorf("%d empty sets", empty)
	}
}

// TestRefused: a service account without one of the rights says so, with the
// server's words.
func TestRefused(t *testing.T) {
	for _, resource := range []string{"services", "endpointslices"} {
		k := startKube(t)
		k.web("10.0.0.1")
		k.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.URL.Path, "/"+resource) {
				return false
			}
			status(w, http.StatusForbidden, resource+" is forbidden")
			return true
		})
		c := k.client(t)
		h := listen(t, c.Source(Ref{Name: "web", Port: "80"}))
		h.waitErr("403: " + resource + " is forbidden")
		late := listen(t, c.Source(Ref{Name: "other", Port: "80"})) // in the same namespace
		late.waitErr("403: " + resource + " is forbidden")
		k.setIntercept(nil)
		h.waitFor("10.0.0.1")
		late.waitErr("not found")
	}
}

// TestSlow: a server that does not answer holds up nobody who leaves, and one
// that is slow is waited for.
func TestSlow(t *testing.T) {
	k := startKube(t)
	k.web("10.0.0.1")
	c := k.client(t)
	hang := make(chan struct{})
	k.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if isSlices(r) && !isWatch(r) {
			fmt.Fprint(w, `{"kind":"List",`)
			http.NewResponseController(w).Flush()
			select {
			case <-hang:
			case <-r.Context().Done():
			}
			fmt.Fprint(w, `"metadata":{"resourceVersion":"100"},"items":[]}`)
			return true
		}
		return false
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Source(Ref{Name: "web", Port: "80"}).Run(ctx, make(chan discover.Snapshot)) }()
	eventually(t, "a list that hangs", func() bool { return k.count(isSlices) > 0 })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	h := listen(t, c.Source(Ref{Name: "web", Port: "80"}))
	eventually(t, "another", func() bool { return k.count(isSlices) > 1 })
	k.setIntercept(nil)
	close(hang)
	h.waitFor("10.0.0.1")
}

// TestPauses: they grow with each failure up to a bound, by chance, and are
// short again after a success.
func TestPauses(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // nobody waits
	p := pauser{gate: newGate(time.Second, 8*time.Second)}
	p.gate.up = true
	for _, want := range []time.Duration{2, 4, 8, 8} {
		p.wait(ctx, nil)
		if p.next != want*time.Second {
			t.Errorf("next is %v, want %d s", p.next, want)
		}
	}
	p.worked = true
	p.wait(ctx, nil)
	if p.next != 2*time.Second || p.worked {
		t.Errorf("after a success the next is %v", p.next)
	}
}
