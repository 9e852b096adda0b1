// Package check asks endpoints whether they are well, before an application
// does: it connects, sends an HTTP request or runs a command, again and again,
// and reports when an endpoint goes down and when it is back.
//
// What a check finds and what package health sees of the applications' own
// dials are two opinions; the receiver of the reports joins them. An endpoint
// that was not checked yet counts as up. So does a failure that is this side's
// and no endpoint's, like a lack of descriptors: it is told and decides nothing.
package check
