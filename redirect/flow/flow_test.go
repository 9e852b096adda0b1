package flow

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// label is what a metric label's value looks like here.
var label = regexp.MustCompile(`^[a-z]+(_[a-z]+)*$`)

func TestReasonNames(t *testing.T) {
	seen := make(map[string]Reason)
	for i, r := range Reasons() {
		if int(r) != i {
			t.Errorf("Reasons()[%d] is %d", i, r)
		}
		name := r.String()
		if !label.MatchString(name) {
			t.Errorf("reason %d has no proper name: %q", r, name)
		}
		if other, taken := seen[name]; taken {
			t.Errorf("reasons %d and %d are both %q", other, r, name)
		}
		seen[name] = r
	}
	if got := len(Reasons()); got != int(ReasonCrashed)+1 {
		t.Errorf("%d reasons, want %d", got, ReasonCrashed+1)
	}
}

// User space's reasons follow the kernel's without a gap.
func TestReasonsOfUserSpaceFollow(t *testing.T) {
	if ReasonClosed != KernelReasons || ReasonLiveLost != KernelReasons-1 {
		t.Errorf("kernel reasons %d, the last %d, the first of user space %d", KernelReasons, ReasonLiveLost, ReasonClosed)
	}
}

func TestReasonText(t *testing.T) {
	for _, r := range Reasons() {
		text, err := r.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		back := Reason(255)
		if err := back.UnmarshalText(text); err != nil || back != r {
			t.Errorf("%s is read as %s, %v", r, back, err)
		}
	}
	for _, bad := range []string{"", "Closed", "reason(200)", "closed "} {
		r := ReasonDrained
		if err := r.UnmarshalText([]byte(bad)); err == nil || r != ReasonDrained {
			t.Errorf("%q is read as %s, %v", bad, r, err)
		}
	}
	if got := Reason(200).String(); got != "reason(200)" {
		t.Errorf("an unknown reason is %q", got)
	}
}

func TestPathText(t *testing.T) {
	seen := make(map[string]bool)
	for i, p := range Paths() {
		if int(p) != i || seen[p.String()] || !label.MatchString(p.String()) {
			t.Errorf("path %d of value %d is %q", i, p, p)
		}
		seen[p.String()] = true
		text, err := p.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		back := Path(255)
		if err := back.UnmarshalText(text); err != nil || back != p {
			t.Errorf("%s is read as %s, %v", p, back, err)
		}
	}
	for _, bad := range []string{"", "Relay", "path(9)"} {
		p := PathDirect
		if err := p.UnmarshalText([]byte(bad)); err == nil || p != PathDirect {
			t.Errorf("%q is read as %s, %v", bad, p, err)
		}
	}
	if got := Path(9).String(); got != "path(9)" {
		t.Errorf("an unknown path is %q", got)
	}
}

func TestReasonOf(t *testing.T) {
	sentinel := NewError(ReasonNoEndpoint, "no endpoint available")
	for name, c := range map[string]struct {
		err  error
		want Reason
	}{
		"nil":       {nil, ReasonNone},
		"another":   {errors.New("x"), ReasonNone},
		"itself":    {sentinel, ReasonNoEndpoint},
		"wrapped":   {fmt.Errorf("pick: %w", sentinel), ReasonNoEndpoint},
		"joined":    {errors.Join(errors.New("x"), sentinel), ReasonNoEndpoint},
		"outermost": {fmt.Errorf("%w: %w", NewError(ReasonLoop, "a"), sentinel), ReasonLoop},
	} {
		if got := ReasonOf(c.err); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
	if !errors.Is(fmt.Errorf("pick: %w", sentinel), sentinel) {
		t.Error("a wrapped sentinel is not itself")
	}
	if errors.Is(sentinel, NewError(ReasonNoEndpoint, "no endpoint available")) {
		t.Error("two sentinels of one text are the same")
	}
	if sentinel.Error() != "no endpoint available" {
		t.Errorf("the text is %q", sentinel)
	}
}

// The JSON of a record is what flow logs and the admin API promise.
func TestRecordJSON(t *testing.T) {
	r := Record{
		Cookie:   7,
		Source:   netip.MustParseAddrPort("192.0.2.1:4000"),
		OrigDst:  netip.MustParseAddrPort("[2001:db8::1]:443"),
		Endpoint: netip.MustParseAddrPort("192.0.2.2:8443"),
		Path:     PathRelay, Reason: ReasonService, End: ReasonClosed,
		Attempts: 2, Duration: time.Second, RTT: time.Millisecond, Sent: 10, Received: 20,
	}
	data, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(data, &fields); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"cookie": 7.0, "cgroup": 0.0, "source": "192.0.2.1:4000", "original_destination": "[2001:db8::1]:443",
		"endpoint": "192.0.2.2:8443", "path": "relay", "reason": "service", "end": "closed", "attempts": 2.0,
		"start": "0001-01-01T00:00:00Z", "duration_ns": 1e9, "connect_ns": 0.0, "rtt_ns": 1e6, "retransmits": 0.0,
		"bytes_sent": 10.0, "bytes_received": 20.0, "mirrored": false, "open": false,
	}
	if diff := cmp.Diff(want, fields); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}

	var back Record
	if err := json.Unmarshal(data, &back); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(r, back, cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
		t.Errorf("read back (-want +got):\n%s", diff)
	}

	r.Endpoint = netip.AddrPort{}
	data, err = json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if regexp.MustCompile(`"(endpoint|service|cluster)":`).Match(data) {
		t.Errorf("what is not known is written: %s", data)
	}
}
