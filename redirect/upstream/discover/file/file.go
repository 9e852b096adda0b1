// Package file finds endpoints in a file that is watched.
package file

import (
	"context"
	"errors"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
)

// Source is the endpoints that stand in one file.
type Source struct{ path string }

// New returns the source that reads the file at path, whose name ends in .json,
// .yml or .yaml. The file need not exist.
func New(path string) (*Source, error) { return nil, errors.ErrUnsupported }

// Run is as in [discover.Source]. A file that is missing, is empty, or has any
// problem is an error; an empty list is an answer.
func (s *Source) Run(ctx context.Context, out chan<- discover.Snapshot) error {
	return errors.ErrUnsupported
}

// Parse reads endpoints from data, sorted by address. name is what errors call
// it, and its extension tells the format. All problems are in one error, each on
// a line that begins with name:line:column.
func Parse(name string, data []byte) ([]discover.Endpoint, error) {
	return nil, errors.ErrUnsupported
}
