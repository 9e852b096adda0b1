package watch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// entryEvents are about the names in a directory, fileEvents about what is
	// behind them.
	entryEvents = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO
	fileEvents  = unix.IN_MODIFY | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB
	// endEvents say that a watch, or what was queued for it, is gone.
	endEvents = unix.IN_IGNORED | unix.IN_UNMOUNT | unix.IN_Q_OVERFLOW | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF

	// dirEvents are those of a directory that is only passed through: what is
	// written to the files in it, as in /tmp, would wake us for nothing.
	dirEvents = entryEvents | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR
)

// event is one that the kernel told.
type event struct {
	dir  int32 // the directory's watch
	name string
	// everything: events were lost, or a directory was.
	everything bool
	// written: the content changed and may change further, or a file was made
	// that may still be empty. closed: whoever wrote it is done, or a whole file
	// took the name.
	written, closed bool
}

// notifier is an inotify instance. A nil one watches nothing.
type notifier struct {
	file *os.File
	once sync.Once
	dirs map[int32][]string // the names that matter, by watch
	buf  [16 << 10]byte
}

func openNotifier() (*notifier, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open inotify: %w", err)
	}
	return &notifier{file: os.NewFile(uintptr(fd), "inotify"), dirs: make(map[int32][]string)}, nil
}

// close ends a read that waits. It may be called by any goroutine, and twice.
func (n *notifier) close() {
	if n != nil {
		n.once.Do(func() { n.file.Close() })
	}
}

// names reports whether name in the directory of that watch is on the way to the
// file.
func (n *notifier) names(dir int32, name string) bool { return slices.Contains(n.dirs[dir], name) }

// watch makes entries all that is watched, and reports whether it could. A
// directory that may be passed through and not read cannot be watched.
func (n *notifier) watch(entries []entry) bool {
	if n == nil {
		return false
	}
	conn, err := n.file.SyscallConn()
	if err != nil {
		return false
	}
	all := true
	err = conn.Control(func(fd uintptr) { all = n.update(int(fd), entries) })
	return all && err == nil
}

func (n *notifier) update(fd int, entries []entry) bool {
	all := true
	masks := make(map[string]uint32)
	for _, e := range entries {
		masks[e.dir] |= dirEvents
		if e.file {
			masks[e.dir] |= fileEvents
		}
	}
	dirs := make(map[int32][]string)
	for _, e := range entries {
		// A directory that is watched already gives the same number again, and
		// has the new mask.
		wd, err := unix.InotifyAddWatch(fd, e.dir, masks[e.dir])
		if err != nil {
			all = false
			continue
		}
		dirs[int32(wd)] = append(dirs[int32(wd)], e.name)
	}
	for wd := range n.dirs {
		if _, kept := dirs[wd]; !kept {
			// An error says that it is gone already, with its directory.
			_, _ = unix.InotifyRmWatch(fd, uint32(wd))
		}
	}
	n.dirs = dirs
	return all
}

// read returns what has happened, or nothing at until.
func (n *notifier) read(until time.Time) ([]event, error) {
	if err := n.file.SetReadDeadline(until); err != nil {
		return nil, fmt.Errorf("read inotify: %w", err)
	}
	got, err := n.file.Read(n.buf[:])
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read inotify: %w", err)
	}
	return decode(n.buf[:got], func(wd int32) bool { _, ok := n.dirs[wd]; return ok }), nil
}

// decode reads the kernel's structs. live tells the watches that still count.
func decode(b []byte, live func(wd int32) bool) []event {
	var events []event
	for len(b) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(b))
		what := binary.NativeEndian.Uint32(b[4:])
		size := int(binary.NativeEndian.Uint32(b[12:]))
		b = b[unix.SizeofInotifyEvent:]
		if size > len(b) {
			break
		}
		name := strings.TrimRight(string(b[:size]), "\x00")
		b = b[size:]
		events = append(events, event{
			dir: wd, name: name,
			everything: what&unix.IN_Q_OVERFLOW != 0 || what&endEvents != 0 && live(wd),
			written:    what&unix.IN_MODIFY != 0 || what&(unix.IN_CREATE|unix.IN_ISDIR) == unix.IN_CREATE,
			closed:     what&(unix.IN_CLOSE_WRITE|unix.IN_MOVED_TO) != 0,
		})
	}
	return events
}
