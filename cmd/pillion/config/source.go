package config

import (
	"net/netip"
	"time"
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
	// Kubeconfig is the path of a file that says all of that, or empty.
	Kubeconfig string
	// Idle is how long a Service found on demand stays watched that nobody
	// connects to.
	Idle time.Duration
}
