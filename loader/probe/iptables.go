package probe

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// saveLimit is how long iptables-save may take: it waits for a lock.
const saveLimit = 5 * time.Second

// legacyFamilies are the two sets of old tables, which nf_tables does not show.
var legacyFamilies = []struct {
	v6    bool
	names string
	tools []string
}{
	{false, "/proc/net/ip_tables_names", []string{"iptables-legacy-save", "iptables-save"}},
	{true, "/proc/net/ip6_tables_names", []string{"ip6tables-legacy-save", "ip6tables-save"}},
}

// readLegacy reads what iptables keeps outside of nf_tables. The files tell
// whether there is anything: the command would load the modules otherwise.
func (m *machine) readLegacy(ctx context.Context) ([]*table, []Finding) {
	var tables []*table
	var problems []Finding
	for _, f := range legacyFamilies {
		// /proc/net is a link to the namespace of the main thread.
		names, err := m.read(strings.Replace(f.names, "/proc/net/", "/proc/thread-self/net/", 1))
		if err != nil || names == "" {
			continue
		}
		text, err := saved(ctx, f.tools)
		if err != nil {
			problems = append(problems, warning("packet filter",
				"install iptables, or look for rules that drop "+super4.String()+" or "+super6.String(),
				"%s has tables (%s) that cannot be read: %s", f.names, strings.Join(strings.Fields(names), ", "), short(err)))
			continue
		}
		tables = append(tables, parseSaved(text, f.v6)...)
	}
	return tables, problems
}

// saved runs the first of the tools that is there. Their output is what it is
// in every locale.
func saved(ctx context.Context, tools []string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, saveLimit)
	defer cancel()
	err := errors.New("no tool")
	for _, tool := range tools {
		var path string
		if path, err = exec.LookPath(tool); err != nil {
			continue
		}
		out, err := exec.CommandContext(ctx, path).Output()
		if err != nil {
			return "", fmt.Errorf("run %s: %w", path, err)
		}
		if strings.Contains(string(out), "(nf_tables)") {
			// It shows the rules that are read over netlink already.
			return "", fmt.Errorf("%s is the nf_tables variant", path)
		}
		return string(out), nil
	}
	return "", err
}

// legacyHooks are the chains that the kernel calls.
var legacyHooks = map[string]uint32{
	"PREROUTING": unix.NF_INET_PRE_ROUTING, "INPUT": unix.NF_INET_LOCAL_IN,
	"FORWARD": unix.NF_INET_FORWARD, "OUTPUT": unix.NF_INET_LOCAL_OUT, "POSTROUTING": unix.NF_INET_POST_ROUTING,
}

// parseSaved reads the format of iptables-save.
func parseSaved(text string, v6 bool) []*table {
	tool := "iptables"
	if v6 {
		tool = "ip6tables"
	}
	var all []*table
	var t *table
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "*"):
			t = &table{name: tool + " table " + line[1:], v4: !v6, v6: v6, chains: map[string]*chain{}}
			all = append(all, t)
		case t == nil:
		case strings.HasPrefix(line, ":"):
			addSavedChain(t, strings.Fields(line[1:]))
		case strings.HasPrefix(line, "-A "):
			w := words(line)
			if c := t.chains[w[1]]; c != nil {
				c.rules = append(c.rules, parseSavedRule(line, w[2:]))
			}
		}
	}
	return all
}

func addSavedChain(t *table, w []string) {
	if len(w) < 2 {
		return
	}
	c := &chain{name: "chain " + w[0]}
	if hook, ok := legacyHooks[w[0]]; ok {
		c.base, c.hook, c.drops = true, hook, w[1] == "DROP"
	}
	t.chains[w[0]] = c
	t.order = append(t.order, c)
}

// words splits a line at spaces outside of double quotes, in which a backslash
// keeps the next character.
func words(line string) []string {
	var all []string
	var word strings.Builder
	quoted, started := false, false
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '\\' && quoted && i+1 < len(line):
			i++
			word.WriteByte(line[i])
		case c == '"':
			quoted, started = !quoted, true
		case c == ' ' && !quoted:
			if started {
				all = append(all, word.String())
			}
			word.Reset()
			started = false
		default:
			word.WriteByte(c)
			started = true
		}
	}
	if started {
		all = append(all, word.String())
	}
	return all
}

// senderOptions are those of the matches owner and cgroup.
var senderOptions = []string{"--uid-owner", "--gid-owner", "--socket-exists", "--cgroup", "--path"}

// savedRule is one rule of the old tables.
type savedRule struct {
	text  string
	conds []func(*packet) (is truth, named bool)
	does  verdict
	// is is maybe for a target that may do several things.
	is     truth
	target string
	sender bool
}

func (r *savedRule) asksSender() bool { return r.sender }

func (r *savedRule) String() string { return "rule " + r.text }

func (r *savedRule) judge(p *packet) outcome {
	o := outcome{match: r.is, verdict: r.does, target: r.target}
	for _, c := range r.conds {
		is, named := c(p)
		o.match = min(o.match, is)
		o.named = o.named || named
	}
	return o
}

// parseSavedRule knows addresses, interfaces, TCP and the state; every other
// condition is in doubt.
func parseSavedRule(line string, w []string) *savedRule {
	r := &savedRule{text: line, is: yes}
	not := false
	for i := 0; i < len(w); i++ {
		if w[i] == "!" {
			not = true
			continue
		}
		if !strings.HasPrefix(w[i], "-") {
			continue
		}
		arg := ""
		if i+1 < len(w) {
			arg = w[i+1]
		}
		switch w[i] {
		case "-m":
			// What follows are its own options; the name is not one.
		case "--comment":
			i++ // which may look like an option
		case "-j":
			r.jump(arg, jump)
			return r
		case "-g":
			r.jump(arg, goTo)
			return r
		default:
			r.sender = r.sender || slices.Contains(senderOptions, w[i])
			r.conds = append(r.conds, savedCond(w[i], arg, not))
		}
		not = false
	}
	return r
}

func (r *savedRule) jump(to string, how verdict) {
	if how == jump && to == strings.ToUpper(to) {
		does, is := targetVerdict(to)
		if is == yes {
			r.does = does
			return
		}
	}
	// A chain, or a target that is not known: the walk finds no such
	// chain and is in doubt.
	r.does, r.target = how, to
}

// savedCond is one condition of a rule.
func savedCond(option, arg string, not bool) func(*packet) (truth, bool) {
	ask := func(*packet) truth { return maybe }
	switch option {
	case "-s", "-d":
		prefix, err := netip.ParsePrefix(arg)
		if err != nil {
			break
		}
		ask = func(p *packet) truth {
			a := p.dst
			if option == "-s" {
				a = p.src
			}
			return contains(prefix, a)
		}
	case "-i":
		ask = func(p *packet) truth { return onLo(arg, p.inbound) }
	case "-o":
		ask = func(p *packet) truth { return onLo(arg, !p.inbound) }
	case "-p":
		ask = func(*packet) truth { return either(arg == "tcp" || arg == "all") }
	case "--ctstate", "--state":
		ask = func(p *packet) truth { return inState(arg, p.ctState) }
	}
	return func(p *packet) (truth, bool) {
		is := ask(p)
		if not {
			return is.not(), false
		}
		return is, is == yes && (option == "-s" || option == "-d")
	}
}

func either(b bool) truth {
	if b {
		return yes
	}
	return no
}

func contains(p netip.Prefix, a netip.Addr) truth {
	if !a.IsValid() {
		return maybe
	}
	return either(p.Contains(a))
}

// onLo tells whether an interface of a rule is lo. there is false where the
// packet has none.
func onLo(name string, there bool) truth {
	if begin, any := strings.CutSuffix(name, "+"); any {
		return either(there && strings.HasPrefix("lo", begin))
	}
	return either(there && name == "lo")
}

func inState(list string, state uint32) truth {
	bits := map[string]uint32{"INVALID": 1, "ESTABLISHED": 2, "RELATED": 4, "NEW": 8}
	is := no
	for _, s := range strings.Split(list, ",") {
		bit, ok := bits[s]
		if ok && bit == state {
			return yes
		}
		if !ok {
			is = maybe
		}
	}
	return is
}
