package config

import (
	"testing"
)

func TestWhere(t *testing.T) {
	c := parsed(t, `deny: [10.0.0.0/8:25,
  192.0.2.1]
exclude:
  - 198.51.100.0/24
services:
  - name: web
    address: 10.96.0.1:80
    endpoints: [10.0.0.1:80, "[2001:db8::1]:80"]
    health: {panic: 1}
  - {address: 10.96.0.2:80, discover: {dns: {name: a, port: 1}}, attempts: 2}
relay:
  attempts: 2
`)
	for path, want := range map[string]string{
		"deny":                             "p.yaml:1:1",
		"deny[0]":                          "p.yaml:1:8",
		"deny[1]":                          "p.yaml:2:3",
		"deny[2]":                          "",
		"exclude[0]":                       "p.yaml:4:5",
		"services":                         "p.yaml:5:1",
		"services[0]":                      "p.yaml:6:5",
		"services[0].name":                 "p.yaml:6:11",
		"services[0].endpoints":            "p.yaml:8:5",
		"services[0].endpoints[0]":         "", // nobody asks for it
		"services[0].endpoints[1].address": "p.yaml:8:30",
		"services[0].health.panic":         "p.yaml:9:21",
		"services[0].path":                 "",
		"services[1]":                      "p.yaml:10:5",
		"services[1].name":                 "",
		"services[1].discover.dns.name":    "p.yaml:10:52",
		"services[1].attempts":             "p.yaml:10:76",
		"services[2]":                      "",
		"services[-1]":                     "",
		"services[x]":                      "",
		"relay.attempts":                   "p.yaml:12:13",
		"path":                             "",
		"":                                 "",
	} {
		if got := c.Where(path); got != want {
			t.Errorf("%q: %q, want %q", path, got, want)
		}
	}
	// What comes from a flag is in no file.
	c.Services = append(c.Services, service("10.96.0.3:80", "127.0.0.1:8081", 1))
	if got := c.Where("services[2].address"); got != "" {
		t.Errorf("a service of no file is at %s", got)
	}
	c.Said("services[2]", "--service")
	c.Said("deny[2]", "--deny")
	c.Said("deny[0]", "--deny")
	for path, want := range map[string]string{
		"services[2]": "--service", "services[1]": "p.yaml:10:5", "deny[2]": "--deny", "deny[1]": "p.yaml:2:3", "deny[0]": "--deny",
	} {
		if got := c.Where(path); got != want {
			t.Errorf("with flags, %s: %q, want %q", path, got, want)
		}
	}
	if got := new(Default()).Where("path"); got != "" {
		t.Errorf("a default is at %s", got)
	}
}
