// Package dns finds endpoints by their names.
package dns

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
)

// Families says which addresses are asked for.
type Families uint8

// The families.
const (
	FamiliesBoth Families = iota // A and AAAA; the set has both
	FamiliesIPv4                 // A
	FamiliesIPv6                 // AAAA
)

// Options says what is looked up, and where. The zero value of everything but
// Name and Port is what resolv.conf(5) and this package's defaults say.
type Options struct {
	// Name is looked up; with a dot at its end it is absolute, else the search
	// list applies.
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
	// options: /etc/resolv.conf. It is read before every look-up. A network
	// namespace or a container may have its own.
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
}

// Source is the endpoints that one name has.
type Source struct{ options Options }

// New returns the source that looks up what o says, or everything that is wrong
// with o.
func New(o Options) (*Source, error) { return nil, errors.ErrUnsupported }

// Run is as in [discover.Source]. Only an answer with addresses, and an SRV record
// that says that there is no service (its name is "."), are answers: a name that
// does not exist or has no addresses is an error, as a server that fails is.
func (s *Source) Run(ctx context.Context, out chan<- discover.Snapshot) error {
	return errors.ErrUnsupported
}
