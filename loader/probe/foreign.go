package probe

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// ownPrefix begins the names of Pillion's programs.
const ownPrefix = "pl_"

// What a foreign program does to what Pillion does, by the kind of hook.
type effect int

const (
	// rewrites: it sees or changes addresses.
	rewrites effect = iota
	// follows: it shares the callback flags of sockets.
	follows
	// filters: it sees the packets, hence the slots.
	filters
)

// watched are the hooks whose programs meet Pillion's.
var watched = []struct {
	name   string
	at     ebpf.AttachType
	effect effect
}{
	{"connect4", ebpf.AttachCGroupInet4Connect, rewrites},
	{"connect6", ebpf.AttachCGroupInet6Connect, rewrites},
	{"getpeername4", ebpf.AttachCgroupInet4GetPeername, rewrites},
	{"getpeername6", ebpf.AttachCgroupInet6GetPeername, rewrites},
	{"getsockname4", ebpf.AttachCgroupInet4GetSockname, rewrites},
	{"getsockname6", ebpf.AttachCgroupInet6GetSockname, rewrites},
	{"bind4", ebpf.AttachCGroupInet4Bind, rewrites},
	{"bind6", ebpf.AttachCGroupInet6Bind, rewrites},
	{"sock_release", ebpf.AttachCgroupInetSockRelease, rewrites},
	{"sockops", ebpf.AttachCGroupSockOps, follows},
	{"ingress", ebpf.AttachCGroupInetIngress, filters},
	{"egress", ebpf.AttachCGroupInetEgress, filters},
}

// attached is one program of somebody else's.
type attached struct {
	cgroup string
	// above tells that it is on an ancestor of the scope.
	above  bool
	hook   string
	effect effect
	// place counts from 1 in the order in which the programs of this hook
	// and cgroup run.
	place int
	id    ebpf.ProgramID
	// name is empty when it cannot be read.
	name string
}

func (a attached) String() string {
	name := a.name
	if name == "" {
		name = "unknown name"
	}
	return fmt.Sprintf("%s (id %d, number %d at %s of %s)", name, a.id, a.place, a.hook, a.cgroup)
}

// checkForeign lists programs that are not Pillion's on the scope and its
// ancestors, and says what each means for connections.
func checkForeign(ctx context.Context, m *machine) []Finding {
	const name = "foreign programs"
	dir, root, err := m.scope()
	if errors.Is(err, ErrUnsupported) {
		return []Finding{noMount(name)}
	}
	if err != nil {
		return []Finding{failure(name, "name a cgroup of the v2 hierarchy", "%v", err)}
	}
	if !m.callable(ctx) {
		return []Finding{noCalls(name)}
	}
	var all []attached
	// The kernel runs the programs of a child before those of its parent.
	for at := dir; ; at = filepath.Dir(at) {
		if err := ctx.Err(); err != nil {
			return []Finding{warning(name, "run it again with more time", "not checked: %v", err)}
		}
		some, err := programsOf(at, at != dir)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return []Finding{failure(name, "name a cgroup that exists", "there is no cgroup %s", at)}
		case err != nil && !m.capabilities().enough():
			// The library takes a lack of them for an old kernel.
			return []Finding{m.unchecked(name, errors.New("the capabilities are missing"))}
		case denied(err):
			return []Finding{m.unchecked(name, err)}
		case err != nil:
			return []Finding{warning(name, "run it again", "not checked: %s", short(err))}
		}
		all = append(all, some...)
		if at == root {
			break
		}
	}
	return append(judgeForeign(all), checkForeignLookup())
}

// programsOf lists the programs on one cgroup that are not Pillion's.
func programsOf(dir string, above bool) ([]attached, error) {
	cgroup, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer cgroup.Close()
	var all []attached
	for _, w := range watched {
		res, err := link.QueryPrograms(link.QueryOptions{Target: int(cgroup.Fd()), Attach: w.at})
		if errors.Is(err, unix.EINVAL) {
			// The kernel does not have this hook, as the features say.
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("query %s of %s: %w", w.name, dir, err)
		}
		for i, p := range res.Programs {
			name := programName(p.ID)
			if strings.HasPrefix(name, ownPrefix) {
				continue
			}
			all = append(all, attached{dir, above, w.name, w.effect, i + 1, p.ID, name})
		}
	}
	return all, nil
}

// programName needs CAP_SYS_ADMIN, since it goes by the id, and is empty
// without.
func programName(id ebpf.ProgramID) string {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return ""
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return ""
	}
	return info.Name
}

// judgeForeign gives one finding per kind of effect.
func judgeForeign(all []attached) []Finding {
	var first, later, follow, systemd, filter []string
	for _, a := range all {
		switch {
		case a.effect == follows:
			follow = append(follow, a.String())
		case a.effect == filters && strings.HasPrefix(a.name, "sd_"):
			systemd = append(systemd, a.String())
		case a.effect == filters:
			filter = append(filter, a.String())
		case a.above:
			later = append(later, a.String())
		default:
			first = append(first, a.String())
		}
	}
	const name = "foreign programs"
	var found []Finding
	if len(first) > 0 {
		found = append(found, warning(name, "start Pillion before them, or attach it to a cgroup below, whose programs run first",
			"they run before Pillion's, which sees the addresses that they leave: %s", listed(first)))
	}
	if len(later) > 0 {
		found = append(found, good(name, "they run after Pillion's and see what it chose: %s", listed(later)))
	}
	if len(follow) > 0 {
		found = append(found, warning(name, "make sure that they add to a socket's callback flags and never set them alone",
			"they share the callback flags of sockets: if they clear them, ends of connections are noticed late: %s", listed(follow)))
	}
	if len(systemd) > 0 {
		found = append(found, warning(name,
			"use path direct or pass here; or IPAddressAllow="+super4.String()+" "+super6.String()+" (and lo in RestrictNetworkInterfaces=) for this unit, and its IPAddressDeny= for Pillion's own unit",
			"systemd filters the packets of this unit (IPAddressAllow=, IPAddressDeny= or RestrictNetworkInterfaces=): relayed connections go to slot addresses, "+
				"which it may drop, and Pillion's own dials do not come under it: %s", listed(systemd)))
	}
	if len(filter) > 0 {
		found = append(found, warning(name, "let them pass packets of "+super4.String()+" and "+super6.String()+" on lo",
			"they filter packets, and relayed connections show them slot addresses: %s", listed(filter)))
	}
	if len(found) == 0 {
		found = append(found, good(name, "none that meets Pillion's"))
	}
	return found
}

// checkForeignLookup lists the sk_lookup programs of this network namespace.
// All of them run, so one only matters if it takes packets for slots.
func checkForeignLookup() Finding {
	const name = "sk_lookup programs"
	ns, err := threadNetns()
	if err != nil {
		return good(name, "not known: %v", err)
	}
	defer ns.Close()
	res, err := link.QueryPrograms(link.QueryOptions{Target: int(ns.Fd()), Attach: ebpf.AttachSkLookup})
	if err != nil {
		return good(name, "not known: %s", short(err))
	}
	var others []string
	for i, p := range res.Programs {
		if n := programName(p.ID); !strings.HasPrefix(n, ownPrefix) {
			others = append(others, attached{cgroup: "this network namespace", hook: "sk_lookup", place: i + 1, id: p.ID, name: n}.String())
		}
	}
	if len(others) > 0 {
		return good(name, "others, which is fine unless they take packets for slots: %s", listed(others))
	}
	return good(name, "none but Pillion's")
}

// threadNetns opens the network namespace of the calling thread. The caller
// closes it.
func threadNetns() (*os.File, error) {
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	return f, nil
}
