// Package flow is the vocabulary that all of Pillion shares: where a connection
// was going, which path it took and why, how it ended, and the record of it.
// It is a leaf: it imports the standard library only.
package flow
