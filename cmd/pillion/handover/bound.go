package handover

import (
	"errors"
	"io/fs"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// siocUnixFile opens the file that a unix socket is bound to (linux/un.h). It takes
// CAP_NET_ADMIN.
const siocUnixFile = 0x89e0

// Bound tells whether who connects to path may still come to ln. They do not when
// there is no file, nor when that of ln was removed and there is another one. Who has
// only moved it aside, and put something else in its place, knows what that is for.
// Where the kernel does not say what ln is bound to, any file is taken for its own.
func Bound(ln net.Listener, path string) bool {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return false
	}
	file, known := fileOf(ln)
	return !known || file.Nlink > 0
}

func fileOf(ln net.Listener) (st unix.Stat_t, known bool) {
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
