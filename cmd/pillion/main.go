// Command pillion redirects an application's connections to a handler beside
// it, balances them over endpoints, and records every one.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// Exit codes, those of sysexits.h where there is one.
const (
	exitFailed      = 1
	exitUsage       = 64 // EX_USAGE: flags or configuration
	exitUnsupported = 69 // EX_UNAVAILABLE: kernel or privilege missing
	exitCut         = 75 // EX_TEMPFAIL: run ended connections at the end of its drain
)

// exitError ends the process with a code. Its error may be nil: then there is
// nothing to say.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// usage marks an error as the user's.
func usage(err error) error {
	if err == nil {
		return nil
	}
	return &exitError{code: exitUsage, err: err}
}

// unprivileged gives err the exit code of a privilege that is missing, if that is what
// it means.
func unprivileged(err error) error {
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	return &exitError{code: exitUnsupported, err: fmt.Errorf("%w: run as root", err)}
}

func main() { os.Exit(run(os.Args[1:])) }

// run returns the exit code.
func run(args []string) int {
	left, err := survive()
	if err != nil {
		fmt.Fprintf(os.Stderr, "pillion: %v\n", err)
		return exitFailed
	}
	cmd := newRoot(left)
	cmd.SetArgs(args)
	err = cmd.ExecuteContext(context.Background())
	if err == nil {
		return 0
	}
	exit, ok := errors.AsType[*exitError](err)
	if !ok {
		exit = &exitError{code: exitFailed, err: err}
	}
	if exit.err != nil {
		fmt.Fprintf(os.Stderr, "pillion: %v\n", exit.err)
	}
	return exit.code
}
