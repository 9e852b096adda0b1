// Package tests holds what is said about the tree as a whole, and below it the
// tests that see Pillion from outside: real programs on a real kernel.
package tests
