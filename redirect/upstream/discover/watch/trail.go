package watch

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// maxLinks is how many symbolic links the kernel follows on one path.
const maxLinks = 40

// entry is a name that is looked up in a directory on the way to a file.
type entry struct {
	dir, name string
	// file tells whether the name is, or would be, the file's own: what is
	// written there matters too.
	file bool
}

// trail is the way to a file: every name that is looked up for it.
type trail struct {
	entries []entry
	// identity differs if anything on the way or the file itself does.
	identity string
	// watched tells whether the kernel tells of changes of all entries.
	watched bool
}

// walk goes the way to path, which is absolute, for as far as it leads.
func walk(path string) trail {
	var t trail
	var id strings.Builder
	dir, rest := "/", parts(path)
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		if name == ".." {
			// dir is free of links, so its parent is the one meant.
			dir = filepath.Dir(dir)
			continue
		}
		full := filepath.Join(dir, name)
		info, err := os.Lstat(full)
		last := len(rest) == 0 && (err != nil || !info.IsDir() && info.Mode()&os.ModeSymlink == 0)
		if e := (entry{dir, name, last}); !slices.Contains(t.entries, e) {
			t.entries = append(t.entries, e)
		}
		if err != nil {
			fmt.Fprintf(&id, "%v;", err)
			break
		}
		if info.Mode()&os.ModeSymlink == 0 {
			describe(&id, info, len(rest) == 0)
			dir = full
			continue
		}
		target, err := os.Readlink(full)
		if links++; err != nil || links > maxLinks {
			fmt.Fprintf(&id, "%v;", err)
			break
		}
		fmt.Fprintf(&id, "-> %q;", target)
		if filepath.IsAbs(target) {
			dir = "/"
		}
		rest = append(parts(target), rest...)
	}
	t.identity = id.String()
	return t
}

// parts returns the names in a path. It does not clean it: link/.. is the parent of
// what the link leads to.
func parts(path string) []string {
	return slices.DeleteFunc(strings.Split(path, "/"), func(s string) bool { return s == "" || s == "." })
}

// describe writes what tells info from others: of a directory only which one it
// is, of the file itself also in which state.
func describe(id *strings.Builder, info os.FileInfo, file bool) {
	s, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return
	}
	fmt.Fprintf(id, "%d:%d", s.Dev, s.Ino)
	if file {
		fmt.Fprintf(id, " %o %d %d %d", s.Mode, s.Size, info.ModTime().UnixNano(), s.Ctim.Nano())
	}
	id.WriteByte(';')
}
