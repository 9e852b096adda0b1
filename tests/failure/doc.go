// Package failure breaks a running Pillion in every way there is, and looks what
// becomes of new and of open connections on each path. The table of faults is
// executed, and docs/failure.md is what it says.
package failure
