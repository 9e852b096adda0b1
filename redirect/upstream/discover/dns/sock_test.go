package dns

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// socketKind names a socket that is not connected yet.
func socketKind(t *testing.T, fd int) string {
	t.Helper()
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil {
		t.Errorf("exempt %d: %v", fd, err)
		return "none"
	}
	if _, err := unix.Getpeername(fd); err == nil {
		return "connected"
	}
	switch protocol {
	case unix.IPPROTO_UDP:
		return "UDP"
	case unix.IPPROTO_TCP:
		return "TCP"
	default:
		return fmt.Sprint(protocol)
	}
}
