package admin

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
)

func TestFlowQueryRoundTrip(t *testing.T) {
	t.Parallel()
	for _, q := range []FlowQuery{
		{},
		{Live: true, Limit: 7, Path: flow.PathRelay, End: flow.ReasonDialRefused},
	} {
		got, err := parseFlowQuery(q.values())
		if err != nil || got != q {
			t.Errorf("%+v became %+v, %v", q, got, err)
		}
	}
	got, err := parseFlowQuery(url.Values{"live": {""}, "limit": {""}, "path": {""}, "end": {""}})
	if err != nil || got != (FlowQuery{}) {
		t.Errorf("empty: %+v, %v", got, err)
	}
}

func TestFlowQueryApply(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		q    FlowQuery
		want []uint64
	}{
		{FlowQuery{}, []uint64{1, 2, 3}},
		{FlowQuery{Live: true}, []uint64{2, 3, 1}},
		{FlowQuery{Limit: 2}, []uint64{2, 3}},
		{FlowQuery{Live: true, Limit: 1}, []uint64{1}},
		{FlowQuery{Path: flow.PathRelay}, []uint64{1, 3}},
		{FlowQuery{End: flow.ReasonReset}, []uint64{2, 3}},
		{FlowQuery{Path: flow.PathRelay, End: flow.ReasonReset, Limit: 9}, []uint64{3}},
		{FlowQuery{Path: flow.PathDeny}, nil},
	} {
		var got []uint64
		for _, r := range tt.q.Apply(records()) {
			got = append(got, r.Cookie)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%+v: %s", tt.q, diff)
		}
	}
}

func TestExplainQueryRoundTrip(t *testing.T) {
	t.Parallel()
	for _, q := range []ExplainQuery{
		{Destination: "10.96.0.12:80"},
		{Destination: "a service & its=name", Source: netip.MustParseAddr("2001:db8::1")},
	} {
		got, err := parseExplainQuery(q.values())
		if err != nil || got != q {
			t.Errorf("%+v became %+v, %v", q, got, err)
		}
	}
	got, err := parseExplainQuery(url.Values{"dst": {"x"}, "source": {"::ffff:192.0.2.1"}})
	if err != nil || got.Source != netip.MustParseAddr("192.0.2.1") {
		t.Errorf("mapped source: %+v, %v", got, err)
	}
}

// FuzzRequest: whatever is asked, the answer is JSON, and it is no fault of the
// server's.
func FuzzRequest(f *testing.F) {
	f.Add("GET", "/v1/explain", "dst=10.0.0.1:80&source=::1")
	f.Add("GET", "/v1/flows", "live=true&limit=3&path=direct&end=dial_refused")
	f.Add("POST", "/v1/reload", "")
	f.Add("DELETE", "/v1/config", "%")
	f.Add("GET", "/v1/resolve", "slot=240.0.0.1%25eth0")
	api := testAPI()
	api.Metrics = nil
	routes := newRoutes(api)
	f.Fuzz(func(t *testing.T, method, path, query string) {
		r := &http.Request{Method: method, URL: &url.URL{Path: path, RawQuery: query}}
		w := httptest.NewRecorder()
		routes.ServeHTTP(w, r)
		if !json.Valid(w.Body.Bytes()) || w.Code >= http.StatusInternalServerError {
			t.Errorf("%s %s?%s: %d %q", method, path, query, w.Code, w.Body)
		}
	})
}
