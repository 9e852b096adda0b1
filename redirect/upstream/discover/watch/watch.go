// Package watch tells when a file may have changed: one that is written in
// place, replaced by a rename, or led to by symbolic links that are swapped, as
// those of a Kubernetes ConfigMap are. The file need not exist.
package watch

import (
	"context"
	"errors"
)

// File calls changed once when it has begun to watch, and then after every change
// of the file that path leads to: of its content, of a symbolic link or a
// directory on the way, when it appears and when it vanishes. It waits until the
// writer seems to be done, and a burst of changes is one call. There may be calls
// without a change, so changed compares what it reads. Where the kernel cannot
// tell (no inotify instances left, a network file system) the file is looked at
// every few seconds.
//
// It returns nil when ctx is done. changed is called by the goroutine of File,
// which waits for it; File starts no other. It returns an error only if path is
// empty.
func File(ctx context.Context, path string, changed func()) error {
	return errors.ErrUnsupported
}
