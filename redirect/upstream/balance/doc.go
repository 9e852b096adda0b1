// Package balance has the policies by which a cluster picks an endpoint. Each is
// a file with an [upstream.Picker] over the endpoints of one snapshot, and a
// case in [ByName]. A policy keeps no load and no health: it asks the endpoints.
package balance
