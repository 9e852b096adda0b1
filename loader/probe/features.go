package probe

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/bpf"
)

// feature is something of the kernel's that Pillion uses.
type feature struct {
	name string
	try  func() error
	// since is the first mainline release that has it, for the cure.
	since string
	// optional, when not empty, is what Pillion cannot do without it.
	optional string
}

// hook is a place on a cgroup where Pillion attaches.
type hook struct {
	name  string
	typ   ebpf.ProgramType
	at    ebpf.AttachType
	since string
}

var hooks = []hook{
	{"connect4", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, "4.17"},
	{"connect6", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Connect, "4.17"},
	{"getpeername4", ebpf.CGroupSockAddr, ebpf.AttachCgroupInet4GetPeername, "5.8"},
	{"getpeername6", ebpf.CGroupSockAddr, ebpf.AttachCgroupInet6GetPeername, "5.8"},
	{"getsockname4", ebpf.CGroupSockAddr, ebpf.AttachCgroupInet4GetSockname, "5.8"},
	{"getsockname6", ebpf.CGroupSockAddr, ebpf.AttachCgroupInet6GetSockname, "5.8"},
	{"bind4", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Bind, "4.17"},
	{"bind6", ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Bind, "4.17"},
	{"sock_release", ebpf.CGroupSock, ebpf.AttachCgroupInetSockRelease, "5.9"},
	{"sockops", ebpf.SockOps, ebpf.AttachCGroupSockOps, "4.13"},
}

// features lists what the programs of package bpf are made of, one by one, so
// that a kernel without one of them is told by its name and not by a verifier
// log.
func features() []feature {
	const (
		addr    = ebpf.CGroupSockAddr
		connect = ebpf.AttachCGroupInet4Connect
	)
	var all []feature
	for _, h := range hooks {
		all = append(all, feature{name: "hook " + h.name, since: h.since,
			try: func() error { return loads(h.typ, h.at, proceed()) }})
	}
	helper := func(name, since string, body asm.Instructions) {
		all = append(all, feature{name: "helper " + name, since: since,
			try: func() error { return loads(addr, connect, body) }})
	}
	helper("bpf_sk_lookup_tcp", "4.20", lookUpListener())
	helper("bpf_set_retval", "5.18", setRetval())
	helper("bpf_get_netns_cookie", "5.7", callWithCtx(asm.FnGetNetnsCookie))
	helper("bpf_get_socket_cookie", "4.12", callWithCtx(asm.FnGetSocketCookie))
	helper("bpf_get_current_ancestor_cgroup_id", "5.7", ancestorID())
	withMaps := func(name, since string, spec *ebpf.MapSpec, body func(*ebpf.Map) asm.Instructions) {
		all = append(all, feature{name: name, since: since,
			try: func() error { return loadsWith(spec, addr, connect, body) }})
	}
	withMaps("socket storage in connect", "5.8", skStorage(),
		func(m *ebpf.Map) asm.Instructions { return storage(m, sockAddrSk) })
	withMaps("ring buffer", "5.8", mapSpec(ebpf.RingBuf, 0, 0, uint32(os.Getpagesize()), 0), reserve)
	withMaps("LPM trie", "4.11", mapSpec(ebpf.LPMTrie, 8, 4, 1, unix.BPF_F_NO_PREALLOC), withMap(asm.FnMapLookupElem))
	withMaps("queue", "4.20", mapSpec(ebpf.Queue, 0, 4, 1, 0), withMap(asm.FnMapPopElem))
	return append(all,
		feature{name: "socket storage in sockops", since: "5.8", try: func() error {
			return loadsWith(skStorage(), ebpf.SockOps, ebpf.AttachCGroupSockOps,
				func(m *ebpf.Map) asm.Instructions { return storage(m, sockOpsSk) })
		}},
		feature{name: "sk_lookup from a sockmap", since: "5.9", try: func() error {
			return loadsWith(mapSpec(ebpf.SockMap, 4, 8, 1, 0), ebpf.SkLookup, ebpf.AttachSkLookup, assign)
		}},
		feature{name: "tcx", since: "6.6", optional: "connect: mirror (every connect succeeds before its dial has), nor a second try for what is on its way to a handler that dies (refused)", try: TCX})
}

// TCX returns why programs cannot be attached to an interface by a link (Linux
// 6.6), or nil. It attaches to an interface that cannot exist: the kernel looks for
// the interface only when it knows the kind of link.
func TCX() error {
	p, err := load(ebpf.SchedCLS, ebpf.AttachTCXIngress, asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()})
	if err != nil {
		return err
	}
	defer p.Close()
	l, err := link.AttachTCX(link.TCXOptions{Interface: math.MaxInt32, Program: p, Attach: ebpf.AttachTCXIngress})
	switch {
	case err == nil:
		return l.Close()
	case errors.Is(err, unix.ENODEV):
		return nil
	}
	return err
}

func checkFeatures(ctx context.Context, m *machine) []Finding {
	if !m.callable(ctx) {
		return []Finding{noCalls("features")}
	}
	var found []Finding
	for _, f := range features() {
		if err := ctx.Err(); err != nil {
			return append(found, warning("features", "run it again with more time", "not all checked: %v", err))
		}
		found = append(found, m.judge(f, f.try()))
	}
	return found
}

// judge turns the outcome of a feature's probe into a finding.
func (m *machine) judge(f feature, err error) Finding {
	cure := fmt.Sprintf("boot Linux %s or later, or a vendor's kernel that has it", f.since)
	switch {
	case err == nil:
		return good(f.name, "works")
	case !m.capabilities().enough():
		// Not every refusal for lack of capabilities is an EPERM by the
		// time that the library has interpreted it.
		return m.unchecked(f.name, errors.New("the capabilities are missing"))
	case f.optional != "":
		return warning(f.name, cure, "no %s: %s", f.optional, short(err))
	case denied(err) && !isVerifier(err):
		return m.unchecked(f.name, err)
	}
	return failure(f.name, cure, "%s", short(err))
}

// isVerifier tells whether the verifier refused a program, which it also does
// with EACCES, and not the kernel refused the caller.
func isVerifier(err error) bool {
	var v *ebpf.VerifierError
	return errors.As(err, &v) && len(v.Log) > 0
}

// checkPrograms loads what Pillion really loads.
func checkPrograms(ctx context.Context, m *machine) []Finding {
	const name = "programs"
	specs, err := bpf.Specs()
	if err != nil {
		return []Finding{failure(name, "install Pillion again", "%v", err)}
	}
	if !m.capabilities().enough() {
		return []Finding{m.unchecked(name, errors.New("the capabilities are missing"))}
	}
	if !m.callable(ctx) {
		return []Finding{noCalls(name)}
	}
	shared := map[string]*ebpf.Map{}
	defer closeAll(shared)
	var found []Finding
	for _, spec := range specs {
		bad := makeMaps(m, spec, shared)
		found = append(found, bad...)
		if len(bad) > 0 {
			return found
		}
		for prog := range spec.Programs {
			if err := ctx.Err(); err != nil {
				return append(found, warning(name, "run it again with more time", "not all checked: %v", err))
			}
			if err := loadOne(spec, prog, shared); err != nil {
				found = append(found, m.badProgram("program "+prog, err))
			}
		}
	}
	if len(found) == 0 {
		found = append(found, good(name, "the kernel takes all of them"))
	}
	return found
}

// makeMaps adds the maps of one object to those that are shared by name. What
// begins with a dot is the object's own.
func makeMaps(m *machine, spec *ebpf.CollectionSpec, shared map[string]*ebpf.Map) []Finding {
	for name, ms := range spec.Maps {
		if strings.HasPrefix(name, ".") || shared[name] != nil {
			continue
		}
		made, err := ebpf.NewMap(ms)
		if err != nil {
			return []Finding{m.badProgram("map "+name, err)}
		}
		shared[name] = made
	}
	return nil
}

// loadOne loads one program of an object and closes it again.
func loadOne(spec *ebpf.CollectionSpec, prog string, shared map[string]*ebpf.Map) error {
	one := spec.Copy()
	for name := range one.Programs {
		if name != prog {
			delete(one.Programs, name)
		}
	}
	maps := map[string]*ebpf.Map{}
	for name := range one.Maps {
		if shared[name] != nil {
			maps[name] = shared[name]
		}
	}
	c, err := ebpf.NewCollectionWithOptions(one, ebpf.CollectionOptions{MapReplacements: maps})
	if err != nil {
		return err
	}
	c.Close()
	return nil
}

func (m *machine) badProgram(name string, err error) Finding {
	switch {
	case denied(err) && !isVerifier(err):
		return m.unchecked(name, err)
	case errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENOSPC):
		return failure(name, "give the container or unit more memory: the maps need some 20 MiB", "%s", short(err))
	}
	if caps := m.capabilities(); isVerifier(err) && !caps.has(capPerfmon) && !caps.has(capSysAdmin) {
		return failure(name, "give CAP_PERFMON too: without it this kernel's verifier is stricter", "%s", short(err))
	}
	return failure(name, "boot Linux 6.1 or later; if the features above all work, report this with the kernel's release", "%s", short(err))
}

func closeAll(maps map[string]*ebpf.Map) {
	for _, m := range maps {
		m.Close()
	}
}
