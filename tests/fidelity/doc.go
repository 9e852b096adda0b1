// Package fidelity holds the tests of what a connection is like once it is
// there: small applications do the same with Pillion in between and without, and
// what they see has to be the same. docs/fidelity.md lists what differs.
package fidelity
