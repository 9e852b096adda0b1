package bpf

import (
	_ "embed"
	"errors"
	"fmt"
	"go/ast"
	"go/constant"
	"go/parser"
	"go/token"
	"go/types"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
)

// The sources are embedded, so that the test binary needs no checkout: it also
// runs in the virtual machine.
var (
	//go:embed include/abi.h
	abiHeader string
	//go:embed types.go
	typesSource string
	//go:embed abi_bpfel.go
	bindingsSource string
)

// member is one name of a C enum.
type member struct {
	Name  string
	Value int
}

var (
	cComment = regexp.MustCompile(`(?s)/\*.*?\*/`)
	cEnum    = regexp.MustCompile(`(?s)enum (\w+) \{(.*?)\};`)
	cDefine  = regexp.MustCompile(`(?m)^#define (\w+) (\w+)\s*$`)
)

// enumsOf reads every enum of a C header, in the order of its members.
func enumsOf(header string) (map[string][]member, error) {
	enums := map[string][]member{}
	for _, e := range cEnum.FindAllStringSubmatch(cComment.ReplaceAllString(header, ""), -1) {
		next := 0
		for _, item := range strings.Split(e[2], ",") {
			name, value, explicit := strings.Cut(item, "=")
			if name = strings.TrimSpace(name); name == "" {
				continue
			}
			if explicit {
				n, err := strconv.ParseInt(strings.TrimSpace(value), 0, 32)
				if err != nil {
					return nil, fmt.Errorf("read enum %s: %w", e[1], err)
				}
				next = int(n)
			}
			enums[e[1]] = append(enums[e[1]], member{name, next})
			next++
		}
	}
	return enums, nil
}

// definesOf reads every #define of one number.
func definesOf(header string) (map[string]uint64, error) {
	defines := map[string]uint64{}
	for _, d := range cDefine.FindAllStringSubmatch(cComment.ReplaceAllString(header, ""), -1) {
		n, err := strconv.ParseUint(d[2], 0, 64)
		if err != nil {
			return nil, fmt.Errorf("read #define %s: %w", d[1], err)
		}
		defines[d[1]] = n
	}
	return defines, nil
}

// goConstants evaluates the exported constants that types.go declares.
func goConstants() (map[string]uint64, error) {
	fset := token.NewFileSet()
	var files []*ast.File
	for name, source := range map[string]string{"types.go": typesSource, "abi_bpfel.go": bindingsSource} {
		f, err := parser.ParseFile(fset, name, source, parser.SkipObjectResolution)
		if err != nil {
			return nil, fmt.Errorf("parse %s: %w", name, err)
		}
		files = append(files, f)
	}
	conf := types.Config{
		Importer:         noImports{},
		Error:            func(error) {}, // or Check stops at the first
		IgnoreFuncBodies: true,
	}
	// The error is that the imports are missing; it comes with a package.
	pkg, _ := conf.Check("bpf", fset, files, nil)
	consts := map[string]uint64{}
	for _, name := range pkg.Scope().Names() {
		c, ok := pkg.Scope().Lookup(name).(*types.Const)
		if !ok || !c.Exported() {
			continue
		}
		v, exact := constant.Uint64Val(c.Val())
		if !exact {
			return nil, fmt.Errorf("constant %s is no unsigned number: %v", name, c.Val())
		}
		consts[name] = v
	}
	return consts, nil
}

// noImports is an importer that has nothing: no constant depends on an import.
type noImports struct{}

func (noImports) Import(string) (*types.Package, error) {
	return nil, errors.New("no imports here")
}

// camel makes SLOT_FREE SlotFree.
func camel(c string) string {
	var b strings.Builder
	for _, word := range strings.Split(strings.ToLower(c), "_") {
		if word != "" {
			b.WriteString(strings.ToUpper(word[:1]) + word[1:])
		}
	}
	return b.String()
}

// goEnums are the enums of abi.h whose Go constants stand in types.go. count
// tells whether the last member, the number of the others, is one of them.
var goEnums = map[string]struct{ count bool }{
	"slot_state":    {},
	"route_kind":    {},
	"on_failure":    {},
	"event_kind":    {},
	"held_kind":     {},
	"hold":          {},
	"instance_kind": {},
	"ending":        {},
	"tally":         {count: true},
}

// flowEnums are the enums of abi.h whose names package flow has.
var flowEnums = map[string]struct {
	prefix string
	names  func() []string
}{
	"reason":       {"REASON_", func() []string { return texts(flow.Reasons()[:flow.KernelReasons]) }},
	"conn_path":    {"PATH_", func() []string { return texts(flow.Paths()) }},
	"connect_mode": {"CONNECT_", func() []string { return texts(flow.ConnectModes()) }},
	"policy":       {"POLICY_", func() []string { return texts(flow.Policies()) }},
	"hash_on":      {"HASH_", func() []string { return texts(flow.HashOns()) }},
}

func texts[T fmt.Stringer](values []T) []string {
	var all []string
	for _, v := range values {
		all = append(all, v.String())
	}
	return all
}

// cut takes the count off the end of an enum, and checks that it is one.
func cut(t *testing.T, enum string, members []member) []member {
	t.Helper()
	last := members[len(members)-1]
	members = members[:len(members)-1]
	if !strings.HasSuffix(last.Name, "__COUNT") {
		t.Fatalf("enum %s ends in %s, not in its count", enum, last.Name)
	}
	if last.Value != len(members) {
		t.Errorf("%s = %d, but %d members stand before it", last.Name, last.Value, len(members))
	}
	return members
}

func TestEnumsHaveATwin(t *testing.T) {
	enums, err := enumsOf(abiHeader)
	if err != nil {
		t.Fatal(err)
	}
	for name := range enums {
		_, inFlow := flowEnums[name]
		_, here := goEnums[name]
		if !inFlow && !here {
			t.Errorf("enum %s of include/abi.h is compared with nothing in Go", name)
		}
	}
	if want := len(flowEnums) + len(goEnums); len(enums) != want {
		t.Errorf("include/abi.h has %d enums, the tables of this test %d", len(enums), want)
	}
}

func TestFlowEnums(t *testing.T) {
	enums, err := enumsOf(abiHeader)
	if err != nil {
		t.Fatal(err)
	}
	for enum, twin := range flowEnums {
		t.Run(enum, func(t *testing.T) {
			var got []string
			for i, m := range cut(t, enum, enums[enum]) {
				if m.Value != i {
					t.Errorf("%s = %d at position %d", m.Name, m.Value, i)
				}
				short, ok := strings.CutPrefix(m.Name, twin.prefix)
				if !ok {
					t.Errorf("%s lacks the prefix %s", m.Name, twin.prefix)
				}
				got = append(got, strings.ToLower(short))
			}
			if diff := cmp.Diff(twin.names(), got); diff != "" {
				t.Errorf("package flow and include/abi.h differ (-flow +abi.h):\n%s", diff)
			}
		})
	}
}

func TestGoEnums(t *testing.T) {
	enums, err := enumsOf(abiHeader)
	if err != nil {
		t.Fatal(err)
	}
	consts, err := goConstants()
	if err != nil {
		t.Fatal(err)
	}
	for enum, twin := range goEnums {
		t.Run(enum, func(t *testing.T) {
			members := enums[enum]
			if rest := cut(t, enum, members); !twin.count {
				members = rest
			}
			for _, m := range members {
				v, ok := consts[camel(m.Name)]
				switch {
				case !ok:
					t.Errorf("types.go has no constant %s for %s", camel(m.Name), m.Name)
				case v != uint64(m.Value):
					t.Errorf("%s = %d, %s = %d", camel(m.Name), v, m.Name, m.Value)
				}
			}
		})
	}
}

// goDefines are the #defines of abi.h and their constants in Go. Those without one
// make the supernets, and are compared with what the header's text says.
var goDefines = map[string]string{
	"PL_ABI":              "ABI",
	"PL_SLOTS":            "Slots",
	"PL_SLOT_FIRST":       "SlotFirst",
	"PL_SLOT_LAST":        "SlotLast",
	"PL_SLOT_LISTENER":    "SlotListener",
	"PL_SLOT_CANARY":      "SlotCanary",
	"PL_WORKERS_MAX":      "WorkersMax",
	"PL_CANARY_LISTENER":  "CanaryListener",
	"PL_RULE_PORT_BITS":   "RulePortBits",
	"PL_FRAME_MAX":        "FrameMax",
	"PL_OWNER_DIED":       "OwnerDied",
	"PL_MOVES_SOCKETS":    "MovesSockets",
	"PL_MOVES_LIVE":       "MovesLive",
	"PL_MOVES_SLOTS":      "MovesSlots",
	"PL_MOVES_COUNTS":     "MovesCounts",
	"PL_MOVES_BACK":       "MovesBack",
	"PL_MOVES_CELLS":      "MovesCells",
	"PL_CELLS":            "Cells",
	"PL_SENT_BUCKETS":     "",
	"PL_CELL_LEFT":        "CellLeft",
	"PL_SETS":             "Sets",
	"PL_ENDPOINTS":        "Endpoints",
	"PL_SET_ENDPOINTS":    "SetEndpoints",
	"PL_SET_HEAD":         "SetHead",
	"PL_SET_TABLE_ROW":    "SetTableRow",
	"PL_SET_TABLE":        "SetTableMax",
	"PL_SLOT4_SUPER":      "",
	"PL_SLOT6_SUPER_W0":   "",
	"PL_SLOT6_SUPER_H2":   "",
	"PL_SLOT4_SUPER_MASK": "",
}

func TestDefines(t *testing.T) {
	defines, err := definesOf(abiHeader)
	if err != nil {
		t.Fatal(err)
	}
	consts, err := goConstants()
	if err != nil {
		t.Fatal(err)
	}
	for c, n := range defines {
		name, known := goDefines[c]
		if !known {
			t.Errorf("#define %s of include/abi.h is compared with nothing in Go", c)
			continue
		}
		if name == "" {
			continue
		}
		if v, ok := consts[name]; !ok || v != n {
			t.Errorf("#define %s is %d; constant %s: %d (declared: %v)", c, n, name, v, ok)
		}
	}
	for c := range goDefines {
		if _, ok := defines[c]; !ok {
			t.Errorf("include/abi.h has no #define %s", c)
		}
	}
	supernets := fmt.Sprintf("%d.0.0.0/%d %x:%x:%x::/48",
		defines["PL_SLOT4_SUPER"]>>24, ones(defines["PL_SLOT4_SUPER_MASK"]),
		defines["PL_SLOT6_SUPER_W0"]>>16, defines["PL_SLOT6_SUPER_W0"]&0xffff, defines["PL_SLOT6_SUPER_H2"])
	for _, s := range strings.Fields(supernets) {
		if !strings.Contains(abiHeader, " "+s+" ") {
			t.Errorf("the text of include/abi.h does not name the supernet %s", s)
		}
	}
}

func ones(mask uint64) int { return strings.Count(strconv.FormatUint(mask, 2), "1") }

// TestEveryConstantIsFromTheHeader is TestGoEnums and TestDefines in the other
// direction: Go has no constant that the C side dropped, and what types.go says
// of the enums that package flow has is right.
func TestEveryConstantIsFromTheHeader(t *testing.T) {
	enums, err := enumsOf(abiHeader)
	if err != nil {
		t.Fatal(err)
	}
	consts, err := goConstants()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range goDefines {
		delete(consts, name)
	}
	for _, members := range enums {
		for _, m := range members {
			name := camel(m.Name)
			if v, ok := consts[name]; ok && v != uint64(m.Value) {
				t.Errorf("%s = %d, %s = %d", name, v, m.Name, m.Value)
			}
			delete(consts, name)
		}
	}
	if len(consts) > 0 {
		t.Errorf("constants of types.go that include/abi.h does not have: %v", consts)
	}
}
