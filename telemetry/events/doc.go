// Package events joins what the handler and the kernel side each know about a
// connection into one [flow.Record], keeps the last ones, and gives each to the
// sinks: metrics and the flow log.
package events
