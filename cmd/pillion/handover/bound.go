package handover

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// siocUnixFile opens the file that a unix socket is bound to (linux/un.h). It takes
// CAP_NET_ADMIN.
const siocUnixFile = 0x89e0

// Bound tells whether who connects to path comes to ln: somebody may have removed the
// file, and made another one. Where the kernel does not say what ln is bound to, it
// tells whether there is a file at all.
func Bound(ln net.Listener, path string) bool {
	now, err := os.Lstat(path)
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist) // else nothing can be said
	}
	there, ok := now.Sys().(*syscall.Stat_t)
	own, known := boundTo(ln)
	return !ok || !known || there.Dev == own.Dev && there.Ino == own.Ino && own.Nlink > 0
}

func boundTo(ln net.Listener) (st unix.Stat_t, known bool) {
	err := FD(ln, func(fd int) {
		file, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), siocUnixFile, 0)
		if e != 0 {
			return
		}
		known = unix.Fstat(int(file), &st) == nil
		unix.Close(int(file))
	})
	return st, known && err == nil
}
