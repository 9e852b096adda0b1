// Package kube finds the endpoints of Kubernetes Services: it reads Services and
// EndpointSlices from the API server, of those services only that somebody asks
// for, and keeps of them only what balancing needs.
//
// A [Client] knows the server. A [Ref] names a port of a service, and
// [Client.Source] tells its endpoints, by kube-proxy's rules: those that are
// ready, else those that serve while they terminate; of these, those that the
// hints give to this zone. [Client.Demand] finds services by the addresses and
// names that the application connects to.
//
// It is not client-go, which would double the binary and the memory: an object
// is decoded into the few fields that matter. A service costs a watch of its
// slices, and each namespace one of its Services; HTTP/2 multiplexes them.
//
// The service account needs get, list and watch on services and on
// endpointslices.discovery.k8s.io; docs/discovery-kubernetes.md has the manifest.
package kube
