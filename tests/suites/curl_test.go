package suites

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
)

// curlLimit is how long curl's suite may take.
const curlLimit = 40 * time.Minute

// curlBuild builds curl with all that its suite needs, and returns the tree.
var curlBuild = sync.OnceValues(func() (string, error) {
	dir, done, err := cache("curl", "curl.sh")
	if err != nil {
		return "", err
	}
	defer done()
	tree := filepath.Join(dir, "build")
	if _, err := os.Stat(tree); err == nil {
		return tree, nil
	}
	if out, err := exec.Command("./curl.sh", dir).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build curl: %w\n%s", err, out[max(0, len(out)-8<<10):])
	}
	return tree, nil
})

// curlSuite is curl's own suite, with its servers in the world and every client
// that it starts an application.
type curlSuite struct {
	*rig.Rig
	tree string
	dir  string // what stands for tree/tests
	libs string // what stands for tree/tests/libtest
	curl string // what stands for tree/src/curl
	runs int
}

func newCurlSuite(t testing.TB) *curlSuite {
	t.Helper()
	tree, err := curlBuild()
	if err != nil {
		t.Fatal(err)
	}
	top := t.TempDir()
	s := &curlSuite{Rig: rig.New(t), tree: tree, dir: filepath.Join(top, "tests"), libs: filepath.Join(top, "wrapped"), curl: filepath.Join(top, "curl")}
	s.Give(t, rig.Far4)
	s.Give(t, rig.Far6)
	// A process enters the scope and the application's namespace, and is the
	// program from then on.
	enter := fmt.Sprintf("#!/bin/sh\necho 0 >%s/cgroup.procs && exec nsenter --net=/proc/%d/fd/%d -- ", s.Scope.Path, os.Getpid(), s.App.FD())
	wrapper := filepath.Join(top, "enter")
	programs, err := filepath.Glob(filepath.Join(tree, "tests/libtest/*"))
	if err != nil || len(programs) == 0 {
		t.Fatalf("no test programs in %s: %v", tree, err)
	}
	for _, f := range []struct{ path, text string }{
		{s.curl, enter + filepath.Join(tree, "src/curl") + ` "$@"`},
		{wrapper, enter + filepath.Join(tree, "tests/libtest") + `/"${0##*/}" "$@"`},
	} {
		if err := os.WriteFile(f.path, []byte(f.text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	links := map[string]string{}
	for _, name := range []string{"src", "lib", "curl-config", "tests/server", "tests/libtest", "tests/certs"} {
		links[filepath.Join(top, name)] = filepath.Join(tree, name)
	}
	for _, p := range programs {
		if info, err := os.Stat(p); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			links[filepath.Join(s.libs, filepath.Base(p))] = wrapper
		}
	}
	for _, dir := range []string{s.dir, s.libs} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range links {
		if err := os.Symlink(to, link); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// run runs tests by their keywords or numbers, and returns the result of each
// and the reasons for which others were not run.
func (s *curlSuite) run(t testing.TB, tests ...string) []string {
	t.Helper()
	args := append([]string{"runtests.pl", "-a", "-am", "-n", "-c", s.curl, "-vc", filepath.Join(s.tree, "src/curl"),
		"-o", "LIBDIR=" + s.libs, "-o", "HOSTIP=" + rig.Far4.String(), "-o", "HOST6IP=[" + rig.Far6.String() + "]",
		"-o", "CLIENTIP=" + testutil.AppV4.Addr().String(), "-o", "CLIENT6IP=[" + testutil.AppV6.Addr().String() + "]"}, tests...)
	src := filepath.Join(s.tree, "tests")
	cmd := exec.Command("perl", append([]string{"-I" + src, filepath.Join(src, args[0])}, args[1:]...)...)
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "srcdir="+src, "LC_ALL=C", "USER=root")
	out, err := os.Create(filepath.Join(s.dir, fmt.Sprintf("../out.%d", s.runs)))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	s.runs++
	cmd.Stdout, cmd.Stderr = out, out
	home := testutil.NewCgroup(t) // ends the servers, whatever happens
	if err := (testutil.Place{NS: s.World, Cgroup: home}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(curlLimit, func() { cmd.Process.Kill() })
	defer late.Stop()
	err = cmd.Wait() // fails if a test does, which the output tells better
	text, readErr := os.ReadFile(out.Name())
	if readErr != nil {
		t.Fatal(readErr)
	}
	if !bytes.Contains(text, []byte("TESTDONE:")) {
		t.Fatalf("runtests.pl: %v\n%s", err, text[max(0, len(text)-16<<10):])
	}
	return curlResults(string(text))
}

var (
	curlResult  = regexp.MustCompile(`(?m)^(PASS|FAIL): (\d+) - .*$`)
	curlSkipped = regexp.MustCompile(`(?m)^TESTINFO: ("[^\n]*")$|^TESTINFO: (".*)$`)
)

// curlResults sorts what runtests.pl says: the number of each test with its
// result, and why others were skipped.
func curlResults(out string) []string {
	var all []string
	for _, m := range curlResult.FindAllStringSubmatch(out, -1) {
		all = append(all, fmt.Sprintf("%s %s", m[2], strings.ToLower(m[1])))
	}
	for _, m := range curlSkipped.FindAllStringSubmatch(out, -1) {
		all = append(all, "skipped "+m[1]+m[2])
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func TestCurl(t *testing.T) {
	s := newCurlSuite(t)
	direct := s.run(t, strings.Fields(os.Getenv("CURLT"))...)
	b := ride(t, s.Rig)
	relayed := s.run(t, strings.Fields(os.Getenv("CURLT"))...)
	t.Logf("%q\n%q", direct, relayed)
	b.Idle(t)
	for _, rec := range b.records(t, 1) {
		if rec.Path != flow.PathRelay {
			t.Logf("%+v", rec)
		}
	}
	t.Log(b.Totals(t))
	text, _ := os.ReadFile(filepath.Join(s.dir, "../out.0"))
	os.WriteFile("/tmp/hs/out.0", text, 0o644)
	text, _ = os.ReadFile(filepath.Join(s.dir, "../out.1"))
	os.WriteFile("/tmp/hs/out.1", text, 0o644)
}
