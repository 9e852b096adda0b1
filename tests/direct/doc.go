// Package direct holds the path direct to what it promises: live counts that are
// right after any ending, sets that are replaced and crashes that nobody notices,
// and explanations that say what then happens.
package direct
