package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// maxAncestry is how deep in the hierarchy a process is looked for. The kernel has
// no such bound; a node in a container in a pod is at 15.
const maxAncestry = 32

// ownAncestry returns the ids of this process's cgroup and of all above it, the
// root first. /proc/self/cgroup does not tell: in a namespace of cgroups, it begins
// there.
func ownAncestry() ([]uint64, error) {
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "pl_ancestry", Type: ebpf.Array, KeySize: 4, ValueSize: 8 * (maxAncestry + 1), MaxEntries: 1})
	if err != nil {
		return nil, fmt.Errorf("create map: %w", err)
	}
	defer m.Close()
	ins := asm.Instructions{
		asm.LoadMapValue(asm.R6, m.FD(), 0),
		asm.FnGetCurrentCgroupId.Call(),
		asm.StoreMem(asm.R6, 8*maxAncestry, asm.R0, asm.DWord),
	}
	for n := range maxAncestry {
		ins = append(ins, asm.Mov.Imm(asm.R1, int32(n)), asm.FnGetCurrentAncestorCgroupId.Call(), asm.StoreMem(asm.R6, int16(8*n), asm.R0, asm.DWord))
	}
	ins = append(ins, asm.Mov.Imm(asm.R0, 0), asm.Return())
	if err := runHere(ins); err != nil {
		return nil, fmt.Errorf("ask for own cgroups: %w", err)
	}
	b, err := m.LookupBytes(uint32(0))
	if err != nil {
		return nil, fmt.Errorf("read map: %w", err)
	}
	self := binary.NativeEndian.Uint64(b[8*maxAncestry:])
	var ids []uint64
	for n := range maxAncestry {
		ids = append(ids, binary.NativeEndian.Uint64(b[8*n:]))
		if ids[n] == self {
			return ids, nil
		}
	}
	return nil, fmt.Errorf("own cgroup is more than %d levels deep", maxAncestry)
}

// runHere runs a program in the context of the calling thread. A program of type
// "syscall" needs CAP_BPF only; where the kernel gives it no such helpers, a raw
// tracepoint's needs CAP_PERFMON too.
func runHere(ins asm.Instructions) error {
	var errs []error
	for _, spec := range []*ebpf.ProgramSpec{
		{Type: ebpf.Syscall, Flags: unix.BPF_F_SLEEPABLE},
		{Type: ebpf.RawTracepoint},
	} {
		spec.Name, spec.License, spec.Instructions = "pl_ancestry", "Dual BSD/GPL", ins
		p, err := ebpf.NewProgram(spec)
		if err != nil {
			errs = append(errs, fmt.Errorf("load a program of type %s: %w", spec.Type, err))
			continue
		}
		_, err = p.Run(&ebpf.RunOptions{})
		p.Close()
		if err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("run a program of type %s: %w", spec.Type, err))
	}
	return errors.Join(errs...)
}

// view is what this process sees of the hierarchy.
type view struct {
	ids []uint64 // own ancestry
	// dir is the root of a mount, at path; empty: the mount is nowhere.
	dir  *os.File
	path string
	// top is the level of that root in ids; -1: it is not there.
	top int
	// names are those of ids; one that cannot be known is empty.
	names []string
}

// openView looks at all mounts of the hierarchy, and uses the one that shows the
// most of ids. Where none is, as in a container on a machine with v1 and v2, it
// makes one that nobody else sees.
func openView(mountinfo string, ids []uint64) (*view, error) {
	v := &view{ids: ids, top: -1, names: make([]string, len(ids))}
	b, err := os.ReadFile(mountinfo)
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		// See proc_pid_mountinfo(5): the mount point is the fifth field.
		left, right, ok := strings.Cut(line, " - ")
		fields := strings.Fields(left)
		if ok && strings.HasPrefix(right, "cgroup2 ") && len(fields) > 4 {
			v.consider(unescape(fields[4]))
		}
	}
	if v.dir == nil {
		if v.dir, err = mountDetached(); err != nil {
			return nil, err
		}
		v.top = 0
	}
	v.nameAll()
	return v, nil
}

// unescape is the reverse of what mountinfo does to a path.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// consider takes a mount if it shows more than the one before.
func (v *view) consider(path string) {
	f, err := os.Open(path)
	if err != nil {
		return
	}
	var fs unix.Statfs_t
	id, err := fileID(f)
	// Another mount may hide this one.
	if unix.Fstatfs(int(f.Fd()), &fs) != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC || err != nil {
		f.Close()
		return
	}
	top := -1
	for n, i := range v.ids {
		if i == id {
			top = n
		}
	}
	if v.dir != nil && (top < 0 || v.top >= 0 && top >= v.top) {
		f.Close()
		return
	}
	if v.dir != nil {
		v.dir.Close()
	}
	v.dir, v.path, v.top = f, path, top
}

func fileID(f *os.File) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, fmt.Errorf("read id of cgroup %s: %w", f.Name(), err)
	}
	return st.Ino, nil
}

// mountDetached mounts the hierarchy where only the descriptor leads. In a
// namespace of cgroups its root is that namespace's.
func mountDetached() (*os.File, error) {
	fs, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cgroup v2 is not mounted here, and cannot be: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("cgroup v2 is not mounted here, and cannot be: %w", err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cgroup v2 is not mounted here, and cannot be: %w", err)
	}
	defer unix.Close(mount)
	// The mount's own descriptor is good for nothing but this.
	fd, err := unix.Openat(mount, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open the mount of cgroup v2: %w", err)
	}
	return os.NewFile(uintptr(fd), "cgroup2"), nil
}

// nameAll finds the names of ids, from the top.
func (v *view) nameAll() {
	for n := range v.ids[1:] {
		parent, err := v.open(n)
		if err != nil {
			continue
		}
		v.names[n+1] = nameIn(parent, v.ids[n+1])
		parent.Close()
	}
}

// nameIn returns the name of a cgroup's child, and nothing if there is none.
func nameIn(parent *os.File, id uint64) string {
	names, _ := parent.Readdirnames(-1)
	for _, name := range names {
		var st unix.Stat_t
		err := unix.Fstatat(int(parent.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && st.Ino == id && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return name
		}
	}
	return ""
}

// visible returns the path of an own cgroup below the mount, or nothing.
func (v *view) visible(level int) string {
	if v.top < 0 || level < v.top {
		return ""
	}
	path := "."
	for _, name := range v.names[v.top+1 : level+1] {
		if name == "" {
			return ""
		}
		path += "/" + name
	}
	return path
}

// open opens an own cgroup: by its path where the mount shows it, and otherwise by
// its id, which also leads out of the mount, and takes CAP_DAC_READ_SEARCH.
func (v *view) open(level int) (*os.File, error) {
	fd := -1
	var err error
	if path := v.visible(level); path != "" {
		fd, err = unix.Openat(int(v.dir.Fd()), path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	} else {
		handle := unix.NewFileHandle(kernfsHandle, binary.NativeEndian.AppendUint64(nil, v.ids[level]))
		fd, err = unix.OpenByHandleAt(int(v.dir.Fd()), handle, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("open own cgroup at level %d (id %d): %w", level, v.ids[level], err)
	}
	f := os.NewFile(uintptr(fd), "cgroup")
	// A mount of a part may have other things by the same names.
	if id, err := fileID(f); err != nil || id != v.ids[level] {
		f.Close()
		return nil, errors.Join(fmt.Errorf("open own cgroup at level %d: found id %d, want %d", level, id, v.ids[level]), err)
	}
	return f, nil
}

func (v *view) close() { v.dir.Close() }

// sight is what a connect hook at a cgroup sees of this process.
type sight struct {
	netns uint64
	scope uint64 // own ancestor at the level of that cgroup,
	own   uint64 // and one below
}

// see attaches a hook to a cgroup for a moment, and lets a socket of this thread
// run into it, which sends nothing. It is the only proof that what was found is
// where this process's connections are seen.
func see(cgroup *os.File, level int) (sight, error) {
	var s sight
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "pl_sight", Type: ebpf.Array, KeySize: 4, ValueSize: 32, MaxEntries: 1})
	if err != nil {
		return s, fmt.Errorf("create map: %w", err)
	}
	defer m.Close()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return s, fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return s, fmt.Errorf("read cookie of socket: %w", err)
	}
	value := make([]byte, 32)
	binary.NativeEndian.PutUint64(value, cookie)
	if err := m.Put(uint32(0), value); err != nil {
		return s, fmt.Errorf("write map: %w", err)
	}
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "pl_sight", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect,
		License: "Dual BSD/GPL", Instructions: sightProgram(m, level),
	})
	if err != nil {
		return s, fmt.Errorf("load program: %w", err)
	}
	defer p.Close()
	l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(cgroup.Fd()), Program: p, Attach: ebpf.AttachCGroupInet4Connect})
	if err != nil {
		return s, fmt.Errorf("attach program: %w", err)
	}
	defer l.Close()
	// What the kernel answers is no matter: the hook comes first.
	_ = unix.Connect(fd, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}})
	b, err := m.LookupBytes(uint32(0))
	if err != nil {
		return s, fmt.Errorf("read map: %w", err)
	}
	s.netns = binary.NativeEndian.Uint64(b[8:])
	s.scope = binary.NativeEndian.Uint64(b[16:])
	s.own = binary.NativeEndian.Uint64(b[24:])
	return s, nil
}

// sightProgram notes what it sees of the one socket whose cookie is in the map.
func sightProgram(m *ebpf.Map, level int) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMapValue(asm.R7, m.FD(), 0),
		asm.FnGetSocketCookie.Call(),
		asm.LoadMem(asm.R1, asm.R7, 0, asm.DWord),
		asm.JNE.Reg(asm.R0, asm.R1, "out"),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.FnGetNetnsCookie.Call(),
		asm.StoreMem(asm.R7, 8, asm.R0, asm.DWord),
		asm.Mov.Imm(asm.R1, int32(level)),
		asm.FnGetCurrentAncestorCgroupId.Call(),
		asm.StoreMem(asm.R7, 16, asm.R0, asm.DWord),
		asm.Mov.Imm(asm.R1, int32(level+1)),
		asm.FnGetCurrentAncestorCgroupId.Call(),
		asm.StoreMem(asm.R7, 24, asm.R0, asm.DWord),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("out"),
		asm.Return(),
	}
}
