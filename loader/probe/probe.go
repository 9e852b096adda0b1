package probe

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// RouteProtocol is the rtnetlink protocol number of the routes that Pillion
// adds, so that they can be told from anybody else's.
const RouteProtocol = 113

// DefaultBPFFS is where Pillion pins.
const DefaultBPFFS = "/sys/fs/bpf"

// ErrUnsupported means that this machine, or this process on it, cannot run
// Pillion. The text around it says what is missing and what to do.
var ErrUnsupported = errors.New("not supported here")

// Level is how bad a finding is.
type Level int

// The levels of a finding.
const (
	// OK is as it should be, or for information.
	OK Level = iota
	// Warn does not stop Pillion, but something works less well, or could
	// not be checked.
	Warn
	// Fail stops Pillion, or what it is for.
	Fail
)

// String returns "ok", "warn" or "fail".
func (l Level) String() string {
	switch l {
	case OK:
		return "ok"
	case Warn:
		return "warn"
	case Fail:
		return "fail"
	}
	return fmt.Sprintf("level %d", int(l))
}

// MarshalText gives the name, for JSON.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText accepts what MarshalText gives.
func (l *Level) UnmarshalText(text []byte) error {
	for _, known := range []Level{OK, Warn, Fail} {
		if string(text) == known.String() {
			*l = known
			return nil
		}
	}
	return fmt.Errorf("parse level %q: not ok, warn or fail", text)
}

// Finding is one answer about the machine.
type Finding struct {
	// Name says what was looked at, for example "btf" or "hook connect4".
	Name  string `json:"name"`
	Level Level  `json:"level"`
	// Detail says what was found.
	Detail string `json:"detail"`
	// Cure says what to do. It is never empty for Warn and Fail.
	Cure string `json:"cure,omitempty"`
}

func good(name, format string, args ...any) Finding {
	return Finding{Name: name, Level: OK, Detail: fmt.Sprintf(format, args...)}
}

func warning(name, cure, format string, args ...any) Finding {
	return Finding{Name: name, Level: Warn, Detail: fmt.Sprintf(format, args...), Cure: cure}
}

func failure(name, cure, format string, args ...any) Finding {
	return Finding{Name: name, Level: Fail, Detail: fmt.Sprintf(format, args...), Cure: cure}
}

// Options says what [Run] is to look at. The zero value is the whole machine.
type Options struct {
	// Cgroup is the absolute path of the scope: foreign programs on it and
	// on its ancestors are reported, and the attach probe happens below it.
	// Empty is the root of the v2 hierarchy.
	Cgroup string
	// BPFFS is where pins will be made; empty is [DefaultBPFFS].
	BPFFS string
}

// machine is what the checks look at. Tests replace files.
type machine struct {
	// files is the root directory.
	files  fs.FS
	cgroup string
	bpffs  string
}

func newMachine(o Options) *machine {
	m := &machine{files: os.DirFS("/"), cgroup: o.Cgroup, bpffs: o.BPFFS}
	if m.bpffs == "" {
		m.bpffs = DefaultBPFFS
	}
	return m
}

// check is one question. It answers with at least one finding.
type check struct {
	name string
	run  func(context.Context, *machine) []Finding
}

// checks are in the order of the report: what everything else needs first.
var checks = []check{
	{"kernel", checkKernel},
	{"btf", checkBTF},
	{"cgroup v2", checkCgroup},
	{"bpffs", checkBPFFS},
	{"capabilities", checkCapabilities},
	{"bpf(2)", checkBPF},
	{"features", checkFeatures},
	{"programs", checkPrograms},
	{"attach", checkAttach},
	{"sysctls", checkSysctls},
	{"descriptors", checkDescriptors},
	{"slot ranges", checkRanges},
	{"packet filter", checkFirewall},
	{"foreign programs", checkForeign},
}

// Run answers every question, in the same order always. It needs no
// privileges: what it may not look at is a warning. When ctx ends, what is left
// is reported as not checked. It takes well under a second.
func Run(ctx context.Context, o Options) []Finding {
	m := newMachine(o)
	var all []Finding
	for _, c := range checks {
		all = append(all, c.answer(ctx, m)...)
	}
	return all
}

// answer runs the check. A panic becomes a finding: these checks parse what
// other software left in the kernel, and a doctor that dies of it helps nobody.
func (c check) answer(ctx context.Context, m *machine) (found []Finding) {
	defer func() {
		if p := recover(); p != nil {
			found = append(found, warning(c.name, "report this as a defect of Pillion", "the check broke: %v", p))
		}
	}()
	if err := ctx.Err(); err != nil {
		return []Finding{warning(c.name, "run it again with more time", "not checked: %v", err)}
	}
	return c.run(ctx, m)
}

// Required is the part of [Run] that every loader needs: BTF, cgroup v2,
// capabilities and bpf(2). It reads a few files and takes less than 20 ms. Whether the
// kernel takes the programs is left to loading them. The error wraps
// [ErrUnsupported] and names the cure of each problem.
func Required(ctx context.Context) error { return required(ctx, newMachine(Options{})) }

// RequiredInPod is Required for who finds its pod by itself: a container may have no
// mount of cgroup v2, and need none.
func RequiredInPod(ctx context.Context) error {
	return requires(ctx, newMachine(Options{}), checkBTF, checkCapabilities, checkBPF)
}

func required(ctx context.Context, m *machine) error {
	return requires(ctx, m, checkBTF, checkCgroup, checkCapabilities, checkBPF)
}

func requires(ctx context.Context, m *machine, checks ...func(context.Context, *machine) []Finding) error {
	var errs []error
	for _, run := range checks {
		for _, f := range run(ctx, m) {
			if f.Level == Fail {
				errs = append(errs, fmt.Errorf("%w: %s: %s; %s", ErrUnsupported, f.Name, f.Detail, f.Cure))
			}
		}
	}
	return errors.Join(errs...)
}

// read returns a small file's text without the white space around it. path is
// absolute.
func (m *machine) read(path string) (string, error) {
	b, err := fs.ReadFile(m.files, path[1:])
	if err != nil {
		return "", err
	}
	return trim(b), nil
}

func (m *machine) exists(path string) bool {
	_, err := fs.Stat(m.files, path[1:])
	return err == nil
}

// listed joins at most a handful of items.
func listed(items []string) string {
	const most = 5
	if len(items) <= most {
		return strings.Join(items, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(items[:most], ", "), len(items)-most)
}
