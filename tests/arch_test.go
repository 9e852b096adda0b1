package tests

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	root   = ".."
	module = "github.com/pillion-project/pillion"

	maxLines = 600
	maxName  = 15 // of a BPF map or program: the kernel cuts the rest off
)

// rule says what a package may import besides the standard library and what is
// below itself. Patterns are import paths, ours without the module; a trailing
// /... also means everything below.
type rule struct {
	packages string
	may      []string
	because  string
}

const sys = "golang.org/x/sys/..."

// rules are the import table of docs/design.md, section 10. The first that names
// a package holds.
var rules = []rule{
	{"redirect/flow", nil,
		"it is the vocabulary that all share: a leaf, of the standard library only"},
	{"redirect/pace", nil,
		"it is the clock that all share: a leaf, too"},
	{"bpf", []string{"github.com/cilium/ebpf/..."},
		"it is the kernel side and its bindings; it knows nobody of ours"},
	{"loader/...", []string{"bpf", "redirect/flow", "redirect/pace", sys,
		"github.com/cilium/ebpf/...", "github.com/vishvananda/netlink/...", "github.com/vishvananda/netns"},
		"it stands between kernel and process, and knows neither handler, telemetry nor configuration"},
	{"redirect/handler", []string{"redirect/...", sys},
		"it composes the packages of redirect; the kernel comes to it through interfaces"},
	{"redirect/upstream/discover/file", []string{"redirect/upstream/discover/...", sys, "github.com/goccy/go-yaml/..."},
		"it reads YAML with positions; otherwise it is a stage like the others"},
	{"redirect/upstream/discover/dns", []string{"redirect/upstream/discover", sys, "golang.org/x/net/dns/dnsmessage"},
		"it asks name servers itself, since the standard library hides how long an answer holds"},
	{"redirect/upstream/discover/spelling", []string{"github.com/goccy/go-yaml/token"},
		"it knows what people write, and nothing of what it is for"},
	{"redirect/upstream/discover/kube", []string{"redirect/flow", "redirect/upstream/discover", sys, "github.com/goccy/go-yaml"},
		"it is a source of endpoints, and reads kubectl's configuration"},
	{"redirect/upstream/...", []string{"redirect/flow", "redirect/upstream/...", sys},
		"a stage of a connection knows the vocabulary and its own sub-packages"},
	{"redirect/route", []string{"redirect/flow", "redirect/upstream/..."},
		"it leads from destinations to clusters; the kernel is a map in its tests"},
	{"redirect/l4", []string{"redirect/flow", "redirect/upstream/...", sys},
		"it carries bytes to endpoints; who decides where to is the handler's business"},
	{"redirect/l7", []string{"redirect/flow", "redirect/upstream/...", sys},
		"it carries requests to endpoints; who decides where to is the handler's business"},
	{"redirect/...", []string{"redirect/flow", "redirect/pace", sys},
		"a stage of a connection knows the vocabulary; the handler joins the stages"},
	{"telemetry/events", []string{"redirect/flow", "redirect/pace", "bpf", "github.com/cilium/ebpf/...", sys},
		"it joins the kernel's records with the handler's, through an interface"},
	{"telemetry/...", []string{"redirect/flow", "github.com/prometheus/...", sys},
		"it tells what happened; loader and handler are plain values to it"},
	{"cmd/pillion/handover", []string{sys},
		"it is what two processes say to each other, which may be of different versions"},
	{"cmd/...", []string{"...", "bpf", "loader/...", "redirect/...", "telemetry/...", "cmd/..."},
		"the command knows everybody but the tests"},
	{"scripts/image", nil,
		"it writes what is shipped, and needs Go and git alone"},
	{"tests/...", []string{"...", "bpf", "loader/...", "redirect/...", "telemetry/...", "cmd/...", "tests/..."},
		"a test may look anywhere"},
}

// matches tells whether pattern names path. The pattern ... is every package
// that is not ours.
func matches(pattern, path string) bool {
	if pattern == "..." {
		return isForeign(path)
	}
	prefix, below := strings.CutSuffix(pattern, "/...")
	return path == prefix || below && strings.HasPrefix(path, prefix+"/")
}

func isForeign(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return strings.Contains(first, ".")
}

// ruleOf returns the rule that holds for a package of ours.
func ruleOf(pkg string) (rule, bool) {
	for _, r := range rules {
		if matches(r.packages, pkg) {
			return r, true
		}
	}
	return rule{}, false
}

// checkImport returns why pkg may not import path; both without the module.
func checkImport(pkg, path string) error {
	r, ok := ruleOf(pkg)
	if !ok {
		return fmt.Errorf("package %s has no rule: give it one in tests/arch_test.go and in docs/design.md, section 10", pkg)
	}
	if path == "C" {
		return fmt.Errorf("%s uses cgo: the binary is static, and builds with Go alone", pkg)
	}
	if !isForeign(path) && !isOurs(path) || strings.HasPrefix(path, pkg+"/") {
		return nil
	}
	for _, pattern := range r.may {
		if matches(pattern, path) {
			return nil
		}
	}
	return fmt.Errorf("%s imports %s, but %s may import only: %s. Because %s",
		pkg, path, r.packages, strings.Join(append([]string{"std"}, r.may...), ", "), r.because)
}

// isOurs tells an import path of ours, without the module, from the standard
// library's. None of ours is named like one of its top directories.
func isOurs(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return slices.Contains([]string{"bpf", "cmd", "loader", "redirect", "scripts", "telemetry", "tests"}, first)
}

// listed is what go list says of a package.
type listed struct {
	ImportPath, Dir, Doc string
	Files                []string // not tests; also those of other platforms
}

// listPackages asks go list for every package of the module, also for those that
// do not compile.
func listPackages(t *testing.T) []listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Dir,Doc", "./...")
	cmd.Dir = root
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	var all []listed
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("read what go list says: %v", err)
		}
		names, err := filepath.Glob(filepath.Join(p.Dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if !strings.HasSuffix(name, "_test.go") {
				p.Files = append(p.Files, name)
			}
		}
		all = append(all, p)
	}
	if len(all) < 10 {
		t.Fatalf("go list finds %d packages: is this the module?", len(all))
	}
	return all
}

// short is an import path without the module.
func short(path string) string { return strings.TrimPrefix(strings.TrimPrefix(path, module), "/") }

func TestImports(t *testing.T) {
	for _, p := range listPackages(t) {
		for _, name := range p.Files {
			fset := token.NewFileSet()
			f, err := parser.ParseFile(fset, name, nil, parser.ImportsOnly)
			if err != nil {
				t.Errorf("parse: %v", err)
				continue
			}
			for _, spec := range f.Imports {
				path, err := strconv.Unquote(spec.Path.Value)
				if err != nil {
					t.Fatal(err)
				}
				if err := checkImport(short(p.ImportPath), short(path)); err != nil {
					t.Errorf("%s: %v", fset.Position(spec.Pos()), err)
				}
			}
		}
	}
}

// TestRules holds the rules themselves to a table, so that a pattern with a slip
// is not one that allows everything.
func TestRules(t *testing.T) {
	for _, tt := range []struct {
		pkg, imports string
		allowed      bool
	}{
		{"redirect/flow", "net/netip", true},
		{"redirect/flow", "golang.org/x/sys/unix", false},
		{"redirect/flow", "bpf", false},
		{"bpf", "github.com/cilium/ebpf", true},
		{"bpf", "github.com/cilium/ebpf/btf", true},
		{"bpf", "redirect/flow", false},
		{"loader", "bpf", true},
		{"loader", "loader/probe", true},
		{"loader/probe", "redirect/flow", true},
		{"loader", "github.com/vishvananda/netlink", true},
		{"loader", "redirect/handler", false},
		{"loader", "telemetry/events", false},
		{"loader", "cmd/pillion/config", false},
		{"redirect/handler", "redirect/l4", true},
		{"redirect/handler", "redirect/upstream/health", true},
		{"redirect/handler", "bpf", false},
		{"redirect/handler", "loader", false},
		{"redirect/handler", "github.com/cilium/ebpf", false},
		{"redirect/handler", "github.com/prometheus/client_golang/prometheus", false},
		{"redirect/l4", "redirect/upstream", true},
		{"redirect/l4", "redirect/handler", false},
		{"redirect/l4", "redirect/route", false},
		{"redirect/route", "redirect/upstream/balance", true},
		{"redirect/route", "redirect/l4", false},
		{"redirect/origdst", "redirect/flow", true},
		{"redirect/origdst", "redirect/upstream", false},
		{"redirect/upstream", "redirect/upstream/health", true},
		{"redirect/upstream/balance", "redirect/upstream", true},
		{"redirect/upstream/discover/file", "github.com/goccy/go-yaml/ast", true},
		{"redirect/upstream/discover/spelling", "github.com/goccy/go-yaml/token", true},
		{"redirect/upstream/discover/spelling", "redirect/flow", false},
		{"redirect/upstream/discover/file", "redirect/upstream/discover/watch", true},
		{"redirect/upstream/discover/file", "redirect/upstream", false},
		{"redirect/upstream/discover/dns", "golang.org/x/net/dns/dnsmessage", true},
		{"redirect/upstream/discover/dns", "golang.org/x/net/http2", false},
		{"redirect/upstream", "redirect/route", false},
		{"telemetry/events", "bpf", true},
		{"telemetry/events", "github.com/prometheus/client_golang/prometheus", false},
		{"telemetry/metrics", "github.com/prometheus/client_golang/prometheus", true},
		{"telemetry/metrics", "bpf", false},
		{"telemetry/metrics", "telemetry/events", false},
		{"telemetry/admin", "loader", false},
		{"telemetry/admin", "redirect/handler", false},
		{"cmd/pillion", "loader", true},
		{"cmd/pillion/handover", "golang.org/x/sys/unix", true},
		{"cmd/pillion/handover", "redirect/l4", false},
		{"cmd/pillion", "github.com/spf13/cobra", true},
		{"cmd/pillion", "tests/testutil", false},
		{"tests/e2e", "tests/testutil", true},
		{"loader", "tests/testutil", false},
		{"loader", "C", false},
		{"somewhere", "fmt", false},
	} {
		err := checkImport(tt.pkg, tt.imports)
		if (err == nil) != tt.allowed {
			t.Errorf("%s imports %s: allowed %v, want %v: %v", tt.pkg, tt.imports, err == nil, tt.allowed, err)
		}
	}
}

func TestPackageDocs(t *testing.T) {
	for _, p := range listPackages(t) {
		if p.Doc == "" {
			t.Errorf("%s has no package comment: write it in doc.go", short(p.ImportPath))
		}
	}
}

// TestDocs wants a comment on everything that a package exports. A group's
// comment serves its members.
func TestDocs(t *testing.T) {
	for _, p := range listPackages(t) {
		for _, name := range p.Files {
			fset := token.NewFileSet()
			f, err := parser.ParseFile(fset, name, nil, parser.ParseComments|parser.SkipObjectResolution)
			if err != nil {
				t.Errorf("parse: %v", err)
				continue
			}
			if ast.IsGenerated(f) {
				continue
			}
			for _, decl := range f.Decls {
				for _, id := range undocumented(decl) {
					t.Errorf("%s: %s is exported and has no comment", fset.Position(id.Pos()), id.Name)
				}
			}
		}
	}
}

func undocumented(decl ast.Decl) []*ast.Ident {
	var bad []*ast.Ident
	switch d := decl.(type) {
	case *ast.FuncDecl:
		if d.Doc == nil && d.Name.IsExported() && (d.Recv == nil || ast.IsExported(receiver(d))) {
			bad = append(bad, d.Name)
		}
	case *ast.GenDecl:
		if d.Doc != nil {
			return nil
		}
		for _, spec := range d.Specs {
			switch s := spec.(type) {
			case *ast.TypeSpec:
				if s.Doc == nil && s.Comment == nil && s.Name.IsExported() {
					bad = append(bad, s.Name)
				}
			case *ast.ValueSpec:
				for _, name := range s.Names {
					if s.Doc == nil && s.Comment == nil && name.IsExported() {
						bad = append(bad, name)
					}
				}
			}
		}
	}
	return bad
}

// receiver returns the name of a method's type.
func receiver(d *ast.FuncDecl) string {
	typ := d.Recv.List[0].Type
	for {
		switch e := typ.(type) {
		case *ast.StarExpr:
			typ = e.X
		case *ast.IndexExpr:
			typ = e.X
		case *ast.IndexListExpr:
			typ = e.X
		case *ast.Ident:
			return e.Name
		default:
			return ""
		}
	}
}

// source is one file that people write, by its path from the root.
type source struct{ path, text string }

var (
	generated = regexp.MustCompile(`(?m)^// Code generated .* DO NOT EDIT\.$`)
	written   = []string{".go", ".c", ".h", ".sh", ".py", ".js", ".java"}
)

// sources reads every file that people write, with one of the extensions.
func sources(t *testing.T, extensions ...string) []source {
	t.Helper()
	var all []source
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // a temporary file of somebody else's
			}
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			hidden := strings.HasPrefix(d.Name(), ".") && rel != "."
			if hidden || rel == "build" || rel == "bpf/headers" || d.Name() == "testdata" {
				return filepath.SkipDir
			}
			return nil
		}
		if !slices.Contains(extensions, filepath.Ext(path)) || !d.Type().IsRegular() {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil || generated.Match(b) {
			return err
		}
		all = append(all, source{rel, string(b)})
		return nil
	})
	if err != nil {
		t.Fatalf("read the tree: %v", err)
	}
	if len(all) == 0 {
		t.Fatalf("no file with one of %v below %s", extensions, root)
	}
	return all
}

func TestFileSizes(t *testing.T) {
	for _, f := range sources(t, written...) {
		if n := strings.Count(f.text, "\n"); n > maxLines {
			t.Errorf("%s has %d lines, and %d are enough for one subject: split it", f.path, n, maxLines)
		}
	}
}

// TestHabits looks for what a review would otherwise have to find.
func TestHabits(t *testing.T) {
	marker := regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|XX` + `X)\b`)
	register := regexp.MustCompile(`(?m)^func init\(\)`)
	for _, f := range sources(t, written...) {
		if m := marker.FindString(f.text); m != "" {
			t.Errorf("%s: %s: what is left to do stands in an issue", f.path, m)
		}
		if register.MatchString(f.text) {
			t.Errorf("%s: init(): nothing happens because a package was imported", f.path)
		}
	}
}

var (
	bpfMap     = regexp.MustCompile(`\} (\w+) SEC\("\.maps"\)`)
	bpfProgram = regexp.MustCompile(`SEC\("[^"]+"\)\s+int (\w+)\(`)
	bpfPrint   = regexp.MustCompile(`\bbpf_(trace_v?)?printk\b`)
	bpfFeature = regexp.MustCompile(`(?m)^\s*#\s*if`)
)

func TestBPFSources(t *testing.T) {
	const ignore = "//go:build ignore\n"
	var nmaps, nprogs int
	for _, f := range sources(t, ".c", ".h") {
		if filepath.Ext(f.path) == ".c" && !strings.HasPrefix(f.text, ignore) {
			t.Errorf("%s: line 1 is not %q: with cgo on, go build takes the file for cgo's", f.path, ignore)
		}
		if !strings.HasPrefix(f.path, "bpf/") {
			continue
		}
		for _, m := range bpfMap.FindAllStringSubmatch(f.text, -1) {
			nmaps++
			if len(m[1]) > maxName {
				t.Errorf("%s: map %s: the kernel keeps %d characters of its name", f.path, m[1], maxName)
			}
		}
		for _, m := range bpfProgram.FindAllStringSubmatch(f.text, -1) {
			nprogs++
			if len(m[1]) > maxName || !strings.HasPrefix(m[1], "pl_") {
				t.Errorf("%s: program %s: its name is pl_ and a hook, %d characters at most", f.path, m[1], maxName)
			}
		}
		if m := bpfPrint.FindString(f.text); m != "" {
			t.Errorf("%s: %s: it writes to a pipe that all of the machine shares; count a reason", f.path, m)
		}
		if bpfFeature.MatchString(f.text) {
			t.Errorf("%s: conditional compilation: a knob of include/config.h is a variable", f.path)
		}
	}
	if nmaps < 10 || nprogs < 9 {
		t.Errorf("found %d maps and %d programs: do the patterns of this test still fit?", nmaps, nprogs)
	}
}
