package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/health"
)

var update = flag.Bool("update", false, "write what the golden files should say")

// equalAddrs lets cmp look at addresses, whose fields are not exported.
var equalAddrs = cmp.Options{
	cmpopts.EquateComparable(netip.AddrPort{}, netip.Prefix{}),
	cmpopts.IgnoreUnexported(Config{}, Service{}), // where it stands
}

// emptyIsNil takes an empty list for none.
var emptyIsNil = cmpopts.EquateEmpty()

func glob(t testing.TB, pattern string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", pattern))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatalf("no file testdata/%s", pattern)
	}
	return files
}

func read(t testing.TB, file string) []byte {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestGood(t *testing.T) {
	for _, file := range glob(t, "*.good.yaml") {
		t.Run(filepath.Base(file), func(t *testing.T) {
			c, err := Load(file)
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.MarshalIndent(c, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, '\n')
			golden := strings.TrimSuffix(file, ".yaml") + ".json"
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(string(read(t, golden)), string(got)); diff != "" {
				t.Errorf("not what %s says (-want +got):\n%s", golden, diff)
			}
			if err := c.Validate(); err != nil {
				t.Errorf("Validate of what Load returned: %v", err)
			}
		})
	}
}

const wantPrefix = "# want: "

// wanted returns the error that the first lines of a bad file ask for, and the
// rest of the file.
func wanted(data []byte) (want string, rest []byte) {
	var lines []string
	for bytes.HasPrefix(data, []byte(wantPrefix)) {
		line, after, _ := bytes.Cut(data, []byte("\n"))
		lines = append(lines, string(line[len(wantPrefix):]))
		data = after
	}
	return strings.Join(lines, "\n"), data
}

// The positions in the errors count from after the want lines, so that they do
// not move when one is added.
func TestBad(t *testing.T) {
	for _, file := range glob(t, "*.bad.yaml") {
		t.Run(filepath.Base(file), func(t *testing.T) {
			want, data := wanted(read(t, file))
			c, err := Parse("bad.yaml", data)
			if err == nil {
				t.Fatalf("no error, and %+v", c)
			}
			if c != nil {
				t.Errorf("an error, and a configuration too")
			}
			if *update {
				text := wantPrefix + strings.ReplaceAll(err.Error(), "\n", "\n"+wantPrefix) + "\n"
				if err := os.WriteFile(file, append([]byte(text), data...), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(want, err.Error()); diff != "" {
				t.Errorf("not the error that is wanted (-want +got):\n%s", diff)
			}
		})
	}
}

// A configuration that says nothing is the default.
func TestEmptyIsDefault(t *testing.T) {
	want := Default()
	for _, text := range []string{"", "\n", "# nothing\n", "---\n", "--- ~\n", "{}", "\ufeff"} {
		got, err := Parse("x", []byte(text))
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if diff := cmp.Diff(&want, got, equalAddrs); diff != "" {
			t.Errorf("%q (-want +got):\n%s", text, diff)
		}
	}
}

func TestDefaultIsValid(t *testing.T) {
	c := Default()
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	want := Config{
		Default:    flow.PathRelay,
		Path:       PathRelay,
		Kubernetes: Kubernetes{Idle: 10 * time.Minute},
		OnFailure:  OnFailureOpen,
		Connect:    ConnectAdaptive, NoEndpoint: "ECONNREFUSED",
		Existing: ExistingReport,
		Survive:  SurviveRestart,
		Relay:    Relay{DialTimeout: 5 * time.Second, DialBudget: 15 * time.Second, Attempts: 3},
		Health:   health.Default(),
		Limits:   Limits{SlotsPerContainer: 16384, Connections: 200000},
	}
	if diff := cmp.Diff(want, c, equalAddrs); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestDefaultsAreNotShared(t *testing.T) {
	a, b := Default(), Default()
	a.Services = append(a.Services, Service{Name: "a"})
	a.Relay.Attempts = 7
	if diff := cmp.Diff(Default(), b, equalAddrs); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestLoad(t *testing.T) {
	t.Run("absent", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "absent.yaml")
		_, err := Load(path)
		if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("directory", func(t *testing.T) {
		if _, err := Load(t.TempDir()); err == nil {
			t.Error("no error")
		}
	})
	t.Run("huge", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "huge.yaml")
		if err := os.WriteFile(path, bytes.Repeat([]byte("# x\n"), maxSize), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Load(path)
		want := path + ":1:1: more than 8388608 bytes: this is no configuration"
		if err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	})
	t.Run("endless", func(t *testing.T) {
		if _, err := Load("/dev/zero"); err == nil {
			t.Error("no error")
		}
	})
	pipe := func(t *testing.T) string {
		path := filepath.Join(t.TempDir(), "pipe.yaml")
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	t.Run("pipe without a writer", func(t *testing.T) {
		if _, err := readWithin(pipe(t), time.Millisecond); err == nil || !strings.Contains(err.Error(), "nobody wrote") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("pipe that stays open", func(t *testing.T) {
		path := pipe(t)
		w, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		if _, err := w.WriteString("zone: a\n"); err != nil {
			t.Fatal(err)
		}
		if data, err := readWithin(path, time.Millisecond); err == nil {
			t.Errorf("got %q, before its writer said that this is all", data)
		}
	})
	t.Run("pipe with a writer", func(t *testing.T) {
		path := pipe(t)
		written := make(chan error, 1)
		go func() { written <- os.WriteFile(path, []byte("zone: a\n"), 0o600) }() // waits for the reader
		data, err := readWithin(path, time.Minute)
		if err != nil || string(data) != "zone: a\n" {
			t.Errorf("got %q, %v", data, err)
		}
		if err := <-written; err != nil {
			t.Error(err)
		}
	})
}

func TestParseNotText(t *testing.T) {
	for name, c := range map[string]struct{ data, want string }{
		"utf-16": {"\xff\xfea\x00", "x:1:1: not UTF-8: want a text file"},
		"nul":    {"relay:\n  x: é\x00", "x:2:7: control character U+0000: want a text file"},
		"latin1": {"a: 1\ncaf\xe9: 1", "x:2:4: not UTF-8: want a text file"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("x", []byte(c.data))
			if err == nil || err.Error() != c.want {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
}

// What a parser may choke on is refused in time that grows with its length.
func TestParseHostile(t *testing.T) {
	const n = 50000
	for name, text := range map[string]string{
		"brackets":     strings.Repeat("[", n),
		"braces":       strings.Repeat("{a: ", n),
		"dashes":       strings.Repeat("- ", n) + "x",
		"keys":         strings.Repeat("a: ", n) + "x",
		"marks":        strings.Repeat("? ", n) + "x",
		"tags":         strings.Repeat("!!str ", n) + "x",
		"anchors":      strings.Repeat("&a ", n) + "x",
		"same keys":    strings.Repeat("a: b\n", n),
		"in items":     "- x: 1\n" + strings.Repeat("  a: b\n", n),
		"flow keys":    "{" + strings.Repeat("a: b, ", n) + "}",
		"documents":    strings.Repeat("---\n", n),
		"full docs":    strings.Repeat("---\na: b\n", n),
		"long key":     strings.Repeat("a", n) + ": 1",
		"long word":    "on_failure: " + strings.Repeat("open ", n),
		"long address": "metrics: " + strings.Repeat("1.", n),
		"long rule":    "deny: [\"" + strings.Repeat("[", n) + "\"]",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			start := threadTime(t)
			_, err := Parse("x", []byte(text))
			took := threadTime(t) - start
			if name != "documents" && err == nil {
				t.Error("no error")
			}
			if err != nil && len(err.Error()) > 100000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			// Some hundred milliseconds is usual; what is not bounded takes minutes.
			if took > 20*time.Second {
				t.Errorf("took %s of a processor", took)
			}
		})
	}
}

// threadTime is the processor time of the calling thread, which other work on the
// machine does not change.
func threadTime(t *testing.T) time.Duration {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

func TestParseManyServices(t *testing.T) {
	const n = 5000
	var b strings.Builder
	b.WriteString("path: direct\nservices:\n")
	for i := range n {
		fmt.Fprintf(&b, "  - {name: s%d, address: 10.1.%d.%d:80, endpoints: [192.0.2.1:80, 192.0.2.2:80]}\n", i, i/250, i%250)
	}
	c, err := Parse("x", []byte(b.String()))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Services) != n {
		t.Errorf("%d services, want %d", len(c.Services), n)
	}
	if got := c.Services[n-1].Name; got != fmt.Sprintf("s%d", n-1) {
		t.Errorf("the last is %s", got)
	}
	// On relay, those beyond the last for which there is room are named, each with its
	// place.
	text := strings.Replace(b.String(), "path: direct", "path: relay", 1)
	_, err = Parse("x", []byte(text))
	all := Problems(err)
	if len(all) != n-maxRelayAddrs {
		t.Fatalf("%d problems, want %d", len(all), n-maxRelayAddrs)
	}
	if p := all[0]; p.Line != maxRelayAddrs+3 || p.Column != 28 || p.Path != "services[4096].address" || p.File != "x" {
		t.Errorf("the first is %+v", p)
	}
	// Where the path was not understood, nobody knows.
	_, err = Parse("x", []byte(strings.Replace(text, "path: relay", "path: drect", 1)))
	if all := Problems(err); len(all) != 1 || all[0].Path != "path" {
		t.Errorf("a misspelt path: %v", err)
	}
	// A running instance takes those for which there is room.
	last := Default()
	got, refused, err := ParsePartial("x", []byte(text), &last, nil)
	if err != nil || len(got.Services) != maxRelayAddrs || len(refused) != n-maxRelayAddrs {
		t.Errorf("%d services taken, %d refused: %v", len(got.Services), len(refused), err)
	}
}

// Validate is for configurations that no file was behind: it tells paths.
func TestValidatePaths(t *testing.T) {
	addr := netip.MustParseAddrPort
	good := Service{Name: "web", Addr: addr("10.96.0.12:80"), Endpoints: []Endpoint{{Addr: addr("192.0.2.1:80"), Weight: 1}}, Policy: flow.PolicyRoundRobin, OnRemove: OnRemoveKeep}
	with := func(change func(s *Service)) func(*Config) {
		return func(c *Config) {
			s := good
			s.Endpoints = slices.Clone(good.Endpoints)
			change(&s)
			c.Services = []Service{s}
		}
	}
	rule := func(s string) Rule { return Rule{Prefix: netip.MustParsePrefix(s)} }
	for name, c := range map[string]struct {
		change func(c *Config)
		want   string // "" is valid
	}{
		"good":              {with(func(*Service) {}), ""},
		"no address":        {with(func(s *Service) { s.Addr = netip.AddrPort{} }), "services[0].address: missing, want ADDR:PORT"},
		"no port":           {with(func(s *Service) { s.Addr = netip.AddrPortFrom(s.Addr.Addr(), 0) }), "services[0].address: 10.96.0.12:0: port 0: want 1 to 65535"},
		"no name":           {with(func(s *Service) { s.Name = "" }), "services[0].name: empty"},
		"name not UTF-8":    {with(func(s *Service) { s.Name = "a\xff" }), `services[0].name: "a\xff": want printable characters only`},
		"no policy":         {with(func(s *Service) { s.Policy = 99 }), "services[0].policy: policy(99): there is no such policy"},
		"on failure":        {with(func(s *Service) { s.OnFailure = "x" }), `services[0].on_failure: "x": want open or closed`},
		"mapped loopback":   {with(func(s *Service) { s.Addr = addr("[::ffff:127.0.0.1]:80") }), "services[0].address: [::ffff:127.0.0.1]:80 is a loopback address, which is never captured: want the address that applications connect to"},
		"no endpoints":      {with(func(s *Service) { s.Endpoints = nil }), "services[0].endpoints: no endpoints: want one ADDR:PORT at least, or discover, or path: pass"},
		"no weight":         {with(func(s *Service) { s.Endpoints[0].Weight = 0 }), "services[0].endpoints[0].weight: 0: want 1 to 65535"},
		"much weight":       {with(func(s *Service) { s.Endpoints[0].Weight = 65536 }), "services[0].endpoints[0].weight: 65536: want 1 to 65535"},
		"endpoint nowhere":  {with(func(s *Service) { s.Endpoints[0].Addr = netip.AddrPort{} }), "services[0].endpoints[0].address: missing, want ADDR:PORT"},
		"endpoint twice":    {with(func(s *Service) { s.Endpoints = append(s.Endpoints, s.Endpoints[0]) }), "services[0].endpoints[1].address: 192.0.2.1:80 is listed twice: give it a weight instead (services[0].endpoints[0].address)"},
		"mapped slot":       {with(func(s *Service) { s.Endpoints[0].Addr = addr("[::ffff:240.1.0.1]:80") }), "services[0].endpoints[0].address: 240.1.0.1:80 is a slot address, where Pillion's own handler listens: a connection would go round for ever"},
		"beyond the slots":  {with(func(s *Service) { s.Endpoints[0].Addr = addr("240.64.0.1:80") }), ""},
		"service twice":     {func(c *Config) { c.Services = []Service{good, good} }, "services[1].address: 10.96.0.12:80 is the address of service \"web\" already (services[0].address)\nservices[1].name: \"web\" is the name of another service (services[0].name)"},
		"rule of nothing":   {func(c *Config) { c.Deny = []Rule{{}} }, "deny[0]: no range of addresses"},
		"rule host bits":    {func(c *Config) { c.Exclude = []Rule{rule("10.0.0.1/8")} }, "exclude[0]: 10.0.0.1/8: host bits are set: want 10.0.0.0/8"},
		"rule mapped":       {func(c *Config) { c.Exclude = []Rule{rule("::ffff:0:0/96")} }, "exclude[0]: ::ffff:0.0.0.0/96: want the IPv4 range"},
		"default":           {func(c *Config) { c.Default = flow.PathDirect }, "default: direct: want relay or pass"},
		"no default":        {func(c *Config) { c.Default = 0 }, "default: none: want relay or pass"},
		"no on_failure":     {func(c *Config) { c.OnFailure = "" }, `on_failure: "": want open or closed`},
		"no connect":        {func(c *Config) { c.Connect = "" }, `connect: "": want early, mirror or adaptive`},
		"connect":           {with(func(s *Service) { s.Connect = "late" }), `services[0].connect: "late": want early, mirror or adaptive`},
		"no no_endpoint":    {func(c *Config) { c.NoEndpoint = "" }, `no_endpoint: "": want ECONNREFUSED, EHOSTUNREACH or ENETUNREACH`},
		"no existing":       {func(c *Config) { c.Existing = "" }, `existing: "": want report or reset`},
		"negative idle":     {func(c *Config) { c.Relay.IdleTimeout = -1 }, "relay.idle_timeout: -1ns: want a positive duration, or 0 for none"},
		"negative lifetime": {func(c *Config) { c.Relay.MaxLifetime = -1 }, "relay.max_lifetime: -1ns: want a positive duration, or 0 for none"},
		"health":            {func(c *Config) { c.Health.Failures, c.Health.Panic = -1, 101 }, "health: failures -1 is negative\nhealth: panic 101 is no percentage"},
		"flow log":          {func(c *Config) { c.FlowLog = "a\x00" }, `flow_log: "a\x00": want printable characters only`},
		"metrics port":      {func(c *Config) { c.Metrics = addr("0.0.0.0:0") }, "metrics: 0.0.0.0:0: port 0: want 1 to 65535"},
		"probes port":       {func(c *Config) { c.Probes = addr("0.0.0.0:0") }, "probes: 0.0.0.0:0: port 0: want 1 to 65535"},
		"probes taken":      {func(c *Config) { c.Metrics, c.Probes = addr("[::]:9090"), addr("[::]:9090") }, "probes: [::]:9090 is taken by metrics"},
		"metrics anywhere":  {func(c *Config) { c.Metrics = addr("[::]:9090") }, ""},
		"too many services": {func(c *Config) { c.Services = manyServices(maxServices + 1) }, "services: 65537 services: the kernel side has room for 65536"},
		"addresses on relay": {func(c *Config) {
			c.Services = manyServices(maxRelayAddrs + 1)
			c.Services[7].Path = PathDirect
			again := c.Services[0] // another port of an address takes no other slot
			again.Name, again.Addr = "again", netip.AddrPortFrom(again.Addr.Addr(), 81)
			c.Services = append(c.Services, again)
		}, ""},
		"too many addresses on relay": {func(c *Config) { c.Services = manyServices(maxRelayAddrs + 1) },
			"services[4096].address: 10.0.16.0: services on relay have 4096 addresses before this one, and there is room for no more: want path: direct, or another instance"},
		"too many sets": {func(c *Config) { c.Path, c.Services = PathDirect, manyServices(maxSets+1) },
			"services[16384]: 16384 services that have endpoints are before this one: the kernel side has room for no more"},
		"too many endpoints": {func(c *Config) {
			c.Path, c.Services = PathDirect, manyServices(10)
			for i := range c.Services {
				c.Services[i].Endpoints = manyEndpoints(maxEndpoints/8 - 1)
			}
			c.Services[9].Endpoints = manyEndpoints(8) // these have room still
		}, "services[8].endpoints: 16383 endpoints: of the 131072 that the kernel side has room for, the services before this one leave 8"},
		"too many rules": {func(c *Config) { c.Deny = slices.Repeat([]Rule{rule("10.0.0.0/8")}, maxRules+1) }, "deny: 16385 rules: the kernel side has room for 16384"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := Default()
			c.change(&cfg)
			got := ""
			if err := cfg.Validate(); err != nil {
				got = err.Error()
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func manyServices(n int) []Service {
	all := make([]Service, n)
	for i := range all {
		a := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 80)
		all[i] = Service{Name: a.String(), Addr: a, Endpoints: []Endpoint{{Addr: a, Weight: 1}}, Policy: flow.PolicyRoundRobin, OnRemove: OnRemoveKeep}
	}
	return all
}

func manyEndpoints(n int) []Endpoint {
	all := make([]Endpoint, n)
	for i := range all {
		all[i] = Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 80), Weight: 1}
	}
	return all
}

// The zero value says nothing that is wanted, and every line says which.
func TestValidateZero(t *testing.T) {
	err := new(Config).Validate()
	for _, path := range []string{"default", "on_failure", "existing", "relay.attempts", "relay.dial_timeout", "relay.dial_budget", "limits.connections", "limits.slots_per_container"} {
		if !regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(path) + `: `).MatchString(err.Error()) {
			t.Errorf("nothing about %s in:\n%v", path, err)
		}
	}
}

// The most that Validate lets pass is what the kernel side's maps hold.
func TestRoomIsThatOfTheMaps(t *testing.T) {
	specs, err := bpf.Specs()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]uint32{
		"services": maxServices, "deny": maxRules, "exclude": maxRules,
		"sets": maxSets, "endpoints": maxEndpoints, "slots": maxSlots, "live": maxConnections, // Those of the workers, and of the canary, of two families.
		"listeners": 2*maxWorkers + 2,
	} {
		m := specs[0].Maps[name]
		if m == nil || m.MaxEntries != want {
			t.Errorf("map %s: %+v, want room for %d", name, m, want)
		}
	}
}

func TestParseService(t *testing.T) {
	for _, c := range []struct {
		in   string
		want Service
	}{
		{"10.96.0.12:80=127.0.0.1:8081", service("10.96.0.12:80", "127.0.0.1:8081", 1)},
		{"10.96.0.12:80=127.0.0.1:8081,192.0.2.1:80*3", service("10.96.0.12:80", "127.0.0.1:8081", 1, "192.0.2.1:80", 3)},
		{"[2001:db8::1]:80=[2001:db8::2]:80*65535", service("[2001:db8::1]:80", "[2001:db8::2]:80", 65535)},
		{"[::ffff:10.0.0.1]:80=[::ffff:10.0.0.2]:80", service("10.0.0.1:80", "10.0.0.2:80", 1)},
		// Whether an address makes sense is for Validate to say.
		{"127.0.0.1:80=240.0.0.1:80", service("127.0.0.1:80", "240.0.0.1:80", 1)},
	} {
		got, err := ParseService(c.in)
		if err != nil {
			t.Errorf("%s: %v", c.in, err)
			continue
		}
		if diff := cmp.Diff(c.want, got, equalAddrs); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.in, diff)
		}
	}
}

// service makes a service of an address and pairs of endpoint and weight.
func service(addr string, endpoints ...any) Service {
	a := netip.MustParseAddrPort(addr)
	s := newService()
	s.Name, s.Addr = addr, a
	for i := 0; i < len(endpoints); i += 2 {
		s.Endpoints = append(s.Endpoints, Endpoint{Addr: netip.MustParseAddrPort(endpoints[i].(string)), Weight: uint32(endpoints[i+1].(int))})
	}
	return s
}

func TestParseServiceErrors(t *testing.T) {
	for in, want := range map[string]string{
		"":                                 `no endpoints, want ADDR:PORT=ENDPOINT[,ENDPOINT...]`,
		"10.0.0.1:80":                      `no endpoints, want ADDR:PORT=ENDPOINT[,ENDPOINT...]`,
		"10.0.0.1:80=":                     `endpoint 1 "": empty, want ADDR:PORT`,
		"=10.0.0.1:80":                     `address "": empty, want ADDR:PORT`,
		"10.0.0.1:80=10.0.0.2:80,":         `endpoint 2 "": empty, want ADDR:PORT`,
		"10.0.0.1=10.0.0.2:80":             `address "10.0.0.1": no port, want 10.0.0.1:PORT`,
		"web:80=10.0.0.2:80":               `address "web:80": "web" is a name, and names are not resolved: want an IP address`,
		"10.0.0.1:80=10.0.0.2:80*0":        `endpoint 1 "10.0.0.2:80*0": weight "0": want 1 to 65535`,
		"10.0.0.1:80=10.0.0.2:80*":         `endpoint 1 "10.0.0.2:80*": weight "": want 1 to 65535`,
		"10.0.0.1:80=10.0.0.2:80*-1":       `endpoint 1 "10.0.0.2:80*-1": weight "-1": want 1 to 65535`,
		"10.0.0.1:80=10.0.0.2:80*65536":    `endpoint 1 "10.0.0.2:80*65536": weight "65536": want 1 to 65535`,
		"10.0.0.1:80=10.0.0.2:80=10.0.0.3": `endpoint 1 "10.0.0.2:80=10.0.0.3": port "80=10.0.0.3": want 1 to 65535`,
	} {
		_, err := ParseService(in)
		got := fmt.Sprint(err)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q (-want +got):\n%s", in, diff)
		}
	}
}

func TestParseRule(t *testing.T) {
	for _, c := range []struct {
		in, prefix string
		port       uint16
		out        string
	}{
		{"10.0.0.0/8", "10.0.0.0/8", 0, "10.0.0.0/8"},
		{"10.0.0.0/8:25", "10.0.0.0/8", 25, "10.0.0.0/8:25"},
		{"0.0.0.0/0", "0.0.0.0/0", 0, "0.0.0.0/0"},
		{"192.0.2.1", "192.0.2.1/32", 0, "192.0.2.1/32"},
		{"192.0.2.1:65535", "192.0.2.1/32", 65535, "192.0.2.1/32:65535"},
		{"2001:db8::/32", "2001:db8::/32", 0, "2001:db8::/32"},
		{"::/0", "::/0", 0, "::/0"},
		{"::1", "::1/128", 0, "::1/128"},
		{"[::1]", "::1/128", 0, "::1/128"},
		{"[::1]:80", "::1/128", 80, "[::1/128]:80"},
		{"[2001:db8::/32]", "2001:db8::/32", 0, "2001:db8::/32"},
		{"[2001:db8::/32]:443", "2001:db8::/32", 443, "[2001:db8::/32]:443"},
		{"[10.0.0.0/8]:25", "10.0.0.0/8", 25, "10.0.0.0/8:25"},
		{"::ffff:10.0.0.0/104", "10.0.0.0/8", 0, "10.0.0.0/8"},
		{"::ffff:0:0/96", "0.0.0.0/0", 0, "0.0.0.0/0"},
		{"::ffff:192.0.2.1", "192.0.2.1/32", 0, "192.0.2.1/32"},
		{"[::ffff:192.0.2.1]:80", "192.0.2.1/32", 80, "192.0.2.1/32:80"},
	} {
		got, err := ParseRule(c.in)
		if want := (Rule{netip.MustParsePrefix(c.prefix), c.port}); err != nil || got != want {
			t.Errorf("%s: %v, %v, want %v", c.in, got, err, want)
			continue
		}
		if got.String() != c.out {
			t.Errorf("%s is printed as %s, want %s", c.in, got, c.out)
		}
	}
}
