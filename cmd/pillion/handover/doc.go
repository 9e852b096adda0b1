// Package handover is what two processes say to each other when one takes an
// instance over from the other: frames over a unix socket, with descriptors.
//
// The taker begins. Each line is one frame; what is after a slash may come instead.
//
//	taker   hello
//	giver   welcome / refusal
//	taker   freeze           it is prepared, and has written nothing
//	giver   state / refusal  it stands still
//	taker   have             it has everything
//	giver   commit / abort   from here on the instance is the taker's
//	giver   farewell         what may come late
//
// Until commit the giver can go on as if nothing had been: when the taker refuses,
// dies or takes too long. A taker whose giver dies before that has, from state on,
// all that there was.
package handover
