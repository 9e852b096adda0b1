package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/redirect/upstream/discover/dns"
)

// TestNamesAsSources: a name that the configuration takes makes a source, or validate
// would promise what a start refuses.
func TestNamesAsSources(t *testing.T) {
	label := strings.Repeat("a", 49) + "."
	long := strings.Repeat(label, 5)[:249] + ".com" // 253 bytes
	for name, want := range map[string]bool{
		long: true, long + ".": true, "a" + long: false, "a" + long + ".": false,
		"_http._tcp.web": true, "-a": false, "a-": false, "a..b": false, ".": false, "é": false, "10.0.0.1": false, "1.2.3": true,
	} {
		c, err := config.Parse("x", fmt.Appendf(nil, "services: [{address: 10.96.0.1:80, discover: {dns: {name: %q, port: 80}}}]", name))
		if (err == nil) != want {
			t.Errorf("%q (%d bytes): %v", name, len(name), err)
		}
		if err != nil {
			continue
		}
		s := &c.Services[0]
		if _, err := dns.New(dnsOptions(s.Discover.DNS, s.Addr.Addr())); err != nil {
			t.Errorf("%q: taken, and then %v", name, err)
		}
	}
}
