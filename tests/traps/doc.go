// Package traps runs what broke earlier systems of this kind against Pillion
// and against the proxies that a user could take instead. Every trap is a real
// thread; docs/traps.md is the score, which make traps writes.
package traps
