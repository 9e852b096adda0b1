// Package dns finds endpoints by their names: the addresses of a name, or what its
// SRV records lead to. It asks the name servers itself, since the standard
// library does not tell how long an answer holds.
//
//   - source.go: when is asked, and what is told
//   - lookup.go: a name to endpoints, by search list, families and SRV records
//   - client.go: one question to the servers, by UDP and TCP
//   - message.go: what goes over the wire
//   - resolvconf.go: resolv.conf(5)
package dns
