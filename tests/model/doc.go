// Package model holds Pillion to plain TCP: two peers follow random scripts of
// writes, reads, half-closes, closes and resets over a direct and over a
// redirected connection, and what their system calls return must be the same.
// It also holds thousands of connections at once while endpoints come and go.
//
// docs/model.md says what plain TCP leaves open, and how a script is replayed.
package model
