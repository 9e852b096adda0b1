package dns

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// Families says which addresses are asked for.
type Families uint8

// The families.
const (
	FamiliesBoth Families = iota // A and AAAA; the set has both
	FamiliesIPv4                 // A
	FamiliesIPv6                 // AAAA

	familiesCount
)

// What applies where [Options] says nothing.
const (
	defaultMinTTL     = 5 * time.Second
	defaultMaxTTL     = 5 * time.Minute
	defaultResolvConf = "/etc/resolv.conf"
)

// Options says what is looked up, and where. The zero value of everything but
// Name and Port is what resolv.conf(5) and this package's defaults say.
type Options struct {
	// Name is looked up; with a dot at its end it is absolute, else the search
	// list applies. /etc/hosts is not read.
	Name string
	// SRV looks up SRV records of Name, such as _http._tcp.web.example, which
	// bring the ports, and Port must be 0. Without it A and AAAA are looked
	// up, and Port is that of every endpoint.
	SRV  bool
	Port uint16
	// Families are the addresses that are asked for.
	Families Families
	// MinTTL and MaxTTL bound how long an answer is kept: 5 s and 5 min.
	MinTTL, MaxTTL time.Duration
	// ResolvConf is the file that names the servers, the search list and the
	// options. It is read before every look-up. A network namespace or a
	// container may have its own. Empty is /etc/resolv.conf, which may be
	// missing: 127.0.0.1 is asked then.
	ResolvConf string
	// Servers are asked instead of those of the file.
	Servers []netip.AddrPort
	// Timeout is how long a server has to answer, and Attempts how often the
	// servers are asked, each in turn; 0 is what the file says, or else 5 s
	// and 2.
	Timeout  time.Duration
	Attempts int
	// Exempt is called with every socket before it is used, so that it can be
	// tagged as the handler's own. Nil is nobody.
	Exempt func(fd int) error
	// Limit, where several sources share one, bounds their questions: as many
	// are open at once as it has room for. Nil is no bound.
	Limit chan struct{}
}

// withDefaults returns o with every value filled in.
func (o Options) withDefaults() Options {
	if o.MinTTL == 0 {
		o.MinTTL = defaultMinTTL
		if o.MaxTTL != 0 {
			o.MinTTL = min(o.MinTTL, o.MaxTTL)
		}
	}
	if o.MaxTTL == 0 {
		o.MaxTTL = max(defaultMaxTTL, o.MinTTL)
	}
	return o
}

// Validate reports everything in o that makes no sense, in one error.
func (o Options) Validate() error {
	var errs []error
	if err := checkName(o.Name); err != nil {
		errs = append(errs, fmt.Errorf("name: %w", err))
	}
	switch {
	case o.SRV && o.Port != 0:
		errs = append(errs, fmt.Errorf("port %d: SRV records bring their own", o.Port))
	case !o.SRV && o.Port == 0:
		errs = append(errs, errors.New("port: want one from 1 to 65535, since addresses have none"))
	default:
	}
	if o.Families >= familiesCount {
		errs = append(errs, fmt.Errorf("families: %d is none", o.Families))
	}
	d := o.withDefaults()
	switch {
	case o.MinTTL < 0 || o.MaxTTL < 0:
		errs = append(errs, fmt.Errorf("TTL from %v to %v: want positive durations", o.MinTTL, o.MaxTTL))
	case d.MinTTL > d.MaxTTL:
		errs = append(errs, fmt.Errorf("TTL from %v to %v: the least is more than the most", d.MinTTL, d.MaxTTL))
	case d.MinTTL < 100*time.Millisecond:
		errs = append(errs, fmt.Errorf("TTL from %v: name servers are not asked more often than every 100ms", d.MinTTL))
	default:
	}
	for _, s := range o.Servers {
		if !s.IsValid() || s.Port() == 0 {
			errs = append(errs, fmt.Errorf("server %s: want ADDR:PORT", s))
		}
	}
	if o.Timeout < 0 || o.Attempts < 0 {
		errs = append(errs, fmt.Errorf("timeout %v, attempts %d: want positive ones", o.Timeout, o.Attempts))
	}
	return errors.Join(errs...)
}

// Bounds of RFC 1035.
const (
	maxName  = 253
	maxLabel = 63
)

func checkName(name string) error {
	bare := strings.TrimSuffix(name, ".")
	if bare == "" {
		return errors.New("empty")
	}
	if _, err := netip.ParseAddr(bare); err == nil {
		return fmt.Errorf("%s is an address: want it in a list of endpoints", bare)
	}
	if len(bare) > maxName {
		return fmt.Errorf("%.20s... is %d bytes long: want at most %d", bare, len(bare), maxName)
	}
	for label := range strings.SplitSeq(bare, ".") {
		if label == "" || len(label) > maxLabel {
			return fmt.Errorf("%q: want labels of 1 to %d bytes", name, maxLabel)
		}
	}
	if i := strings.IndexFunc(bare, func(r rune) bool { return !isNameRune(r) }); i >= 0 {
		return fmt.Errorf("%q: want letters, digits, hyphens and dots (an international name in its xn-- form)", name)
	}
	return nil
}

func isNameRune(r rune) bool {
	switch {
	case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_', r == '.':
		return true
	default:
		return false
	}
}
