// Package balancetest says what every policy promises, as a table of cases with the
// shares that endpoints are to get. The tests of package balance run it against
// the pick in Go, those of the kernel side against the one in C, which is to be
// the same pick for the same seed.
package balancetest
