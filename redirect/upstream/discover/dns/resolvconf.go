package dns

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of resolv.conf(5).
const (
	maxServers  = 3
	maxNdots    = 15
	maxTimeout  = 30 * time.Second
	maxAttempts = 5

	dnsPort     = 53
	maxConfSize = 64 << 10
)

// resolver is how names are looked up: the contents of a resolv.conf(5).
type resolver struct {
	servers []netip.AddrPort
	search  []string // without the dot at the end; "." is left out
	ndots   int
	timeout time.Duration
	// attempts is how often all servers are asked.
	attempts int
	rotate   bool // among the servers
	tcp      bool // from the first
	noAAAA   bool
}

// resolver reads the file, and puts what o says in its place.
func (o Options) resolver() (*resolver, error) {
	path := o.ResolvConf
	if path == "" {
		path = defaultResolvConf
	}
	text, err := readConf(path)
	if errors.Is(err, os.ErrNotExist) && (o.ResolvConf == "" || len(o.Servers) > 0) {
		err = nil
	}
	if err != nil {
		return nil, fmt.Errorf("read resolver's configuration: %w", err)
	}
	host, err := os.Hostname()
	if err != nil {
		host = "" // it is needed for a default only
	}
	r := parseConf(text, host)
	if len(o.Servers) > 0 {
		r.servers = o.Servers
	}
	if o.Timeout > 0 {
		r.timeout = o.Timeout
	}
	if o.Attempts > 0 {
		r.attempts = o.Attempts
	}
	return r, nil
}

func readConf(path string) (string, error) {
	// Not blocking: it may be an application's, which could put a pipe there.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if info.Mode()&os.ModeNamedPipe != 0 {
		return "", fmt.Errorf("%s is a pipe", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxConfSize))
	return string(b), err
}

// parseConf reads a resolv.conf(5). As there, what makes no sense is passed over.
func parseConf(text, hostname string) *resolver {
	r := &resolver{ndots: 1, timeout: 5 * time.Second, attempts: 2}
	searched := false
	for line := range strings.Lines(text) {
		// A comment is a line of its own, but many write it behind.
		if i := strings.IndexAny(line, "#;"); i >= 0 {
			line = line[:i]
		}
		words := strings.Fields(line)
		if len(words) < 2 {
			continue
		}
		switch words[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(words[1]); err == nil && len(r.servers) < maxServers {
				r.servers = append(r.servers, netip.AddrPortFrom(a.Unmap(), dnsPort))
			}
		case "domain", "search": // the last one holds
			searched = true
			r.search = nil
			for _, d := range words[1:] {
				d = strings.TrimSuffix(d, ".")
				if d != "" && checkName(d) == nil {
					r.search = append(r.search, d)
				}
			}
			if words[0] == "domain" && len(r.search) > 1 {
				r.search = r.search[:1]
			}
		case "options":
			for _, o := range words[1:] {
				r.option(o)
			}
		default:
		}
	}
	if len(r.servers) == 0 {
		r.servers = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:53")}
	}
	if _, domain, ok := strings.Cut(hostname, "."); ok && !searched && checkName(domain) == nil {
		r.search = []string{strings.TrimSuffix(domain, ".")}
	}
	return r
}

func (r *resolver) option(o string) {
	name, value, _ := strings.Cut(o, ":")
	n, err := strconv.Atoi(value)
	isNumber := err == nil && n >= 0
	switch {
	case name == "ndots" && isNumber:
		r.ndots = min(n, maxNdots)
	case name == "timeout" && isNumber:
		r.timeout = min(max(time.Duration(min(n, 1000))*time.Second, time.Second), maxTimeout)
	case name == "attempts" && isNumber:
		r.attempts = min(max(n, 1), maxAttempts)
	case name == "rotate":
		r.rotate = true
	case name == "use-vc":
		r.tcp = true
	case name == "no-aaaa":
		r.noAAAA = true
	default:
	}
}

// candidates returns the absolute names that name may stand for, in the order in
// which they are tried. Each ends with a dot.
func (r *resolver) candidates(name string) []string {
	if strings.HasSuffix(name, ".") {
		return []string{name}
	}
	var found []string
	for _, domain := range r.search {
		if full := name + "." + domain; len(full) <= maxName {
			found = append(found, full+".")
		}
	}
	if strings.Count(name, ".") >= r.ndots {
		return append([]string{name + "."}, found...)
	}
	return append(found, name+".")
}
