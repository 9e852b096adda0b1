package main

import (
	"bytes"
	"encoding/json"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMedian(t *testing.T) {
	for _, tt := range []struct {
		v    []float64
		want float64
	}{
		{nil, 0}, {[]float64{3}, 3}, {[]float64{5, 1, 3}, 3}, {[]float64{4, 1, 3, 2}, 2.5},
	} {
		if got := median(tt.v); got != tt.want {
			t.Errorf("median(%v) = %v, want %v", tt.v, got, tt.want)
		}
	}
}

func TestMedianError(t *testing.T) {
	var v []float64
	for i := range 400 {
		v = append(v, float64(i%101)) // half of it within 25 and 75
	}
	slices.Reverse(v)
	if got, want := medianError(v), 1.2533*50/1.349/20; math.Abs(got-want) > want/20 {
		t.Errorf("medianError = %v, want %v", got, want)
	}
	if got := medianError([]float64{1, 2, 3}); got != 0 {
		t.Errorf("of three values it is %v, want 0: not known", got)
	}
}

// aReport has relay cost half of nginx and all of haproxy, but in one round of
// three, in which the machine was slow for it.
func aReport(memory int64) *report {
	r := &report{works: allWorks(), Samples: map[string]map[string][]sample{}, Idle: []idle{{Arm: armRelay, Memory: memory}}}
	for _, w := range r.works {
		r.Samples[w.Name] = map[string][]sample{
			armDirect:  {{}, {}, {}},
			armRelay:   {{Proxy: 50}, {Proxy: 900}, {Proxy: 100}},
			armHAProxy: {{Proxy: 50}, {Proxy: 100}, {Proxy: 100}},
			armNginx:   {{Proxy: 100}, {Proxy: 200}, {Proxy: 200}},
		}
	}
	r.sum()
	return r
}

func TestRatio(t *testing.T) {
	r := aReport(0)
	got := []float64{r.ratio(workUpload, armNginx), r.ratio(workUpload, armHAProxy), r.ratio(workUpload, rivals...)}
	if d := cmp.Diff([]float64{0.5, 1, 1}, got); d != "" {
		t.Error(d)
	}
}

func TestVerdict(t *testing.T) {
	r := aReport(20e6)
	err := r.verdict(false)
	if err == nil {
		t.Fatal("missed targets are no error")
	}
	for _, want := range []string{"GiB down : best peer is 1.000, want at most 0.600", "MB resident when idle is 20.00"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v: does not say %q", err, want)
		}
	}
	if strings.Contains(err.Error(), "round trip") {
		t.Errorf("%v: round trips have met their target", err)
	}
	if err := r.verdict(true); err != nil {
		t.Errorf("--quick enforces: %v", err)
	}
}

func TestReportFormats(t *testing.T) {
	for _, format := range []string{"table", "json"} {
		var b bytes.Buffer
		if err := aReport(1e6).write(&b, format); err != nil {
			t.Fatal(err)
		}
		if format == "json" && !json.Valid(b.Bytes()) {
			t.Errorf("no JSON: %s", &b)
		}
		if !strings.Contains(b.String(), workLatency) {
			t.Errorf("%s does not tell of %s", format, workLatency)
		}
	}
}

func TestFlags(t *testing.T) {
	for _, args := range [][]string{{"--only", "nothing"}, {"-o", "xml"}, {"--rounds", "0"}, {"more"}} {
		if _, err := parse(args); err == nil {
			t.Errorf("%v is accepted", args)
		}
	}
	if _, err := parse([]string{"--part", "half"}); err == nil {
		t.Error("a part that is none is accepted")
	}
	o, err := parse([]string{"--quick", "--only", "latency,upload"})
	if err != nil {
		t.Fatal(err)
	}
	if w := o.works(allWorks()); len(w) != 2 || w[0].Name != workUpload || w[0].Ops != 1 || o.rounds != 3 {
		t.Errorf("works %+v, rounds %d", w, o.rounds)
	}
}

// TestWorks has a client do a little of every work.
func TestWorks(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- accept(ln) }()
	defer func() {
		ln.Close()
		<-done
	}()
	for _, w := range slices.Concat(allWorks(), pathWorks()) {
		w.Ops = w.Conns * 2
		if w.transfer() {
			w.Ops = 0 // what makes it warm is enough
		}
		spec, err := json.Marshal(job{Work: w, Addrs: []string{ln.Addr().String()}})
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := client([]string{string(spec)}, strings.NewReader("\n"), &out); err != nil {
			t.Errorf("%s: %v", w.Name, err)
			continue
		}
		var r result
		if err := json.Unmarshal(out.Bytes(), &r); err != nil || r.Opened < w.Conns || r.Wall <= 0 || (r.P50 == 0) != w.transfer() {
			t.Errorf("%s: result %s: %v", w.Name, &out, err)
		}
	}
}

func TestOwnProcess(t *testing.T) {
	before, err := cpuOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for x := 0.0; x < 5e7; x++ {
		_ = math.Sqrt(x)
	}
	after, err := cpuOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if after-before < 1e6 {
		t.Errorf("computing took %d ns", after-before)
	}
	if rss, err := rssOf(os.Getpid()); err != nil || rss < 1<<20 || rss > 1<<32 {
		t.Errorf("resident %d: %v", rss, err)
	}
}
