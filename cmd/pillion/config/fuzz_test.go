package config

import (
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

// placed is a line of an error that names its place in the file.
var placed = regexp.MustCompile(`^fuzz\.yaml:(\d+):(\d+): .`)

// further is the last line of an error that is cut short.
var further = regexp.MustCompile(`^and \d+ more problems?$`)

// pathed is a line of an error that names the path of a value.
var pathed = regexp.MustCompile(`^[a-z_.]+(\[\d+\])?[a-z_.]*(\[\d+\])?[a-z_.]*: .`)

func FuzzParse(f *testing.F) {
	for _, pattern := range []string{"*.good.yaml", "*.bad.yaml"} {
		for _, file := range glob(f, pattern) {
			_, data := wanted(read(f, file))
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("fuzz.yaml", data)
		if err != nil {
			if c != nil {
				t.Error("an error, and a configuration too")
			}
			for _, line := range strings.Split(err.Error(), "\n") {
				checkPlace(t, data, line)
			}
			return
		}
		if err := c.Validate(); err != nil {
			t.Errorf("Validate refuses what Parse returned: %v", err)
		}
		checkJSON(t, c)
		for i, s := range c.Services {
			if again, err := parseAddrPort(s.Addr.String()); err != nil || again != s.Addr {
				t.Errorf("service %d: %s is read as %s, %v", i, s.Addr, again, err)
			}
		}
	})
}

// checkPlace checks that a line of an error names a place that is in the file,
// or just after the end of a line of it.
func checkPlace(t *testing.T, data []byte, text string) {
	m := placed.FindStringSubmatch(text)
	if m == nil {
		if !further.MatchString(text) {
			t.Errorf("no place in %q", text)
		}
		return
	}
	line, _ := strconv.Atoi(m[1])
	column, _ := strconv.Atoi(m[2])
	lines := strings.Split(strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(string(data)), "\n")
	if line < 1 || line > len(lines) || column < 1 || column > utf8.RuneCountInString(lines[line-1])+1 {
		t.Errorf("the place is not in the file: %q", text)
	}
}

func FuzzParseService(f *testing.F) {
	for _, s := range []string{
		"10.96.0.12:80=127.0.0.1:8081",
		"10.96.0.12:80=127.0.0.1:8081,192.0.2.1:80*3",
		"[2001:db8::1]:80=[2001:db8::2]:80*65535",
		"[fe80::1%eth0]:80=[fe80::1%eth0]:80",
		"web:80=db:5432", "=", "=,", "*", "10.0.0.1:80=240.0.0.1:1", "[", "[]:1=[]:1", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		s, err := ParseService(in)
		if err != nil {
			for _, line := range strings.Split(err.Error(), "\n") {
				if !strings.HasPrefix(line, "address ") && !strings.HasPrefix(line, "endpoint ") && !strings.HasPrefix(line, "no endpoints") {
					t.Errorf("the error does not say of what: %q", line)
				}
			}
			return
		}
		if !s.Addr.IsValid() || s.Addr.Addr().Is4In6() || s.Name != s.Addr.String() || len(s.Endpoints) == 0 {
			t.Errorf("%q: %+v", in, s)
		}
		for _, e := range s.Endpoints {
			if !e.Addr.IsValid() || e.Addr.Port() == 0 || e.Addr.Addr().Is4In6() || e.Weight < 1 || e.Weight > maxWeight {
				t.Errorf("%q: endpoint %+v", in, e)
			}
		}
		c := Default()
		c.Services = []Service{s}
		if err := c.Validate(); err != nil {
			for _, line := range strings.Split(err.Error(), "\n") {
				if !pathed.MatchString(line) && !further.MatchString(line) {
					t.Errorf("no path in %q", line)
				}
			}
		}
	})
}

func FuzzParseRule(f *testing.F) {
	for _, s := range []string{
		"10.0.0.0/8", "10.0.0.0/8:25", "192.0.2.1:53", "::/0", "[2001:db8::/32]:443", "[::1]:80",
		"::ffff:10.0.0.0/104", "::fffe:0:0/95", "fe80::1%eth0", "2001:db8::/32:443", "example.com:25", "[", "/", ":", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		r, err := ParseRule(in)
		if err != nil {
			if !strings.Contains(err.Error(), ": ") {
				t.Errorf("the error does not say of what: %v", err)
			}
			return
		}
		if r.Prefix != r.Prefix.Masked() || r.Prefix == (netip.Prefix{}) {
			t.Errorf("%q: %+v", in, r)
		}
		if again, err := ParseRule(r.String()); err != nil || again != r {
			t.Errorf("%q is printed as %q, which is read as %v, %v", in, r, again, err)
		}
		c := Default()
		c.Exclude = []Rule{r}
		if err := c.Validate(); err != nil {
			t.Errorf("%q: %v", in, err)
		}
		c.Deny = []Rule{r}
		if err := c.Validate(); (err != nil) != (rangeLeftAlone(r.Prefix) != "") {
			t.Errorf("%q, denied: %v", in, err)
		}
	})
}
