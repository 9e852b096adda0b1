// Package live tests what changes while Pillion runs: the configuration, what
// sources find, what health checks say. The real binary, the real kernel.
package live
