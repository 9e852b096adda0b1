// Package metrics counts what happened, for Prometheus. The names are
// pillion_<noun>_<unit>; labels hold enums, and the addresses of endpoints, so
// that no application can make series. docs/metrics.md lists them, and a test
// writes it.
package metrics
