package probe

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pillion-project/pillion/tests/testutil"
)

const (
	rootLine    = "1 0 254:0 / / rw - ext4 /dev/vda rw\n"
	sysLine     = "2 1 0:2 / /sys rw - sysfs sysfs rw\n"
	unifiedLine = "3 2 0:3 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
	tmpfsLine   = "4 2 0:4 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
	cpuLine     = "5 4 0:5 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
	hybridLine  = "6 4 0:6 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n"
	allCaps     = "CapEff:\t000001ffffffffff\n"
	twoCaps     = "CapEff:\t0000008000001000\n" // CAP_BPF, CAP_NET_ADMIN
)

func TestCgroupRoot(t *testing.T) {
	tests := map[string]struct{ mounts, want string }{
		"unified":         {rootLine + sysLine + unifiedLine, "/sys/fs/cgroup"},
		"hybrid":          {rootLine + sysLine + tmpfsLine + cpuLine + hybridLine, "/sys/fs/cgroup/unified"},
		"v1":              {rootLine + sysLine + tmpfsLine + cpuLine, ""},
		"none":            {rootLine, ""},
		"elsewhere":       {rootLine + "7 1 0:7 / /run/cg\\0402 rw - cgroup2 none rw\n", "/run/cg 2"},
		"part of it":      {rootLine + sysLine + "8 1 0:3 /a /mnt rw - cgroup2 x rw\n" + unifiedLine, "/sys/fs/cgroup"},
		"whole of it":     {rootLine + sysLine + "8 2 0:3 /a /sys/fs/cgroup rw - cgroup2 x rw\n9 1 0:3 / /mnt rw - cgroup2 x rw\n", "/mnt"},
		"hidden":          {rootLine + sysLine + unifiedLine + "9 3 0:9 / /sys/fs/cgroup rw - tmpfs t rw\n", ""},
		"broken lines":    {"\n1 2\n - \n1 0 0:1 / / rw - \n" + unifiedLine, "/sys/fs/cgroup"},
		"optional fields": {"3 2 0:3 / /sys/fs/cgroup rw shared:1 master:2 - cgroup2 cgroup2 rw\n", "/sys/fs/cgroup"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := fake(map[string]string{"/proc/self/mountinfo": tt.mounts}).cgroupRoot()
			if got != tt.want || (tt.want == "") != errors.Is(err, ErrUnsupported) {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
		})
	}
}

func TestCgroupRootHere(t *testing.T) {
	want := testutil.CgroupRoot(t)
	if got, err := CgroupRoot(); err != nil || got != want {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
}

// TestFiles plays machines that differ by their files through one check.
func TestFiles(t *testing.T) {
	sysctl := func(key, value string) map[string]string { return map[string]string{"/proc/sys/" + key: value} }
	tests := map[string]struct {
		check func(context.Context, *machine) []Finding
		files map[string]string
		want  []string
		says  string
	}{
		"btf":        {checkBTF, map[string]string{btfFile: "x"}, nil, btfFile},
		"no btf":     {checkBTF, nil, []string{"fail btf"}, "no type information"},
		"empty btf":  {checkBTF, map[string]string{btfFile: ""}, []string{"fail btf"}, "empty"},
		"release":    {checkKernel, sysctl("kernel/osrelease", "4.4.0\n"), nil, "Linux 4.4.0"},
		"no release": {checkKernel, nil, nil, "unknown"},
		"unified":    {checkCgroup, map[string]string{"/proc/self/mountinfo": unifiedLine}, nil, "mounted on /sys/fs/cgroup"},
		"hybrid":     {checkCgroup, map[string]string{"/proc/self/mountinfo": tmpfsLine + cpuLine + hybridLine}, nil, "beside cgroup v1"},
		"v1 only":    {checkCgroup, map[string]string{"/proc/self/mountinfo": tmpfsLine + cpuLine}, []string{"fail cgroup v2"}, "only cgroup v1"},
		"hidden": {checkCgroup, map[string]string{
			"/proc/self/mountinfo": tmpfsLine + cpuLine, "/proc/self/cgroup": "2:cpu:/x\n0::/x\n", "/proc/thread-self/status": twoCaps,
		}, []string{"fail cgroup v2"}, "no mount of this container shows it, and"},
		"hidden, may mount": {checkCgroup, map[string]string{
			"/proc/self/mountinfo": tmpfsLine + cpuLine, "/proc/self/cgroup": "0::/\n", "/proc/thread-self/status": allCaps,
		}, []string{"warn cgroup v2"}, "for itself"},
		"v1 only, listed":   {checkCgroup, map[string]string{"/proc/self/mountinfo": tmpfsLine + cpuLine, "/proc/self/cgroup": "10::/\n2:cpu:/x\n"}, []string{"fail cgroup v2"}, "only cgroup v1"},
		"nowhere to attach": {checkAttach, map[string]string{"/proc/self/mountinfo": rootLine}, []string{"warn attach"}, "not mounted"},
		"nowhere to look":   {checkForeign, map[string]string{"/proc/self/mountinfo": rootLine}, []string{"warn foreign programs"}, "not mounted"},
		"no cgroups":        {checkCgroup, map[string]string{"/proc/self/mountinfo": rootLine}, []string{"fail cgroup v2"}, "not mounted"},
		"no proc":           {checkCgroup, nil, []string{"fail cgroup v2"}, "mountinfo"},
		"net_cls":           {checkCgroup, map[string]string{"/proc/self/mountinfo": hybridLine + "9 4 0:9 / /sys/fs/cgroup/net rw - cgroup cgroup rw,net_cls,net_prio\n"}, []string{"warn cgroup v1 net_cls"}, "5.15"},
		"user namespace":    {checkCapabilities, map[string]string{"/proc/self/uid_map": "0 100000 65536\n", "/proc/thread-self/status": allCaps}, []string{"fail user namespace"}, "user namespace"},
		"init namespace":    {checkCapabilities, map[string]string{"/proc/self/uid_map": "         0          0 4294967295\n", "/proc/thread-self/status": twoCaps}, nil, "fine"},
		"no caps":           {checkCapabilities, map[string]string{"/proc/thread-self/status": "CapEff:\t0\n"}, []string{"fail CAP_BPF", "fail CAP_NET_ADMIN"}, "missing"},
		"unreadable caps":   {checkCapabilities, nil, []string{"fail CAP_BPF", "fail CAP_NET_ADMIN"}, "missing"},
		"ports":             {checkSysctls, sysctl("net/ipv4/ip_local_port_range", "32768\t60999\n"), nil, "28232 ports"},
		"few ports":         {checkSysctls, sysctl("net/ipv4/ip_local_port_range", "50000\t50009\n"), []string{"warn net.ipv4.ip_local_port_range"}, "10 ports"},
		"strange ports":     {checkSysctls, sysctl("net/ipv4/ip_local_port_range", "many"), nil, "not known"},
		"reuse":             {checkSysctls, sysctl("net/ipv4/tcp_tw_reuse", "1\n"), nil, "used again"},
		"no jit":            {checkSysctls, sysctl("net/core/bpf_jit_enable", "0\n"), []string{"warn net.core.bpf_jit_enable"}, "interpreted"},
		"open bpf":          {checkSysctls, sysctl("kernel/unprivileged_bpf_disabled", "0"), nil, "any user"},
		"pipes":             {checkSysctls, sysctl("fs/pipe-user-pages-soft", "16384"), nil, "1024 connections"},
		"lo without v6": {checkSysctls, map[string]string{
			"/proc/sys/net/ipv6/conf/lo/disable_ipv6": "1", "/proc/sys/net/ipv6/conf/all/disable_ipv6": "0", "/proc/sys/net/ipv6/conf/eth0/disable_ipv6": "0",
		}, []string{"warn net.ipv6.conf.lo.disable_ipv6"}, "eth0 speaks"},
		"no v6 at all": {checkSysctls, map[string]string{
			"/proc/sys/net/ipv6/conf/lo/disable_ipv6": "1", "/proc/sys/net/ipv6/conf/all/disable_ipv6": "0", "/proc/sys/net/ipv6/conf/eth0/disable_ipv6": "1",
		}, nil, "every interface"},
		"bpffs":           {checkBPFFS, map[string]string{"/proc/self/mountinfo": sysLine + "9 2 0:9 / /sys/fs/bpf rw - bpf none rw\n"}, nil, "mounted on /sys/fs/bpf"},
		"read-only bpffs": {checkBPFFS, map[string]string{"/proc/self/mountinfo": sysLine + "9 2 0:9 / /sys/fs/bpf ro - bpf none rw\n"}, []string{"fail bpffs"}, "read-only"},
		"foreign bpffs":   {checkBPFFS, map[string]string{"/proc/self/mountinfo": sysLine + "9 2 0:9 / /sys/fs/bpf rw - tmpfs none rw\n"}, []string{"fail bpffs"}, "tmpfs"},
		"no bpffs":        {checkBPFFS, map[string]string{"/proc/self/mountinfo": sysLine, "/sys/fs/bpf/x": "", "/proc/thread-self/status": allCaps}, nil, "mounts it"},
		"cannot mount":    {checkBPFFS, map[string]string{"/proc/self/mountinfo": sysLine, "/sys/fs/bpf/x": "", "/proc/thread-self/status": twoCaps}, []string{"fail bpffs"}, "CAP_SYS_ADMIN"},
		"no directory":    {checkBPFFS, map[string]string{"/proc/self/mountinfo": sysLine}, []string{"fail bpffs"}, "no directory"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			found := tt.check(context.Background(), fake(tt.files))
			wellFormed(t, found)
			if tt.want == nil {
				tt.want = []string{}
			}
			if diff := cmp.Diff(tt.want, summary(found)); diff != "" {
				t.Errorf("findings (-want +got):\n%s", diff)
			}
			var text strings.Builder
			for _, f := range found {
				text.WriteString(f.Detail + "\n")
			}
			if !strings.Contains(text.String(), tt.says) {
				t.Errorf("%q is not in:\n%s", tt.says, &text)
			}
		})
	}
}

func TestDescriptors(t *testing.T) {
	poor := fake(map[string]string{"/proc/thread-self/status": twoCaps})
	rich := fake(map[string]string{"/proc/thread-self/status": allCaps})
	tests := map[string]struct {
		m    *machine
		hard uint64
		want Level
	}{
		"many":          {poor, 1 << 20, OK},
		"infinite":      {poor, unix.RLIM_INFINITY, OK},
		"few":           {poor, 20_000, Warn},
		"can be raised": {rich, 1024, OK},
	}
	for name, tt := range tests {
		if f := tt.m.descriptors(tt.hard); f.Level != tt.want {
			t.Errorf("%s: %+v", name, f)
		}
	}
}

// TestJudge proves that the kernel's answers are told apart.
func TestJudge(t *testing.T) {
	rich := fake(map[string]string{"/proc/thread-self/status": allCaps + "Seccomp:\t2\n", "/sys/kernel/security/lockdown": "none integrity [confidentiality]\n"})
	poor := fake(map[string]string{"/proc/thread-self/status": "CapEff:\t0\n"})
	verifier := &ebpf.VerifierError{Cause: unix.EACCES, Log: []string{"unknown func bpf_set_retval#187"}}
	tests := map[string]struct {
		m        *machine
		optional string
		err      error
		want     Level
		cure     string
	}{
		"works":             {rich, "", nil, OK, ""},
		"unknown helper":    {rich, "", verifier, Fail, "boot Linux 5.18"},
		"optional":          {rich, "mirroring", unix.EINVAL, Warn, "boot Linux 5.18"},
		"optional, refused": {rich, "mirroring", unix.EPERM, Warn, "boot Linux 5.18"},
		"no capabilities":   {poor, "", unix.EPERM, Warn, "CAP_BPF"},
		"seccomp":           {rich, "", unix.EPERM, Fail, "seccomp"},
		"lockdown":          {rich, "", unix.EPERM, Fail, "lockdown=integrity"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			f := tt.m.judge(feature{name: "x", since: "5.18", optional: tt.optional}, tt.err)
			wellFormed(t, []Finding{f})
			if f.Level != tt.want || !strings.Contains(f.Cure, tt.cure) {
				t.Errorf("%+v", f)
			}
		})
	}
}

// TestRefusalIsShort proves what a user sees of a program that the kernel
// refuses: the verifier's last word, in one line.
func TestRefusalIsShort(t *testing.T) {
	testutil.RequireRoot(t)
	err := loads(ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, asm.Instructions{asm.Mov.Reg(asm.R0, asm.R7), asm.Return()})
	if err == nil {
		t.Fatal("the kernel took a program that reads a register before it is written")
	}
	f := newMachine(Options{}).badProgram("program pl_x", err)
	if f.Level != Fail || !strings.Contains(f.Detail, "R7 !read_ok") || strings.Contains(f.Detail, "\n") || len(f.Detail) > 260 {
		t.Errorf("%+v", f)
	}
	strict := fake(map[string]string{"/proc/thread-self/status": twoCaps})
	if f := strict.badProgram("program pl_x", err); f.Level != Fail || !strings.Contains(f.Cure, "CAP_PERFMON") {
		t.Errorf("%+v", f)
	}
}

func TestScope(t *testing.T) {
	m := fake(map[string]string{"/proc/self/mountinfo": unifiedLine})
	for cgroup, good := range map[string]bool{
		"": true, "/sys/fs/cgroup": true, "/sys/fs/cgroup/a/b/": true,
		"/sys/fs/cgroupx": false, "/tmp": false, "/sys/fs/cgroup/../x": false, "a": false,
	} {
		m.cgroup = cgroup
		if _, _, err := m.scope(); (err == nil) != good {
			t.Errorf("%q: %v", cgroup, err)
		}
	}
}

// What bpf(2) answers tells a kernel without it from one that does not let us.
func TestJudgeBPF(t *testing.T) {
	able := map[string]string{"/proc/thread-self/status": twoCaps + "Seccomp:\t2\n"}
	for name, c := range map[string]struct {
		files map[string]string
		err   error
		level Level
		says  string
	}{
		"there":           {able, unix.EINVAL, OK, "may be called"},
		"a sandbox's":     {able, unix.ENOSYS, Fail, "runtimeClassName"},
		"a profile":       {able, unix.EPERM, Fail, "seccomp=unconfined"},
		"no capabilities": {nil, unix.EPERM, Warn, "CAP_BPF"},
	} {
		f := fake(c.files).judgeBPF(c.err)
		wellFormed(t, []Finding{f})
		if f.Level != c.level || !strings.Contains(f.Detail+f.Cure, c.says) {
			t.Errorf("%s: %+v, want level %s, and that it says %q", name, f, c.level, c.says)
		}
	}
}
