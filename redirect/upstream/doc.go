// Package upstream knows the clusters: sets of endpoints that the handler
// dials, with the load and the health of each.
//
// A [Snapshot] is immutable and is replaced whole by [Build]. The load and the
// health of an endpoint are not part of it: they are carried over from one
// snapshot to the next for as long as the address stays in its cluster, so a
// connection may begin under one snapshot and end under another.
//
// How an endpoint is picked is package balance's matter, and when one is left out
// package health's.
package upstream
