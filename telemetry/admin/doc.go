// Package admin is the instance's interface to the command line: HTTP on a unix
// socket that only its own user may open. It has the server and the client.
//
// The routes are GET /v1/status, /v1/flows, /v1/resolve, /v1/explain, /v1/config
// and /metrics, and POST /v1/diff, whose body is a configuration, and /v1/reload,
// which alone changes anything. Answers are JSON but for /metrics; an error is
// {"error": "..."} with a status code that says whose fault it is. A parameter that a route does not have is an error, so
// that a misspelt filter never lists everything.
package admin
