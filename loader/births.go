package loader

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Births tells whether containers of a pod were made, also such that are gone when
// anybody looks.
type Births struct{ fd int }

// Births begins to listen. The caller closes what it returns.
func (p *Pod) Births() (*Births, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("listen for containers: %w", err)
	}
	if _, err := unix.InotifyAddWatch(fd, p.Scope.dir(), unix.IN_CREATE|unix.IN_ONLYDIR); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listen for containers of %s: %w", p.Scope.Path, err)
	}
	return &Births{fd: fd}, nil
}

// Any tells whether one was made since the last call, or since the begin.
func (b *Births) Any() (bool, error) {
	// No file is ever made there, so whatever is told is a container, or that
	// the pod is gone.
	buf := make([]byte, 4096)
	for any := false; ; any = true {
		_, err := unix.Read(b.fd, buf)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			return any, nil
		}
		if err != nil {
			return any, fmt.Errorf("listen for containers: %w", err)
		}
	}
}

// Close ends it.
func (b *Births) Close() error { return unix.Close(b.fd) }
