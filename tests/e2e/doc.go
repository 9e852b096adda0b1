// Package e2e holds the end-to-end tests: the real binary, real programs, a real
// kernel.
package e2e
