// Package peers runs the proxies that Pillion is held against: where their
// programs are, and how each is configured best for carrying TCP.
package peers
