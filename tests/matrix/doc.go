// Package matrix makes a connection in every way there is, without Pillion and
// with it, and holds what the application sees the second time to what it saw the
// first time. docs/matrix.md is what it finds.
package matrix
