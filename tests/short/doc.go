// Package short is an end-to-end run that needs no program but pillion and the
// test itself, so that it also runs where nothing else is: in the virtual machine
// of scripts/vm-test.sh.
package short
