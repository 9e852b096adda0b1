// Package route maps the original destination of a captured connection to the
// service that it belongs to.
package route
