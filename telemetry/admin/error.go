package admin

import (
	"errors"
	"fmt"
	"net/http"
)

var (
	// ErrInUse means that another process listens on the socket.
	ErrInUse = errors.New("socket is in use")
	// ErrNotRunning means that nobody listens on the socket.
	ErrNotRunning = errors.New("no instance is running")
)

// Error is an answer of the server that is none. A function of [API] may return
// one to choose the status code; other errors are the server's fault.
type Error struct {
	// Code is an HTTP status code.
	Code    int    `json:"-"`
	Message string `json:"error"`
}

// Error implements error.
func (e *Error) Error() string { return e.Message }

func badRequest(format string, args ...any) error {
	return &Error{Code: http.StatusBadRequest, Message: fmt.Sprintf(format, args...)}
}

func notFound(format string, args ...any) error {
	return &Error{Code: http.StatusNotFound, Message: fmt.Sprintf(format, args...)}
}

// asError returns the answer for err.
func asError(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return &Error{Code: e.Code, Message: err.Error()}
	}
	return &Error{Code: http.StatusInternalServerError, Message: err.Error()}
}
