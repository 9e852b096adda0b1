package config

import (
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
	"github.com/pillion-project/pillion/redirect/upstream/discover/spelling"
)

// Discover is where the endpoints of a service are found: one of its fields is
// set.
type Discover struct {
	// File is the path of a list of endpoints, in the format of Prometheus'
	// file_sd.
	File       string
	DNS        *DNS
	Kubernetes *KubernetesService
}

// DNS finds endpoints by a name.
type DNS struct {
	Name string
	Type DNSType
	// Port is that of the endpoints; 0 with DNSSRV, whose records have it.
	Port uint16
	// MinTTL and MaxTTL bound how long an answer is good for.
	MinTTL, MaxTTL time.Duration
	// Servers are asked instead of those of ResolvConf.
	Servers []netip.AddrPort
	// ResolvConf is read instead of /etc/resolv.conf, or empty.
	ResolvConf string
}

// DNSType is which records are asked for.
type DNSType string

// The values of DNSType. Where the user says nothing it is the one of the
// service's own family.
const (
	DNSA       DNSType = "A"
	DNSAAAA    DNSType = "AAAA"
	DNSAddress DNSType = "ADDRESS" // A and AAAA
	DNSSRV     DNSType = "SRV"
)

var dnsTypes = []DNSType{DNSA, DNSAAAA, DNSAddress, DNSSRV}

// KubernetesService finds endpoints in the API server, by the EndpointSlices of
// a Service.
type KubernetesService struct {
	Namespace, Name string
	// Port is the name or the number of one of the Service's ports; empty is its
	// only one.
	Port string
}

// Kubernetes is how the API server is reached. The zero value, but for Idle, is
// the way that a pod has: its service account.
type Kubernetes struct {
	// OnDemand is whether destinations that no service names are looked up: a
	// Service is watched when the application first connects to it.
	OnDemand bool
	// Server is a URL, or empty. TokenFile and CAFile are read again when they
	// change.
	Server, TokenFile, CAFile string
	// Kubeconfig is the path of a file that says what those do not, or empty.
	Kubeconfig string
	// Idle is how long a Service found on demand stays watched that nobody
	// connects to.
	Idle time.Duration
}

// ownFamily returns the records that have endpoints of the service's family.
func ownFamily(service netip.AddrPort) DNSType {
	if service.Addr().Unmap().Is4() {
		return DNSA
	}
	return DNSAAAA
}

func (d *decoder) discover(path string, n ast.Node) *Discover {
	if isNull(n) {
		return nil
	}
	s := &Discover{}
	d.mapping(path, n, []field{
		{"file", d.text(&s.File)},
		{"dns", func(path string, n ast.Node) { s.DNS = d.dns(path, n) }},
		{"kubernetes", func(path string, n ast.Node) { s.Kubernetes = d.kubernetesService(path, n) }},
	}, nil)
	return s
}

func (d *decoder) dns(path string, n ast.Node) *DNS {
	s := &DNS{MinTTL: 5 * time.Second, MaxTTL: 5 * time.Minute}
	port := 0
	d.mapping(path, n, []field{
		{"name", d.text(&s.Name)},
		{"type", func(path string, n ast.Node) { word(d, path, n, dnsTypes, &s.Type) }},
		{"port", d.number(&port, 1, maxPort)},
		{"min_ttl", d.duration(&s.MinTTL)},
		{"max_ttl", d.duration(&s.MaxTTL)},
		{"servers", func(path string, n ast.Node) {
			d.list(path, n, func(path string, n ast.Node) { s.Servers = append(s.Servers, d.server(path, n)) })
		}},
		{"resolv_conf", d.text(&s.ResolvConf)},
	}, nil)
	s.Port = uint16(port)
	return s
}

// server reads the address of a name server, whose port is 53 where none is said.
func (d *decoder) server(path string, n ast.Node) netip.AddrPort {
	if !d.scalar(path, n, "ADDR or ADDR:PORT") {
		return netip.AddrPort{}
	}
	if a, err := netip.ParseAddr(raw(n)); err == nil && (a.Zone() == "" || zone.MatchString(a.Zone())) {
		return netip.AddrPortFrom(a.Unmap(), 53)
	}
	a, err := parseAddrPort(raw(n))
	if err != nil {
		d.fail(path, n, "%v", err)
	}
	return a
}

func (d *decoder) kubernetesService(path string, n ast.Node) *KubernetesService {
	s := &KubernetesService{}
	d.mapping(path, n, []field{
		{"service", func(path string, n ast.Node) {
			if !d.scalar(path, n, "NAMESPACE/NAME") {
				return
			}
			var ok bool
			if s.Namespace, s.Name, ok = strings.Cut(raw(n), "/"); !ok {
				d.fail(path, n, "%s: want NAMESPACE/NAME, such as default/%s", spelling.Show(raw(n)), raw(n))
			}
		}},
		{"port", func(path string, n ast.Node) {
			if d.scalar(path, n, "the name or number of a port") {
				s.Port = raw(n)
			}
		}},
	}, nil)
	return s
}

func (d *decoder) kubernetes(k *Kubernetes, path string, n ast.Node) {
	d.mapping(path, n, []field{
		{"on_demand", d.boolean(&k.OnDemand)},
		{"server", d.text(&k.Server)},
		{"token_file", d.text(&k.TokenFile)},
		{"ca_file", d.text(&k.CAFile)},
		{"kubeconfig", d.text(&k.Kubeconfig)},
		{"idle", d.duration(&k.Idle)},
	}, nil)
}

// discover checks a source of endpoints.
func (k *check) discover(path string, s *Discover) {
	var said []string
	if s.File != "" {
		said = append(said, "file")
		k.text(path+".file", s.File)
		if ext := filepath.Ext(s.File); !slices.Contains([]string{".json", ".yaml", ".yml"}, ext) {
			k.add(path+".file", "%s: want a file whose name ends in .json, .yaml or .yml", spelling.Show(s.File))
		}
	}
	if s.DNS != nil {
		said = append(said, "dns")
		k.dns(path+".dns", s.DNS)
	}
	if s.Kubernetes != nil {
		said = append(said, "kubernetes")
		k.kubernetesService(path+".kubernetes", s.Kubernetes)
	}
	switch len(said) {
	case 0:
		k.add(path, "no source: want file, dns or kubernetes")
	case 1:
	default:
		k.add(path, "%s: want one of them", strings.Join(said, " and "))
	}
}

// dnsName is a name as resolvers take it. Underscores are for SRV, and are not
// unheard of elsewhere.
var dnsName = regexp.MustCompile(`^([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.?$`)

// minTTL keeps a slip of the unit from becoming a flood.
const minTTL = 100 * time.Millisecond

func (k *check) dns(path string, s *DNS) {
	switch _, err := netip.ParseAddr(s.Name); {
	case s.Name == "":
		k.add(path+".name", "missing, want the name to look up")
	case err == nil:
		k.add(path+".name", "%s is an address: want a name, or endpoints in place of discover", s.Name)
	case len(strings.TrimSuffix(s.Name, ".")) > maxName || !dnsName.MatchString(s.Name):
		k.add(path+".name", "%s is no name in DNS", spelling.Show(s.Name))
	default:
	}
	// Empty: the service has no address that could tell, and a problem of its own.
	oneWord(k, path+".type", s.Type, dnsTypes, "")
	switch srv := s.Type == DNSSRV; {
	case srv && s.Port != 0:
		k.add(path+".port", "SRV records have ports: leave it out")
	case !srv && s.Port == 0:
		k.add(path+".port", "missing, want the port of the endpoints, or type: SRV")
	default:
	}
	if s.MinTTL < minTTL {
		k.add(path+".min_ttl", "%s: want %s at least", s.MinTTL, minTTL)
	}
	if s.MaxTTL < s.MinTTL {
		k.add(path+".max_ttl", "%s is less than min_ttl, which is %s", s.MaxTTL, s.MinTTL)
	}
	for i, a := range s.Servers {
		k.addrPort(index(path+".servers", i), a)
	}
	k.text(path+".resolv_conf", s.ResolvConf)
}

// label is a name in Kubernetes, at most 63 bytes long.
var label = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func (k *check) kubernetesService(path string, s *KubernetesService) {
	switch {
	case s.Namespace == "" && s.Name == "":
		k.add(path+".service", "missing, want NAMESPACE/NAME")
	case !label.MatchString(s.Namespace) || !label.MatchString(s.Name):
		k.add(path+".service", "%s: want NAMESPACE/NAME, each of lower-case letters, digits and -", spelling.Show(s.Namespace+"/"+s.Name))
	default:
	}
	if s.Port == "" {
		return
	}
	_, number := parseNumber(s.Port, 1, maxPort)
	if !number && (len(s.Port) > 15 || !label.MatchString(s.Port) || bareNumber.MatchString(s.Port)) {
		k.add(path+".port", "%s: want the name of a port, or a number from 1 to %d", spelling.Show(s.Port), maxPort)
	}
}

func (k *check) kubernetes(s *Kubernetes) {
	if s.Server != "" {
		u, err := url.Parse(s.Server)
		if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			k.add("kubernetes.server", "%s: want a URL such as https://10.0.0.1:6443", spelling.Show(s.Server))
		}
	}
	if strings.HasPrefix(s.Server, "http:") && s.TokenFile != "" {
		k.add("kubernetes.server", "%s: the token would go over the network as it is, want https", spelling.Show(s.Server))
	}
	k.text("kubernetes.server", s.Server)
	k.text("kubernetes.token_file", s.TokenFile)
	k.text("kubernetes.ca_file", s.CAFile)
	k.text("kubernetes.kubeconfig", s.Kubeconfig)
	if s.Idle <= 0 {
		k.add("kubernetes.idle", "%s: want more than 0", s.Idle)
	}
}
