package admin

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// TestReadyAndLive are told over the socket and over the network, with what is
// missing.
func TestReadyAndLive(t *testing.T) {
	t.Parallel()
	var ready, live error
	api := API{Ready: func() error { return ready }, Live: func() error { return live }}
	path, _ := start(t, api)
	c := Dial(path)
	probes := Probes(api)
	code := func(path string) int {
		w := httptest.NewRecorder()
		probes.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code
	}
	for _, n := range []struct{ ready, live error }{
		{nil, nil},
		{errors.New("no endpoints yet"), nil},
		{errors.New("no endpoints yet"), errors.New("a worker hangs")},
	} {
		ready, live = n.ready, n.live
		for what, got := range map[string]struct{ want, got error }{
			"ready": {ready, c.Ready(t.Context())}, "live": {live, c.Live(t.Context())},
		} {
			if (got.want == nil) != (got.got == nil) || got.want != nil && !strings.Contains(got.got.Error(), got.want.Error()) {
				t.Errorf("%s: %v, want %v", what, got.got, got.want)
			}
			want := http.StatusOK
			if got.want != nil {
				want = http.StatusServiceUnavailable
			}
			if got := code("/" + what); got != want {
				t.Errorf("GET /%s: %d, want %d", what, got, want)
			}
		}
	}
	if got := code("/v1/status"); got != http.StatusNotFound {
		t.Errorf("GET /v1/status of the probes: %d", got)
	}
}
