package config

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// flagsOf are --path, if it is not empty, and a --service for each address.
func flagsOf(path PathChoice, addrs ...string) Flags {
	return func(c *Config) {
		for _, a := range addrs {
			c.Services = append(c.Services, service(a, "127.0.0.1:8081", 1))
			c.Said(index("services", len(c.Services)-1), "--service")
		}
		if path != "" {
			c.Path = path
			c.Said("path", "--path")
		}
	}
}

const flagged = "10.96.0.9:80 10.96.0.9:80 127.0.0.1:8081 least_connections"

// A file is judged with the flags on top, and what does not go with them is told of the
// service in it that it is of.
func TestPartialWithFlags(t *testing.T) {
	const web = "path: relay\nservices:\n  - {name: web, address: 10.96.0.1:80, endpoints: [10.0.0.1:80]}\n"
	for name, c := range map[string]struct {
		path    PathChoice
		text    string
		want    []string // before what the flag says
		refused []string // the text of each
		kept    string
	}{
		"right": {PathDirect, web, []string{oldWeb}, nil, ""},
		"a new one cannot be on the path": {
			PathDirect, web + "  - {name: c, address: 10.96.0.3:80, endpoints: [10.0.0.3:80], attempts: 3}\n", []string{oldWeb},
			[]string{"r.yaml:4:74: services[1].attempts: 3 attempts need path: relay, direct is the path of all services (--path)"}, "",
		},
		"one that was there cannot": {
			PathDirect, strings.Replace(web, "}", ", attempts: 3, policy: random}", 1), []string{oldWeb},
			[]string{"r.yaml:3:76: services[0].attempts: 3 attempts need path: relay, direct is the path of all services (--path)"}, "web",
		},
		"one that the file's own path would forbid": {
			PathAuto, "path: direct\nservices: [{name: web, address: 10.96.0.1:80, endpoints: [10.0.0.1:80], attempts: 3}]", []string{oldWeb}, nil, "",
		},
		"a new one at the address of a flag's": {
			"", web + "  - {name: x, address: 10.96.0.9:80, endpoints: [10.0.0.3:80]}\n", []string{oldWeb},
			[]string{"r.yaml:4:24: services[1].address: 10.96.0.9:80 is the address of service \"10.96.0.9:80\" already (--service 10.96.0.9:80)"}, "",
		},
		"one without a name there": {
			"", web + "  - {address: 10.96.0.9:80, endpoints: [10.0.0.3:80]}\n", []string{oldWeb},
			[]string{"r.yaml:4:15: services[1].address: 10.96.0.9:80 is the address of service \"10.96.0.9:80\" already (--service 10.96.0.9:80)"}, "",
		},
		"one that moves there": {
			// It stays, and is in the way of who wants its own address.
			"", "services:\n  - {name: web, address: 10.96.0.9:80, endpoints: [10.0.0.1:80]}\n  - {name: y, address: 10.96.0.1:80, endpoints: [10.0.0.1:80]}\n",
			[]string{oldWeb},
			[]string{
				"r.yaml:2:26: services[0].address: 10.96.0.9:80 is the address of service \"10.96.0.9:80\" already (--service 10.96.0.9:80)",
				"r.yaml:3:24: services[1].address: 10.96.0.1:80 is still that of a service that stays as it was, since its change is refused (line 2)",
			}, "web",
		},
		"one of the name of a flag's": {
			"", web + "  - {name: '10.96.0.9:80', address: 10.96.0.3:80, endpoints: [10.0.0.3:80]}\n", []string{oldWeb},
			[]string{"r.yaml:4:12: services[1].name: \"10.96.0.9:80\" is the name of another service (--service 10.96.0.9:80)"}, "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			flags := flagsOf(c.path, "10.96.0.9:80")
			last, err := flags.Parse("p.yaml", []byte(web))
			if err != nil {
				t.Fatal(err)
			}
			got, refused, err := flags.ParsePartial("r.yaml", []byte(c.text), last, nil)
			if err != nil {
				t.Fatal(err)
			}
			var texts []string
			kept := ""
			for _, r := range refused {
				texts = append(texts, r.Text)
				kept += strings.Join(r.Kept, " ")
			}
			if diff := cmp.Diff(c.refused, texts); diff != "" || kept != c.kept {
				t.Errorf("kept %q, want %q; refused (-want +got):\n%s", kept, c.kept, diff)
			}
			if diff := cmp.Diff(append(c.want, flagged), summary(got)); diff != "" {
				t.Errorf("services (-want +got):\n%s", diff)
			}
			if got, want := got.Where(index("services", len(c.want))), "--service"; got != want {
				t.Errorf("the last one is at %q, want %q", got, want)
			}
			// A start takes what a reload takes, and tells the rest in the same words.
			_, err = flags.Parse("r.yaml", []byte(c.text))
			if err == nil != (c.refused == nil) || err != nil && !strings.HasPrefix(err.Error(), c.refused[0]) {
				t.Errorf("a start says %v, a reload %q", err, c.refused)
			}
		})
	}
}

// What is wrong with the flags themselves is in no file; what of the file does not go
// with a service of theirs is no service's of the file.
func TestFlagProblems(t *testing.T) {
	for name, c := range map[string]struct {
		flags Flags
		file  string
		text  string
		want  string
	}{
		"alone, the path": {flagsOf("http"), "", "", `--path: "http": want relay, direct, pass or auto`},
		"the path over a file's": {
			flagsOf("http"), "p.yaml", "path: relay", `--path: "http": want relay, direct, pass or auto`,
		},
		"the path, and the file's": {
			flagsOf("http"), "p.yaml", "path: drect\nzone: [a, b]",
			`p.yaml:1:7: path: "drect": did you mean direct?` + "\np.yaml:2:1: zone: this is a list: want text",
		},
		"a service": {
			flagsOf("", "127.0.0.1:80"), "p.yaml", "zone: a",
			"--service 127.0.0.1:80: 127.0.0.1:80 is a loopback address, which is never captured: want the address that applications connect to",
		},
		"twice": {
			flagsOf("", "10.96.0.9:80", "10.96.0.9:80"), "p.yaml", "services: [{address: 10.96.0.1:80, endpoints: [10.0.0.1:80]}]",
			`--service 10.96.0.9:80: 10.96.0.9:80 is the address of service "10.96.0.9:80" already (--service 10.96.0.9:80)`,
		},
		"a path of the file": {
			flagsOf("", "10.96.0.9:80"), "p.yaml", "zone: a\npath: pass",
			"p.yaml:2:7: --service 10.96.0.9:80: endpoints need path: direct, pass is the path of all services",
		},
		"a path of theirs": {
			flagsOf("pass", "10.96.0.9:80"), "p.yaml", "zone: a\npath: relay",
			"--service 10.96.0.9:80: endpoints need path: direct, pass is the path of all services (--path)",
		},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := c.flags.Parse(c.file, []byte(c.text)); err == nil || err.Error() != c.want {
				t.Errorf("%v\nwant: %s", err, c.want)
			}
			if got, refused, err := c.flags.ParsePartial(c.file, []byte(c.text), new(Default()), nil); err == nil || err.Error() != c.want || got != nil {
				t.Errorf("a reload: %v, refused %v\nwant: %s", err, refused, c.want)
			}
		})
	}
}

// Where there is not room for all, it is the file's service that goes.
func TestFlagsRoom(t *testing.T) {
	flags := flagsOf("", "10.96.0.9:80")
	var text strings.Builder
	text.WriteString("services:\n")
	for i := range maxRelayAddrs {
		a := netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})
		text.WriteString("  - {address: " + a.String() + ":80, endpoints: [10.0.0.1:80]}\n")
	}
	c, refused, err := flags.ParsePartial("r.yaml", []byte(text.String()), new(Default()), nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Services) != maxRelayAddrs || len(refused) != 1 || refused[0].Where != "r.yaml:4097:15" {
		t.Errorf("%d services, refused %v", len(c.Services), refused)
	}
}
