package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/testutil"
)

var errNoSlot = errors.New("no such slot")

// text is a handler that answers with itself.
type text string

func (s text) ServeHTTP(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, string(s)) }

func TestClientAndServer(t *testing.T) {
	testutil.CheckLeaks(t)
	path, _ := start(t, testAPI())
	c, ctx := Dial(path), t.Context()

	s, err := c.Status(ctx)
	if diff := cmp.Diff(status(), s); err != nil || diff != "" {
		t.Errorf("status: %v\n%s", err, diff)
	}
	flows, err := c.Flows(ctx, FlowQuery{Limit: 3})
	if diff := cmp.Diff(records(), flows, cmpopts.EquateComparable(netip.AddrPort{})); err != nil || diff != "" {
		t.Errorf("flows: %v\n%s", err, diff)
	}
	flows, err = c.Flows(ctx, FlowQuery{Path: flow.PathDeny})
	if err != nil || flows == nil || len(flows) != 0 {
		t.Errorf("no flows: %v, %v", flows, err)
	}
	addr, err := c.Resolve(ctx, netip.MustParseAddr("240.0.0.1"))
	if err != nil || addr != netip.MustParseAddr("10.96.0.12") {
		t.Errorf("resolve: %s, %v", addr, err)
	}
	q := ExplainQuery{Destination: "web", Source: netip.MustParseAddr("192.0.2.1")}
	all, err := c.Explain(ctx, q)
	if diff := cmp.Diff([]Explanation{explanation(q)}, all, cmpopts.EquateComparable(netip.AddrPort{}, netip.Addr{})); err != nil || diff != "" {
		t.Errorf("explain: %v\n%s", err, diff)
	}
	if all, err := c.Explain(ctx, ExplainQuery{Destination: "nothing"}); err != nil || all == nil || len(all) != 0 {
		t.Errorf("explain nothing: %v, %v", all, err)
	}
	var e *Error
	if _, err := c.Explain(ctx, ExplainQuery{Destination: "nowhere"}); !errors.As(err, &e) || e.Code != http.StatusNotFound {
		t.Errorf("explain nowhere: %v", err)
	}
	if config, err := c.Config(ctx); err != nil || string(config) != `{"default":"relay"}` {
		t.Errorf("config: %s, %v", config, err)
	}
	r, err := c.Reload(ctx)
	want := reloadResult()
	if diff := cmp.Diff(want, r); err != nil || diff != "" {
		t.Errorf("reload: %v\n%s", err, diff)
	}
	d, err := c.Diff(ctx, "a + b%.yaml", []byte("zone: a\n"))
	wantDiff := DiffResult{Changes: json.RawMessage(`{"name":"a + b%.yaml","text":"zone: a\n"}`), Refused: []Refusal{refusal()}}
	if diff := cmp.Diff(wantDiff, d); err != nil || diff != "" {
		t.Errorf("diff: %v\n%s", err, diff)
	}
	if d, err := c.Diff(ctx, "x", nil); err != nil || d.Changes != nil || d.Refused == nil {
		t.Errorf("diff of what is refused: %+v, %v", d, err)
	}
	if _, err := c.Diff(ctx, "x", make([]byte, maxText+1)); !errors.As(err, &e) || e.Code != http.StatusBadRequest {
		t.Errorf("diff of too much: %v", err)
	}
	body, err := c.Metrics(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if b, err := io.ReadAll(body); err != nil || string(b) != "pillion_up 1\n" {
		t.Errorf("metrics: %q, %v", b, err)
	}
}

// rawRequest sends a request and returns the code and the error in the answer.
func rawRequest(t *testing.T, path, method, target string) (int, string) {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "%s %s HTTP/1.0\r\n\r\n", method, target)
	b, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	var code int
	if _, err := fmt.Sscanf(string(b), "HTTP/1.0 %d", &code); err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	_, body, _ := strings.Cut(string(b), "\r\n\r\n")
	var answer struct {
		Error string `json:"error"`
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		t.Errorf("%s %s: answer is no JSON: %q", method, target, body)
	}
	return code, answer.Error
}

func TestBadRequests(t *testing.T) {
	api := testAPI()
	api.Metrics = nil
	api.Status = func(context.Context) (Status, error) { return Status{}, errors.New("no kernel") }
	api.Reload = func(context.Context) (ReloadResult, error) { return ReloadResult{}, errors.New("no file") }
	path, _ := start(t, api)
	for _, tt := range []struct {
		method, target string
		code           int
		want           string
	}{
		{"GET", "/v1/status", 500, "no kernel"},
		{"GET", "/", 404, "no such path: /"},
		{"GET", "/v1/status/", 404, "no such path"},
		{"GET", "/metrics", 404, "no such path"},
		{"POST", "/v1/flows", 405, "POST: want GET"},
		{"PUT", "/v1/status", 405, "PUT: want GET"},
		{"GET", "/v1/reload", 405, "GET: want POST"},
		{"PUT", "/v1/reload", 405, "PUT: want POST"},
		{"POST", "/v1/reload?now=true", 400, `unknown parameter "now"`},
		{"POST", "/v1/reload", 500, "no file"},
		{"GET", "/v1/diff", 405, "GET: want POST"},
		{"POST", "/v1/diff?file=x", 400, `unknown parameter "file"`},
		{"POST", "/v1/config", 405, "POST: want GET"},
		{"POST", "/v1/explain?dst=web", 405, "POST: want GET"},
		{"GET", "/v1/explain", 400, "dst: want an address"},
		{"GET", "/v1/explain?dst=nowhere", 404, "no such host"},
		{"GET", "/v1/explain?dst=web&source=here", 400, `source "here"`},
		{"GET", "/v1/explain?dst=web&source=192.0.2.1:80", 400, "want an address"},
		{"GET", "/v1/status?live=true", 400, `unknown parameter "live"`},
		{"GET", "/v1/flows?Live=true", 400, `unknown parameter "Live"`},
		{"GET", "/v1/flows?limit=1&limit=2", 400, "twice"},
		{"GET", "/v1/flows?live=perhaps", 400, `live "perhaps"`},
		{"GET", "/v1/flows?limit=-1", 400, `limit "-1"`},
		{"GET", "/v1/flows?limit=many", 400, `limit "many"`},
		{"GET", "/v1/flows?path=scenic", 400, `path "scenic"`},
		{"GET", "/v1/flows?path=none", 400, `path "none"`},
		{"GET", "/v1/flows?end=happy", 400, `end "happy"`},
		{"GET", "/v1/flows?limit=%zz", 400, "parse parameters"},
		{"GET", "/v1/resolve", 400, `slot ""`},
		{"GET", "/v1/resolve?slot=240.0.0.1:80", 400, "want an address"},
		{"GET", "/v1/resolve?slot=240.0.0.2", 404, "no such slot"},
	} {
		code, got := rawRequest(t, path, tt.method, tt.target)
		if code != tt.code || !strings.Contains(got, tt.want) {
			t.Errorf("%s %s: %d %q, want %d %q", tt.method, tt.target, code, got, tt.code, tt.want)
		}
	}
}

func TestClientErrors(t *testing.T) {
	path, stop := start(t, API{Flows: func(context.Context, FlowQuery) ([]flow.Record, error) {
		return nil, fmt.Errorf("list: %w", &Error{Code: http.StatusServiceUnavailable, Message: "draining"})
	}})
	c := Dial(path)
	_, err := c.Flows(t.Context(), FlowQuery{})
	var e *Error
	if !errors.As(err, &e) || e.Code != http.StatusServiceUnavailable || e.Message != "list: draining" {
		t.Errorf("%v", err)
	}
	if _, err := c.Status(t.Context()); !errors.As(err, &e) || e.Code != http.StatusNotFound {
		t.Errorf("no status: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Status(ctx); !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "http://") {
		t.Errorf("cancelled: %v", err)
	}

	stop()
	if _, err := c.Status(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("stopped: %v", err)
	}
	stale := filepath.Join(t.TempDir(), "admin.sock")
	leave(t, stale)
	if _, err := Dial(stale).Status(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("stale: %v", err)
	}
}

// An answer of something that is no instance does not break the client.
func TestClientMeetsNonsense(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "s")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("/v1/status", text("hello"))
	s := &http.Server{Handler: mux, ReadHeaderTimeout: time.Second}
	defer s.Close()
	go s.Serve(ln)
	if _, err := Dial(path).Status(t.Context()); err == nil || !strings.Contains(err.Error(), "read answer") {
		t.Errorf("status: %v", err)
	}
	var e *Error
	if _, err := Dial(path).Flows(t.Context(), FlowQuery{}); !errors.As(err, &e) || e.Message != "404 Not Found" {
		t.Errorf("flows: %v", err)
	}
}

func TestManyClients(t *testing.T) {
	testutil.CheckLeaks(t)
	path, stop := start(t, testAPI())
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			c := Dial(path)
			if _, err := c.Status(t.Context()); err != nil {
				t.Error(err)
			}
			if flows, err := c.Flows(t.Context(), FlowQuery{}); err != nil || len(flows) != 3 {
				t.Errorf("%d flows, %v", len(flows), err)
			}
		})
	}
	all.Wait()
	stop()
}

// Clients that ask nothing, half of something, or read nothing hold up neither
// the others nor, for longer than the grace, the end.
func TestSlowClients(t *testing.T) {
	testutil.CheckLeaks(t)
	api := testAPI()
	api.Flows = func(context.Context, FlowQuery) ([]flow.Record, error) { return make([]flow.Record, 20000), nil }
	// Only the grace can end a write.
	path, stop := startWith(t, api, 0)
	var conns []net.Conn
	for _, say := range []string{"", "GET /v1/st", "GET /v1/flows HTTP/1.1\r\nHost: x\r\n\r\n"} {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
		if _, err := io.WriteString(conn, say); err != nil {
			t.Fatal(err)
		}
	}
	// The answer is on its way. It does not fit the socket.
	if _, err := io.ReadFull(conns[2], make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if _, err := Dial(path).Status(t.Context()); err != nil {
			t.Error(err)
		}
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		stop()
	}()
	select {
	case <-ended:
	case <-time.After(2 * time.Minute):
		t.Error("the end waits for who does not read")
	}
	for _, conn := range conns {
		conn.Close()
	}
	<-ended
}

// A request that is being answered when the end comes is answered.
func TestGracefulEnd(t *testing.T) {
	asked, ending := make(chan struct{}), make(chan struct{})
	api := API{Status: func(ctx context.Context) (Status, error) {
		close(asked)
		<-ending
		return status(), ctx.Err()
	}}
	path, stop := start(t, api)
	answered := make(chan error, 1)
	go func() {
		_, err := Dial(path).Status(context.Background())
		answered <- err
	}()
	<-asked
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		stop()
	}()
	testutil.Eventually(t, 10*time.Second, func() bool {
		_, err := Dial(path).Status(t.Context())
		return errors.Is(err, ErrNotRunning)
	})
	close(ending)
	if err := <-answered; err != nil {
		t.Error(err)
	}
	<-stopped
}

func TestServeReportsListener(t *testing.T) {
	ln, err := Listen(filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if err := Serve(t.Context(), ln, API{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("error %v", err)
	}
}

// Lists of nothing are lists.
func TestNoNull(t *testing.T) {
	t.Parallel()
	routes := newRoutes(API{
		Status:  func(context.Context) (Status, error) { return Status{}, nil },
		Flows:   func(context.Context, FlowQuery) ([]flow.Record, error) { return nil, nil },
		Explain: func(context.Context, ExplainQuery) ([]Explanation, error) { return nil, nil },
		Reload:  func(context.Context) (ReloadResult, error) { return ReloadResult{}, nil },
	})
	for _, tt := range []struct{ method, target, want string }{
		{"GET", "/v1/status", `"refused":[]`},
		{"GET", "/v1/flows", "[]"},
		{"GET", "/v1/explain?dst=x", "[]"},
		{"POST", "/v1/reload", `"refused":[]`},
	} {
		w := httptest.NewRecorder()
		routes.ServeHTTP(w, httptest.NewRequest(tt.method, tt.target, nil))
		if !strings.Contains(w.Body.String(), tt.want) {
			t.Errorf("%s: %s, want %s", tt.target, w.Body, tt.want)
		}
	}
}

// A method that a route does not have is told with those that it has.
func TestAllow(t *testing.T) {
	t.Parallel()
	routes := newRoutes(testAPI())
	for _, tt := range []struct{ method, path, want string }{
		{"POST", "/v1/status", "GET, HEAD"},
		{"GET", "/v1/reload", "POST"},
		{"HEAD", "/v1/reload", "POST"},
		{"HEAD", "/v1/status", ""},
		{"POST", "/v1/reload", ""},
	} {
		w := httptest.NewRecorder()
		routes.ServeHTTP(w, httptest.NewRequest(tt.method, tt.path, nil))
		if got := w.Header().Get("Allow"); got != tt.want || (w.Code == http.StatusMethodNotAllowed) != (tt.want != "") {
			t.Errorf("%s %s: %d, allow %q, want %q", tt.method, tt.path, w.Code, got, tt.want)
		}
	}
}

// The configuration holds for the life of the process; a reload that takes long is
// waited for.
func TestReloadIsNotCutShort(t *testing.T) {
	asked := make(chan struct{})
	api := API{Reload: func(ctx context.Context) (ReloadResult, error) {
		close(asked)
		select {
		case <-ctx.Done():
			return ReloadResult{}, ctx.Err()
		case <-time.After(50 * time.Millisecond):
			return ReloadResult{Generation: 2}, nil
		}
	}}
	path, stop := start(t, api)
	answered := make(chan error, 1)
	go func() {
		_, err := Dial(path).Reload(context.Background())
		answered <- err
	}()
	<-asked
	stop()
	if err := <-answered; err != nil {
		t.Error(err)
	}
}
