// Package balance picks endpoints. [Arrange] lays them out as a [flow.Set], once
// per change, and [Pick] reads that, once per connection, in a time that does not
// depend on how many there are. The connect hook has the same pick in C, over the
// same set (bpf/include/pick.h), so that a service is balanced alike on every
// path.
//
// A policy keeps no load and no health: it asks the [Members].
package balance
