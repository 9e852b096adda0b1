// Package testutil holds the fixtures that Pillion's tests share: network
// namespaces, cgroups, capability limits, leak checks, and the rules about
// when a test may skip.
//
// A fixture is made for one test and removed by its clean-up. What it names is
// unique, and what it ends it ends by id, so two test runs on one machine do
// not meet.
package testutil
