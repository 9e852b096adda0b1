package webhook

import (
	"os"
	"syscall"
)

// inode tells a file from another one of its name.
func inode(info os.FileInfo) uint64 {
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		return s.Ino
	}
	return 0
}
