package check

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestValidate(t *testing.T) {
	with := func(change func(*Spec)) Spec {
		s := Default()
		change(&s)
		return s
	}
	http := func(change func(*HTTP)) Spec {
		return with(func(s *Spec) { s.Kind = KindHTTP; change(&s.HTTP) })
	}
	for name, tt := range map[string]struct {
		spec Spec
		want []string
	}{
		"default":      {Default(), nil},
		"http":         {http(func(*HTTP) {}), nil},
		"http query":   {http(func(h *HTTP) { h.Path = "/well?deep=1&x=%20"; h.Host = "shop.test:8080" }), nil},
		"http ipv6":    {http(func(h *HTTP) { h.Host = "[::1]:80" }), nil},
		"command":      {with(func(s *Spec) { s.Kind, s.Command = KindCommand, []string{"true", ""} }), nil},
		"long timeout": {with(func(s *Spec) { s.Timeout = time.Hour }), nil},
		"zero": {Spec{}, []string{
			"interval: 0s is shorter than 10ms", "timeout: 0s is not positive",
			"healthy: 0 is less than 1", "unhealthy: 0 is less than 1",
		}},
		"jitter": {with(func(s *Spec) { s.Jitter = 101 }), []string{"jitter: 101 is no percentage"}},
		"kind":   {with(func(s *Spec) { s.Kind = 9 }), []string{"kind: kind 9 is none"}},
		"http zero": {http(func(h *HTTP) { *h = HTTP{} }), []string{
			`http.path: "" does not begin with a slash`, "http.status: no status is good",
		}},
		"http path": {http(func(h *HTTP) { h.Path = "http://x/" }), []string{`http.path: "http://x/" does not begin with a slash`}},
		"fragment":  {http(func(h *HTTP) { h.Path = "/a#b" }), []string{`http.path: "/a#b" has a fragment`}},
		"escape":    {http(func(h *HTTP) { h.Path = "/%zz" }), []string{`http.path: "/%zz" is no path`}},
		"line":      {http(func(h *HTTP) { h.Path = "/a\r\nb" }), []string{`http.path: "/a\r\nb" is no path`}},
		"host":      {http(func(h *HTTP) { h.Host = "a\r\nb" }), []string{`http.host: "a\r\nb" is no host`}},
		"host path": {http(func(h *HTTP) { h.Host = "a/b" }), []string{`http.host: "a/b" is no host`}},
		"status": {http(func(h *HTTP) { h.Status = []StatusRange{{200, 204}, {100, 199}, {300, 299}, {500, 600}} }), []string{
			"http.status: 100-199 is not within 200-599", "http.status: 300-299 is not within 200-599",
			"http.status: 500-600 is not within 200-599",
		}},
		"no command": {with(func(s *Spec) { s.Kind = KindCommand }), []string{"command: names no program"}},
		"nul": {with(func(s *Spec) { s.Kind, s.Command = KindCommand, []string{"a", "b\x00"} }), []string{
			"command: an argument has a NUL in it",
		}},
	} {
		var got []string
		if err := tt.spec.Validate(); err != nil {
			got = strings.Split(err.Error(), "\n")
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// TestEqual looks at every field, so that a new one is not forgotten.
func TestEqual(t *testing.T) {
	full := func() Spec {
		s := Default()
		s.Command = []string{"a", "b"}
		return s
	}
	for i, change := range []func(*Spec){
		func(s *Spec) { s.Kind++ },
		func(s *Spec) { s.Interval++ },
		func(s *Spec) { s.Timeout++ },
		func(s *Spec) { s.Jitter++ },
		func(s *Spec) { s.Healthy++ },
		func(s *Spec) { s.Unhealthy++ },
		func(s *Spec) { s.Port++ },
		func(s *Spec) { s.HTTP.Path = "/x" },
		func(s *Spec) { s.HTTP.Host = "x" },
		func(s *Spec) { s.HTTP.Status = append(s.HTTP.Status, StatusRange{500, 500}) },
		func(s *Spec) { s.Command = []string{"a", "c"} },
	} {
		s := full()
		if !s.equal(full()) {
			t.Fatal("not equal to itself")
		}
		change(&s)
		if s.equal(full()) {
			t.Errorf("change %d makes no difference", i)
		}
		if cmp.Equal(s, full()) {
			t.Errorf("change %d changes nothing", i)
		}
	}
}

func TestNames(t *testing.T) {
	got := []string{
		KindTCP.String(), KindHTTP.String(), KindCommand.String(),
		StateUnknown.String(), StateUp.String(), StateDown.String(),
		StatusRange{200, 200}.String(), StatusRange{200, 399}.String(),
	}
	want := []string{"tcp", "http", "command", "unknown", "up", "down", "200", "200-399"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
