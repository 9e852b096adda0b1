// Package survive kills handlers and wants every connection to go on: `survive: crash`.
package survive
