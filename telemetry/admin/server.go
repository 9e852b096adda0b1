package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
)

const (
	headerTimeout = 5 * time.Second
	readTimeout   = 10 * time.Second
	writeTimeout  = 30 * time.Second
	idleTimeout   = time.Minute
	maxHeader     = 16 << 10
	// maxText is how much of a configuration is read: more than one may have.
	maxText = 16 << 20
	// grace is how long requests may take once the server ends.
	grace = 3 * time.Second
)

// API is what the server answers from. Its functions are called by many
// goroutines at once. One that is nil has no route.
type API struct {
	Status func(ctx context.Context) (Status, error)
	// Flows returns the records of the kind that Live says. The server filters
	// them, so it may ignore the rest of the query; they are the server's.
	Flows   func(ctx context.Context, q FlowQuery) ([]flow.Record, error)
	Metrics http.Handler
	// Resolve returns the original address of a slot. An error means that the
	// slot has none.
	Resolve func(slot netip.Addr) (netip.Addr, error)
	// Explain tells what happens to connections to a destination, one answer
	// per address that it stands for. An [*Error] of code 404 means that it
	// stands for none.
	Explain func(ctx context.Context, q ExplainQuery) ([]Explanation, error)
	// Config returns the configuration that holds, as JSON.
	Config func(ctx context.Context) (json.RawMessage, error)
	// Ready and Live return what is missing for the instance to be ready, and
	// alive. Both are asked often.
	Ready, Live func() error
	// Reload reads the configuration again. What is wrong with it is in the
	// result; an error means that it could not be tried.
	Reload func(ctx context.Context) (ReloadResult, error)
	// Diff tells what Reload would do if text were in its file. Refusals call that
	// file by the name given.
	Diff func(ctx context.Context, name string, text []byte) (DiffResult, error)
}

// Serve answers on ln until ctx is done, then lets the requests in flight end
// for 3 s. It closes ln and waits for every goroutine that it starts.
func Serve(ctx context.Context, ln net.Listener, api API) error {
	return serve(ctx, ln, api, writeTimeout)
}

// serve is Serve with a bound of its own for writes, 0 for none.
func serve(ctx context.Context, ln net.Listener, api API, write time.Duration) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	s := &http.Server{
		Handler:           newRoutes(api),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      write,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		// The end of ctx is not the end of the requests, see shutdown.
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
		ConnState:   func(_ net.Conn, state http.ConnState) { follow(&conns, state) },
	}
	ended := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { ended <- shutdown(s) })
	err := s.Serve(ln)
	if stop() {
		return errors.Join(fmt.Errorf("serve admin socket: %w", err), s.Close())
	}
	return <-ended
}

// follow counts the connections, one goroutine each: net/http does not wait for
// them when it closes.
func follow(conns *sync.WaitGroup, state http.ConnState) {
	switch state {
	case http.StateNew:
		conns.Add(1)
	case http.StateClosed:
		conns.Done()
	default:
	}
}

// shutdown ends s. Who is still reading after the grace is cut off: that is no
// error.
func shutdown(s *http.Server) error {
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	err := s.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = s.Close()
	}
	if err != nil {
		return fmt.Errorf("close admin socket: %w", err)
	}
	return nil
}

// route answers one path.
type route struct {
	// method is GET, which stands for HEAD too, if it is empty.
	method string
	params []string
	serve  func(w http.ResponseWriter, r *http.Request, v url.Values) error
}

// routes maps paths. It is no [http.ServeMux], whose own errors are not JSON.
type routes map[string]route

func newRoutes(api API) routes {
	all := routes{}
	if api.Status != nil {
		all["/v1/status"] = answer(nil, func(ctx context.Context, _ url.Values) (any, error) {
			s, err := api.Status(ctx)
			s.Configuration.Refused = list(s.Configuration.Refused)
			return s, err
		})
	}
	if api.Flows != nil {
		all["/v1/flows"] = answer([]string{"live", "limit", "path", "end"}, api.flows)
	}
	if api.Resolve != nil {
		all["/v1/resolve"] = answer([]string{"slot"}, api.resolve)
	}
	if api.Explain != nil {
		all["/v1/explain"] = answer([]string{"dst", "source"}, api.explain)
	}
	if api.Config != nil {
		all["/v1/config"] = answer(nil, func(ctx context.Context, _ url.Values) (any, error) {
			return api.Config(ctx)
		})
	}
	if api.Reload != nil {
		r := answer(nil, func(ctx context.Context, _ url.Values) (any, error) {
			result, err := api.Reload(ctx)
			result.Changes, result.Refused = list(result.Changes), list(result.Refused)
			return result, err
		})
		r.method = http.MethodPost
		all["/v1/reload"] = r
	}
	if api.Diff != nil {
		all["/v1/diff"] = route{method: http.MethodPost, params: []string{"name"}, serve: api.diff}
	}
	for path, ask := range map[string]func() error{"/v1/ready": api.Ready, "/v1/live": api.Live} {
		if ask == nil {
			continue
		}
		all[path] = answer(nil, func(context.Context, url.Values) (any, error) {
			if err := ask(); err != nil {
				return nil, &Error{Code: http.StatusServiceUnavailable, Message: err.Error()}
			}
			return struct{}{}, nil
		})
	}
	if api.Metrics != nil {
		all["/metrics"] = route{serve: func(w http.ResponseWriter, r *http.Request, _ url.Values) error {
			api.Metrics.ServeHTTP(w, r)
			return nil
		}}
	}
	return all
}

// answer makes a route of a function that returns what is to be sent as JSON.
func answer(params []string, f func(context.Context, url.Values) (any, error)) route {
	return route{params: params, serve: func(w http.ResponseWriter, r *http.Request, v url.Values) error {
		body, err := f(r.Context(), v)
		if err != nil {
			return err
		}
		return send(w, http.StatusOK, body)
	}}
}

// ServeHTTP implements [http.Handler].
func (rs routes) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := rs.serve(w, r); err != nil {
		e := asError(err)
		_ = send(w, e.Code, e)
	}
}

func (rs routes) serve(w http.ResponseWriter, r *http.Request) error {
	found, ok := rs[r.URL.Path]
	if !ok {
		return notFound("no such path: %s", r.URL.Path)
	}
	if err := found.allows(w, r.Method); err != nil {
		return err
	}
	v, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return badRequest("parse parameters: %v", err)
	}
	for name, values := range v {
		switch {
		case !slices.Contains(found.params, name):
			return badRequest("unknown parameter %q", name)
		case len(values) > 1:
			return badRequest("parameter %q is given twice", name)
		}
	}
	return found.serve(w, r, v)
}

// list makes nothing [] in JSON, and not null.
func list[T any](all []T) []T {
	if all == nil {
		return []T{}
	}
	return all
}

// allows refuses methods that the route does not have.
func (r route) allows(w http.ResponseWriter, method string) error {
	want, allow := http.MethodGet, "GET, HEAD"
	switch {
	case method == r.method, r.method == "" && (method == http.MethodGet || method == http.MethodHead):
		return nil
	case r.method != "":
		want, allow = r.method, r.method
	}
	w.Header().Set("Allow", allow)
	return &Error{Code: http.StatusMethodNotAllowed, Message: method + ": want " + want}
}

// send encodes body before it writes anything: nothing is held while a slow
// client reads, and an error can still be told.
func send(w http.ResponseWriter, code int, body any) error {
	var b bytes.Buffer
	if err := json.NewEncoder(&b).Encode(body); err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	// The client is gone: there is nobody to tell.
	_, _ = b.WriteTo(w)
	return nil
}

func (a API) flows(ctx context.Context, v url.Values) (any, error) {
	q, err := parseFlowQuery(v)
	if err != nil {
		return nil, err
	}
	records, err := a.Flows(ctx, q)
	if err != nil {
		return nil, err
	}
	return list(q.Apply(records)), nil
}

// resolved is the answer of /v1/resolve.
type resolved struct {
	Address netip.Addr `json:"address"`
}

func (a API) resolve(_ context.Context, v url.Values) (any, error) {
	slot, err := netip.ParseAddr(v.Get("slot"))
	if err != nil {
		return nil, badRequest("slot %q: want an address", v.Get("slot"))
	}
	addr, err := a.Resolve(slot)
	if err != nil {
		return nil, notFound("resolve %s: %v", slot, err)
	}
	return resolved{Address: addr}, nil
}

func (a API) explain(ctx context.Context, v url.Values) (any, error) {
	q, err := parseExplainQuery(v)
	if err != nil {
		return nil, err
	}
	all, err := a.Explain(ctx, q)
	if err != nil {
		return nil, err
	}
	return list(all), nil
}

func (a API) diff(w http.ResponseWriter, r *http.Request, v url.Values) error {
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxText))
	if err != nil {
		return badRequest("read the text: %v", err)
	}
	result, err := a.Diff(r.Context(), v.Get("name"), text)
	if err != nil {
		return err
	}
	result.Refused = list(result.Refused)
	return send(w, http.StatusOK, result)
}
