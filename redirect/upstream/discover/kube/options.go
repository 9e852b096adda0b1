package kube

import (
	"net/netip"
	"time"
)

// Options says how the API server is reached, and where the application is. The
// zero value is that of a container in a cluster: the server from
// KUBERNETES_SERVICE_HOST and _PORT, token and CA from
// /var/run/secrets/kubernetes.io/serviceaccount.
//
// Files are read again when they may have changed: the token every ten seconds
// and after a refusal, CA and certificate with every new connection. Only the
// kubeconfig itself is read once.
type Options struct {
	// Kubeconfig is a file in kubectl's format, of which server, CA, token and
	// client certificate are read. Commands that make credentials are refused.
	Kubeconfig string
	// Server is the API server's URL. It, and each of the files that follow, goes
	// before what Kubeconfig says.
	Server            string
	TokenFile, CAFile string
	CertFile, KeyFile string
	// Namespace is that of names that do not say one. Empty is the kubeconfig's,
	// or the service account's, or "default".
	Namespace string
	// Node and Zone are where the application runs, for hints and for
	// internalTrafficPolicy: Local. An empty Node is NODE_NAME of the environment,
	// by which pods commonly know it; empty is unknown.
	Node, Zone string
	// ClusterDomain is what the names of services end in; empty is cluster.local.
	ClusterDomain string
	// Exempt, if set, is called with each socket before it connects, so that the
	// connections to the API server are not captured.
	Exempt func(fd int) error

	// ownHost is the ClusterIP of the API server, if it is known.
	ownHost string
	// pingAfter and pingTimeout are when a silent connection is asked whether it
	// is there, and how long it has to answer.
	pingAfter, pingTimeout time.Duration
}

// Family limits a [Ref] to endpoints of one IP family.
type Family uint8

// The families.
const (
	FamilyAny Family = iota
	FamilyIPv4
	FamilyIPv6
)

// Ref names one port of a service.
type Ref struct {
	// Namespace is as in [Options] if it is empty.
	Namespace, Name string
	// Port is the name or the number of one of the service's TCP ports. Empty is
	// its only one. Of a headless service it may also be a number that no port of
	// it has: then it is the endpoints' own.
	Port string
	// Family is FamilyAny for all endpoints of a dual-stack service.
	Family Family
}

// familyOf is the family of addresses like a.
func familyOf(a netip.Addr) Family {
	if a.Is4() {
		return FamilyIPv4
	}
	return FamilyIPv6
}
