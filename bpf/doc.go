// Package bpf holds the kernel side: C programs, and the objects and bindings
// that bpf2go makes of them. Three programs share one set of maps:
//
//   - connect: connect(2), bind(2) and getpeername(2) of sockets in scope
//   - lookup: packets for our slots, to the handler or nowhere
//   - sockops: the life of a socket, admission, and what it did
//
// include/decide.h decides on plain values, the entries gather and apply.
// include/abi.h is the contract with the process. The objects serve every
// little-endian architecture: they read no kernel structure.
package bpf
