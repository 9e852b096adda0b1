package config

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// summary is one line for each service: its name, address, first endpoint or
// source, and policy.
func summary(c *Config) []string {
	var all []string
	for _, s := range c.Services {
		from := "nowhere"
		switch {
		case s.Discover != nil && s.Discover.DNS != nil:
			from = s.Discover.DNS.Name
		case s.Discover != nil:
			from = s.Discover.File
		case len(s.Endpoints) > 0:
			from = s.Endpoints[0].Addr.String()
		default:
		}
		all = append(all, fmt.Sprintf("%s %s %s %s", s.Name, s.Addr, from, s.Policy))
	}
	return all
}

// brief is a refusal in one line.
func brief(refused []Refused) []string {
	var all []string
	for _, r := range refused {
		kind := "service"
		if r.Source {
			kind = "source"
		}
		all = append(all, fmt.Sprintf("%s %s at %s, %d problems, keeps %v", kind, r.Name, r.Where, strings.Count(r.Text, "\n")+1, r.Kept))
	}
	return all
}

const before = `
services:
  - {name: web, address: 10.96.0.1:80, endpoints: [10.0.0.1:80]}
  - {name: db, address: 10.96.0.2:80, endpoints: [10.0.0.2:80]}
  - {address: 10.96.0.3:80, endpoints: [10.0.0.3:80]}
`

const (
	oldWeb  = "web 10.96.0.1:80 10.0.0.1:80 least_connections"
	oldDB   = "db 10.96.0.2:80 10.0.0.2:80 least_connections"
	oldBare = "10.96.0.3:80 10.96.0.3:80 10.0.0.3:80 least_connections"
)

func TestLoadPartial(t *testing.T) {
	for name, c := range map[string]struct {
		text    string
		want    []string
		refused []string
	}{
		"all good": {
			`services: [{name: web, address: 10.96.0.1:80, endpoints: [10.0.0.9:80]}]`,
			[]string{"web 10.96.0.1:80 10.0.0.9:80 least_connections"}, nil,
		},
		"one is refused, the others are taken": {
			`services:
  - {name: web, address: 10.96.0.1:80, endpoints: [10.0.0.1:80], policy: randm, attempts: 0}
  - {name: db, address: 10.96.0.2:80, endpoints: [10.0.0.2:80], policy: random}
  - {name: new, address: 10.96.0.4:80, endpoints: [10.0.0.4:80]}`,
			[]string{oldWeb, "db 10.96.0.2:80 10.0.0.2:80 random", "new 10.96.0.4:80 10.0.0.4:80 least_connections"},
			[]string{"service web at r.yaml:2:74, 2 problems, keeps [web]"},
		},
		"a new one is left out": {
			`services:
  - {name: web, address: 10.96.0.1:80, endpoints: [10.0.0.1:80]}
  - {name: new, address: 10.96.0.4:80, endpoints: []}`,
			[]string{oldWeb}, []string{"service new at r.yaml:3:40, 1 problems, keeps []"},
		},
		"renamed and refused: found by its address": {
			`services: [{name: shop, address: 10.96.0.1:80, endpoints: [10.0.0.1:80], policy: x}]`,
			[]string{oldWeb}, []string{"service shop at r.yaml:1:82, 1 problems, keeps [web]"},
		},
		"renamed, and taken": {
			`services: [{name: shop, address: 10.96.0.1:80, endpoints: [10.0.0.1:80]}]`,
			[]string{"shop 10.96.0.1:80 10.0.0.1:80 least_connections"}, nil,
		},
		"without a name": {
			`services: [{address: 10.96.0.3:80, endpoints: [10.0.0.3:80], policy: x}]`,
			[]string{oldBare}, []string{"service 10.96.0.3:80 at r.yaml:1:70, 1 problems, keeps [10.96.0.3:80]"},
		},
		"a name at last, and refused": {
			`services: [{name: bare, address: 10.96.0.3:80, endpoints: [10.0.0.3:80], policy: x}]`,
			[]string{oldBare}, []string{"service bare at r.yaml:1:82, 1 problems, keeps [10.96.0.3:80]"},
		},
		"moved and refused: found by its name": {
			`services: [{name: web, address: 10.96.0.9:80, endpoints: [10.0.0.1:80], policy: x}]`,
			[]string{oldWeb}, []string{"service web at r.yaml:1:81, 1 problems, keeps [web]"},
		},
		"its address is another's now": {
			// web stays at 10.96.0.1:80, so shop cannot have it, and was nowhere.
			`services:
  - {name: web, address: 10.96.0.9:80, endpoints: [10.0.0.1:80], policy: x}
  - {name: shop, address: 10.96.0.1:80, endpoints: [10.0.0.5:80]}`,
			[]string{oldWeb},
			[]string{"service web at r.yaml:2:74, 1 problems, keeps [web]", "service shop at r.yaml:3:27, 1 problems, keeps []"},
		},
		"two change places, and one is refused": {
			`services:
  - {name: web, address: 10.96.0.2:80, endpoints: [10.0.0.1:80], policy: x}
  - {name: db, address: 10.96.0.1:80, endpoints: [10.0.0.2:80]}`,
			[]string{oldWeb, oldDB},
			[]string{"service web at r.yaml:2:74, 1 problems, keeps [web]", "service db at r.yaml:3:25, 1 problems, keeps [db]"},
		},
		"a chain of moves": {
			// web stays, so db stays, so the third does.
			`services:
  - {name: web, address: 10.96.0.9:80, endpoints: [10.0.0.1:80], policy: x}
  - {name: db, address: 10.96.0.1:80, endpoints: [10.0.0.2:80]}
  - {name: third, address: 10.96.0.2:80, endpoints: [10.0.0.2:80]}
  - {name: fourth, address: 10.96.0.4:80, endpoints: [10.0.0.2:80]}`,
			[]string{oldWeb, oldDB, "fourth 10.96.0.4:80 10.0.0.2:80 least_connections"},
			[]string{"service web at r.yaml:2:74, 1 problems, keeps [web]", "service db at r.yaml:3:25, 1 problems, keeps [db]", "service third at r.yaml:4:28, 1 problems, keeps []"},
		},
		"moved and taken, and the address's next owner is refused": {
			// Who has the name of web is web.
			`services:
  - {name: web, address: 10.96.0.9:80, endpoints: [10.0.0.1:80]}
  - {name: shop, address: 10.96.0.1:80, endpoints: [10.0.0.1:80], policy: x}`,
			[]string{"web 10.96.0.9:80 10.0.0.1:80 least_connections"},
			[]string{"service shop at r.yaml:3:75, 1 problems, keeps []"},
		},
		"the same address twice in the file": {
			`services:
  - {name: web, address: 10.96.0.1:80, endpoints: [10.0.0.8:80]}
  - {name: db, address: 10.96.0.1:80, endpoints: [10.0.0.9:80]}`,
			[]string{"web 10.96.0.1:80 10.0.0.8:80 least_connections", oldDB},
			[]string{"service db at r.yaml:3:25, 1 problems, keeps [db]"},
		},
		"removed, and no longer there": {
			`services: [{name: db, address: 10.96.0.2:80, endpoints: [10.0.0.2:80], policy: x}]`,
			[]string{oldDB}, []string{"service db at r.yaml:1:80, 1 problems, keeps [db]"},
		},
		"nobody knows which one it is": {
			// It might be any that is missing.
			`services:
  - {name: db, address: 10.96.0.2:80, endpoints: [10.0.0.9:80]}
  - {name: weeb, address: 10.96.0.1, endpoints: [10.0.0.1:80]}`,
			[]string{"db 10.96.0.2:80 10.0.0.9:80 least_connections", oldWeb, oldBare},
			[]string{"service weeb at r.yaml:3:27, 1 problems, keeps [web 10.96.0.3:80]"},
		},
		"no mapping": {
			`services: [10.96.0.1:80=10.0.0.1:80]`,
			[]string{oldWeb, oldDB, oldBare},
			[]string{"service services[0] at r.yaml:1:12, 1 problems, keeps [web db 10.96.0.3:80]"},
		},
		"only the source is refused": {
			`services:
  - {name: web, address: 10.96.0.1:80, discover: {dns: {name: web}}, policy: random}
  - {name: db, address: 10.96.0.2:80, endpoints: [db:5432], policy: random}`,
			[]string{"web 10.96.0.1:80 10.0.0.1:80 random", "db 10.96.0.2:80 10.0.0.2:80 random"},
			[]string{"source web at r.yaml:2:51, 1 problems, keeps [web]", "source db at r.yaml:3:51, 1 problems, keeps [db]"},
		},
		"the source that it had is not for its new path": {
			`services: [{name: web, address: 10.96.0.1:80, path: pass, discover: {file: x}}]`,
			[]string{oldWeb}, []string{"service web at r.yaml:1:59, 2 problems, keeps [web]"},
		},
		"nothing is left": {`services: []`, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			last := parsed(t, before)
			got, refused, err := ParsePartial("r.yaml", []byte(c.text), last, nil)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, summary(got)); diff != "" {
				t.Errorf("services (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(c.refused, brief(refused)); diff != "" {
				t.Errorf("refused (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(parsed(t, before), last, equalAddrs); diff != "" {
				t.Errorf("the last one was changed (-want +got):\n%s", diff)
			}
		})
	}
}

// What flags said is no service of the file that stays.
func TestLoadPartialWithFlags(t *testing.T) {
	last := parsed(t, before)
	last.Services = append(last.Services, service("10.96.0.9:80", "127.0.0.1:8081", 1))
	last.Said("services[3]", "--service")
	flags := parsed(t, "deny: [10.0.0.0/8]")
	flags.Said("deny[0]", "--deny")
	if _, _, err := ParsePartial("r.yaml", nil, flags, nil); err != nil {
		t.Errorf("an empty file takes nothing away where flags are all: %v", err)
	}
	c, refused, err := ParsePartial("r.yaml", []byte("services: [x]"), last, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{oldWeb, oldDB, oldBare}, summary(c)); diff != "" || len(refused) != 1 {
		t.Errorf("%v (-want +got):\n%s", refused, diff)
	}
}

// What is wrong outside the services is nobody's own.
func TestLoadPartialNothing(t *testing.T) {
	for text, want := range map[string]string{
		"services: [":                         "r.yaml:1:11: not YAML: ",
		"servces: []":                         "r.yaml:1:1: servces: unknown key, did you mean services?",
		"services: 5":                         "r.yaml:1:11: services: this is a number: want a list",
		"relay: {attempts: 0}\nservices: [x]": "r.yaml:1:19: relay.attempts: \"0\": want a number from 1 to 8\nr.yaml:2:12: services[0]: this is text",
		"deny: [x]":                           "r.yaml:1:8: deny[0]: ",
		"":                                    "r.yaml:1:1: the file is empty",
		"# soon\n---\n":                       "r.yaml:1:1: the file is empty",
	} {
		c, refused, err := ParsePartial("r.yaml", []byte(text), parsed(t, before), nil)
		if err == nil || !strings.HasPrefix(err.Error(), want) || c != nil || refused != nil {
			t.Errorf("%q: %v, %v, %v, want %s", text, c, refused, err, want)
		}
	}
	if _, _, err := LoadPartial(filepath.Join(t.TempDir(), "absent"), parsed(t, before)); err == nil {
		t.Error("a file that is not there is taken")
	}
}

// The way to the API server is a source of its own.
func TestLoadPartialKubernetes(t *testing.T) {
	last := parsed(t, "kubernetes: {on_demand: true, server: 'https://10.0.0.1'}")
	file := filepath.Join(t.TempDir(), "p.yaml")
	text := "kubernetes: {on_demand: false, server: x}\nzone: a\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, refused, err := LoadPartial(file, last)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(last.Kubernetes, c.Kubernetes); diff != "" || c.Zone != "a" {
		t.Errorf("zone %q, and of Kubernetes (-want +got):\n%s", c.Zone, diff)
	}
	want := []Refused{{
		Name: "kubernetes", Source: true, Where: file + ":1:40",
		Text: file + `:1:40: kubernetes.server: "x": want a URL such as https://10.0.0.1:6443`,
	}}
	if diff := cmp.Diff(want, refused); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// A service that stays is as it was in all: what the sections say now is not for
// it, however often it is refused.
func TestKeptIsAsItWas(t *testing.T) {
	last := parsed(t, "path: direct\non_failure: closed\nhealth: {failures: 7}\n"+before[1:])
	was := last.Effective(&last.Services[0])
	now := last
	for range 3 {
		text := "path: relay\nhealth: {failures: 1}\nservices: [{name: web, address: 10.96.0.1:80, endpoints: [10.0.0.9:80], policy: x}]"
		var err error
		if now, _, err = ParsePartial("r.yaml", []byte(text), now, nil); err != nil {
			t.Fatal(err)
		}
		s := now.Effective(&now.Services[0])
		if diff := cmp.Diff(was, s, equalAddrs); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if got, want := now.Where("services[0].address"), "p.yaml:5:26 (as it was)"; got != want {
			t.Errorf("it is at %s, want %s", got, want)
		}
	}
	// And once it is right, it is what the file says.
	text := "services: [{name: web, address: 10.96.0.1:80, endpoints: [10.0.0.1:80]}]"
	c, refused, err := ParsePartial("r.yaml", []byte(text), now, nil)
	if err != nil || len(refused) > 0 {
		t.Fatal(refused, err)
	}
	if path, _ := c.PathOf(&c.Services[0]); path.String() != "relay" || c.HealthOf(&c.Services[0]).Failures != 3 {
		t.Errorf("path %s, %+v", path, c.HealthOf(&c.Services[0]))
	}
	if got, want := c.Where("services[0].address"), "r.yaml:1:33"; got != want {
		t.Errorf("it is at %s, want %s", got, want)
	}
}

// What is said of a service that stays, and why it is on its path, is what the user said
// of it, and not what it came to.
func TestKeptIsAsSaid(t *testing.T) {
	const services = "services:\n  - {name: a, address: 10.96.0.1:80, endpoints: [10.0.0.1:80]}\n" +
		"  - {name: b, address: 10.96.0.2:80, path: auto, endpoints: [10.0.0.1:80]}\n" +
		"  - {name: c, address: 10.96.0.3:80, path: pass}\n"
	refused := strings.ReplaceAll(services, "{name", "{polcy: x, name")
	for _, first := range []string{services, "path: relay\n" + services, "path: auto\n" + services, "path: direct\n" + services} {
		last := parsed(t, first)
		want := told(last)
		for i := range want {
			want[i] = strings.ReplaceAll(want[i], ")", " (as it was))")
		}
		now := last
		for _, path := range []string{"direct", "relay", "auto"} {
			var err error
			if now, _, err = ParsePartial("r.yaml", []byte("path: "+path+"\n"+refused), now, nil); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, told(now)); diff != "" {
				t.Errorf("%s\nrefused, on path: %s (-want +got):\n%s", first, path, diff)
			}
			if again, _, err := ParsePartial("r.yaml", []byte("path: "+path+"\n"+refused), now, nil); err != nil || !again.Diff(now).Empty() {
				t.Errorf("the same again: %v, %+v", err, again.Diff(now))
			}
		}
		// Once they are right, nothing is left of it.
		now, _, err := ParsePartial("p.yaml", []byte(first), now, nil)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(told(last), told(now)); diff != "" {
			t.Errorf("%s\ntaken again (-want +got):\n%s", first, diff)
		}
	}
}

// told are lines of what is said of the paths of services.
func told(c *Config) []string {
	var all []string
	for i := range c.Services {
		s := &c.Services[i]
		path, _ := c.PathOf(s)
		all = append(all, fmt.Sprintf("%s: %s, asked %s", s.Name, path, c.Asked(s)))
		for _, o := range c.Why(i, s) {
			line := fmt.Sprintf("%s: not %s: %s", o.Option, o.Path, o.Text)
			if o.Where != "" {
				line += " (" + o.Where + ")"
			}
			all = append(all, line)
		}
	}
	return all
}

// FuzzLoadPartial holds that whatever comes, what is made of it is valid, what is
// right and in nobody's way is taken, and nobody is lost who is not told of.
func FuzzLoadPartial(f *testing.F) {
	for _, pattern := range []string{"*.good.yaml", "*.bad.yaml"} {
		for _, file := range glob(f, pattern) {
			_, data := wanted(read(f, file))
			f.Add([]byte(before), data)
			f.Add(data, []byte(before))
		}
	}
	f.Fuzz(checkPartial)
}

// TestLoadPartialRandom is the same for files that are nearly right, of services
// that get in each other's way.
func TestLoadPartialRandom(t *testing.T) {
	t.Run("without flags", func(t *testing.T) { checkRandom(t, nil) })
	for _, path := range []PathChoice{"", PathDirect, PathAuto} {
		t.Run("with flags, path "+string(path), func(t *testing.T) { checkRandom(t, flagsOf(path, "10.96.0.4:80")) })
	}
}

func checkRandom(t *testing.T, flags Flags) {
	r := rand.New(rand.NewPCG(1, 2))
	one := func(all ...string) string { return all[r.IntN(len(all))] }
	file := func() []byte {
		var b strings.Builder
		fmt.Fprintf(&b, "path: %s\nservices:\n", one("relay", "direct", "auto"))
		for range r.IntN(5) {
			name, addr := one("a", "b", "c", "d"), one("10.96.0.1", "10.96.0.2", "10.96.0.3", "10.96.0.4")
			what := one("endpoints: [10.0.0.1:80]", "endpoints: [10.0.0.2:80, 10.0.0.1:80]", "discover: {file: /a.json}",
				"endpoints: ['[2001:db8::1]:80']", "endpoints: [x]", "discover: {}", "path: pass")
			also := one("", "", "", ", attempts: 2", ", policy: x", ", policy: maglev", ", health: {panic: 1}", ", address: 10.96.0.1:80")
			switch r.IntN(10) {
			case 0:
				fmt.Fprintf(&b, "  - {address: %s:80, %s%s}\n", addr, what, also)
			case 1:
				fmt.Fprintf(&b, "  - {name: %s, address: x, %s%s}\n", name, what, also)
			default:
				fmt.Fprintf(&b, "  - {name: %s, address: %s:80, %s%s}\n", name, addr, what, also)
			}
		}
		return []byte(b.String())
	}
	first := []byte(before)
	for range 400 {
		second := file()
		checkPartialWith(t, flags, first, second)
		if t.Failed() {
			t.Fatalf("first:\n%s\nsecond:\n%s", first, second)
		}
		if _, err := flags.Parse("", second); err == nil {
			first = second
		}
	}
}

func checkPartial(t *testing.T, first, second []byte) { checkPartialWith(t, nil, first, second) }

func checkPartialWith(t *testing.T, flags Flags, first, second []byte) {
	last, err := flags.Parse("first.yaml", first)
	if err != nil {
		return
	}
	c, refused, err := flags.ParsePartial("second.yaml", second, last, nil)
	whole, wholeErr := flags.Parse("second.yaml", second)
	if err != nil {
		if d, _ := parseDraft("", second, maxSize, nil); d != nil && d.empty {
			return
		}
		if wholeErr == nil || strings.Contains(err.Error(), "does not go with") {
			t.Errorf("all is refused: %v", err)
		}
		return
	}
	if err := c.Validate(); err != nil {
		t.Errorf("not valid: %v", err)
	}
	if wholeErr == nil {
		if diff := cmp.Diff(whole, c, equalAddrs, emptyIsNil); diff != "" || len(refused) > 0 {
			t.Errorf("a right file, and %v is refused (-want +got):\n%s", refused, diff)
		}
		return
	}
	if len(refused) == 0 {
		t.Errorf("nothing is refused of a file with problems: %v", wholeErr)
	}
	for _, r := range refused {
		if r.Name == "" || r.Text == "" || !strings.HasPrefix(r.Where, "second.yaml:") {
			t.Errorf("refused: %+v", r)
		}
		for _, name := range r.Kept {
			if !slices.ContainsFunc(c.Services, func(s Service) bool { return s.Name == name }) {
				t.Errorf("%s is said to be kept, and is not there", name)
			}
		}
	}
	checkJSON(t, c)
	// The same again changes nothing.
	again, _, err := flags.ParsePartial("second.yaml", second, c, nil)
	if err != nil {
		t.Errorf("the second time: %v", err)
		return
	}
	if d := again.Diff(c); !d.Empty() {
		t.Errorf("the second time it is another: %+v\nrefused %+v", d, refused)
	}
}

// Many refusals do not take long.
func TestLoadPartialMany(t *testing.T) {
	const n = 500
	var text strings.Builder
	text.WriteString("services:\n")
	for i := range n {
		// Each moves to where the one before is, and the first is refused.
		policy := "random"
		if i == 0 {
			policy = "x"
		}
		a := netip.AddrFrom4([4]byte{10, 1, byte((i + n - 1) % n >> 8), byte((i + n - 1) % n)})
		fmt.Fprintf(&text, "  - {name: s%d, address: %s:80, endpoints: [10.0.0.1:80], policy: %s}\n", i, a, policy)
	}
	last := Default()
	for i := range n {
		s := service(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 80).String(), "10.0.0.1:80", 1)
		s.Name = fmt.Sprintf("s%d", i)
		last.Services = append(last.Services, s)
	}
	c, refused, err := ParsePartial("r.yaml", []byte(text.String()), &last, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Services) != n || len(refused) != n {
		t.Errorf("%d services, %d refused, want %d: each is in the next one's way", len(c.Services), len(refused), n)
	}
}
