package testutil

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// PassedFD returns the one descriptor that came with a message, by its control message.
// It is the caller's to close.
func PassedFD(control []byte) (int, error) {
	all, err := unix.ParseSocketControlMessage(control)
	if err != nil || len(all) != 1 {
		return -1, fmt.Errorf("%d control messages: %w", len(all), err)
	}
	fds, err := unix.ParseUnixRights(&all[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("%d descriptors: %w", len(fds), err)
	}
	return fds[0], nil
}
