// Package flowlog writes flow records to a file, one JSON object per line. A slow
// or full disk costs lines, which are counted, and nothing else.
package flowlog
