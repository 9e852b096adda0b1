// Package bpf holds the kernel side: C programs, and the objects and bindings
// that bpf2go makes of them. The objects share one set of maps:
//
//   - connect: connect(2) and bind(2) of sockets in scope
//   - names: getpeername(2) and getsockname(2) of them
//   - lookup: packets for our slots, to the handler or nowhere
//   - sockops: the life of a socket, admission, and what it did
//   - mirror: answers that are held back, and those that are sent
//
// include/decide.h decides on plain values, the entries gather and apply.
// include/abi.h is the contract with the process. The objects serve every
// little-endian architecture: they read no kernel structure.
package bpf
