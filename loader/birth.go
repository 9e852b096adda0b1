package loader

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// birth hears when the directory of a cgroup is made, so that the programs are
// attached to one that was made again before a process has started in it, as a rule:
// systemd makes a unit's anew whenever it starts. The kernel's news are those of the
// mount that this process sees; where somebody else's makes the directory, looking now
// and then has to do.
type birth struct {
	fd        int
	dir, name string
}

// openBirth returns nil where there is nothing to hear: the cgroup's directory is
// hidden from this process, or it is the root.
func openBirth(s *Scope) (*birth, error) {
	if s.hidden != nil || s.Level == 0 {
		return nil, nil
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch for a new cgroup: %w", os.NewSyscallError("inotify_init1", err))
	}
	b := &birth{fd: fd, dir: filepath.Dir(s.Path), name: filepath.Base(s.Path)}
	b.arm()
	return b, nil
}

// arm watches the parent of now, which may have been made again too. Done again it
// changes nothing.
func (b *birth) arm() {
	if b != nil {
		// Without it one hears later.
		_, _ = unix.InotifyAddWatch(b.fd, b.dir, unix.IN_CREATE|unix.IN_ONLYDIR)
	}
}

// poll is what to wait for.
func (b *birth) poll() unix.PollFd {
	if b == nil {
		return unix.PollFd{Fd: -1}
	}
	return unix.PollFd{Fd: int32(b.fd), Events: unix.POLLIN}
}

// born reads what there is, and tells whether the directory was made, or may have been.
func (b *birth) born() (is bool) {
	var buf [16 << 10]byte
	for {
		n, err := unix.Read(b.fd, buf[:])
		if err != nil || n <= 0 {
			return is
		}
		for at := 0; at+unix.SizeofInotifyEvent <= n; {
			e := (*unix.InotifyEvent)(unsafe.Pointer(&buf[at]))
			at += unix.SizeofInotifyEvent
			name := buf[at : at+int(e.Len)]
			at += int(e.Len)
			is = is || e.Mask&unix.IN_Q_OVERFLOW != 0 || string(bytes.TrimRight(name, "\x00")) == b.name
		}
	}
}

func (b *birth) close() {
	if b != nil {
		unix.Close(b.fd)
	}
}
