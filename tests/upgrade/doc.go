// Package upgrade has one process after the other take an instance over while
// applications talk, and looks at every byte of theirs. It has only tests.
package upgrade
