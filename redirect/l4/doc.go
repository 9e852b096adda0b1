// Package l4 relays bytes between captured connections and endpoints.
//
// A [Relay] is a few workers, each an operating-system thread with an event
// loop of its own over raw non-blocking sockets. A pair of goroutines per
// connection was rejected: it costs a third more per round trip, and the
// runtime's poller cannot tell that a connection which is not being read has
// died.
//
// Small messages are copied, bulk goes through pooled pipes by splice(2). Each
// direction ends by itself: an end of file is passed on as one, a reset as a
// reset, and a reader that does not read stops the writer.
package l4
