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

	"github.com/google/go-cmp/cmp"
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

// run runs tests by their keywords or numbers, and returns the result of each.
func (s *curlSuite) run(t testing.TB, tests ...string) []string {
	t.Helper()
	args := append([]string{"runtests.pl", "-a", "-am", "-n", "-c", s.curl, "-vc", filepath.Join(s.tree, "src/curl"),
		"-o", "LIBDIR=" + s.libs, "-o", "HOSTIP=" + rig.Far4.String(), "-o", "HOST6IP=[" + rig.Far6.String() + "]",
		"-o", "CLIENTIP=" + testutil.AppV4.Addr().String(), "-o", "CLIENT6IP=[" + testutil.AppV6.Addr().String() + "]"}, tests...)
	src := filepath.Join(s.tree, "tests")
	cmd := exec.Command("perl", append([]string{"-I" + src, filepath.Join(src, args[0])}, args[1:]...)...)
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "srcdir="+src, "LC_ALL=C.UTF-8", "USER=root")
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

// What runtests.pl says of those that passed, one by one, and of the others
// together. It says nothing of those that it does not run.
var (
	curlPass = regexp.MustCompile(`(?m)^PASS: (\d+) - `)
	curlFail = regexp.MustCompile(`(?m)^TESTFAIL: These test cases failed: (.*)$`)
)

// curlResults returns the number of each test with its result.
func curlResults(out string) (all []string) {
	for _, m := range curlPass.FindAllStringSubmatch(out, -1) {
		all = append(all, m[1]+" pass")
	}
	for _, m := range curlFail.FindAllStringSubmatch(out, -1) {
		for number := range strings.FieldsSeq(m[1]) {
			all = append(all, number+" fail")
		}
	}
	return all
}

// curlGroups are what a direct connection can serve, by curl's own keywords, and
// curlShort is some of each.
var (
	curlGroups = []string{"HTTP", "HTTPS", "FTP", "FTPS", "SMTP", "IMAP", "POP3", "TELNET", "SOCKS4", "SOCKS5", "SOCKS5h", "!flaky"}
	curlShort  = strings.Fields("1 3 17 47 80 100 103 141 240 300 500 506 552 700 701 800 850 900 1400 1452")
)

// repeats is how often a test is run again whose results differ.
const repeats = 3

// TestCurl runs curl's own suite, its servers in the world.
func TestCurl(t *testing.T) {
	testutil.Need(t, "perl", "nsenter", "stunnel4", "make", "gcc")
	tests, least := curlShort, 19
	if long() {
		tests, least = curlGroups, 1000
	}
	s := newCurlSuite(t)
	direct := s.run(t, tests...)
	t.Logf("without: %s", curlCount(direct))
	if n := curlPassed(direct); n < least {
		t.Fatalf("%d tests pass without Pillion, want %d\n%s", n, least, strings.Join(direct, "\n"))
	}
	b := ride(t, s.Rig)
	relayed := s.run(t, tests...)
	t.Logf("with: %s", curlCount(relayed))

	differ := curlDiffer(direct, relayed)
	var again [][]string
	if len(differ) > 0 {
		t.Logf("differ: %s (- without, + with)\n%s", differ, cmp.Diff(direct, relayed))
		for range repeats {
			again = append(again, s.run(t, differ...))
		}
	}
	b.proof(t, least)
	if len(differ) > 0 {
		curlRepeat(t, differ, again)
	}
}

// curlRepeat runs tests again without Pillion, and fails the test if they differ
// from what they gave with it. What does not differ then is what the tests, or
// the machine, do by themselves now and then.
func curlRepeat(t *testing.T, tests []string, relayed [][]string) {
	t.Helper()
	s := newCurlSuite(t)
	for _, with := range relayed {
		without := s.run(t, tests...)
		if diff := cmp.Diff(without, with); diff != "" {
			t.Errorf("with Pillion it differs, again (- without, + with):\n%s", diff)
		}
	}
}

// curlDiffer returns the numbers of the tests whose results are not the same.
func curlDiffer(a, b []string) (tests []string) {
	for _, pair := range [][2][]string{{a, b}, {b, a}} {
		for _, line := range pair[0] {
			number, _, _ := strings.Cut(line, " ")
			if !slices.Contains(pair[1], line) && !slices.Contains(tests, number) {
				tests = append(tests, number)
			}
		}
	}
	return tests
}

func curlPassed(results []string) (n int) {
	for _, r := range results {
		if strings.HasSuffix(r, " pass") {
			n++
		}
	}
	return n
}

// curlCount sums up results.
func curlCount(results []string) string {
	var failed []string
	for _, r := range results {
		if number, ok := strings.CutSuffix(r, " fail"); ok {
			failed = append(failed, number)
		}
	}
	return fmt.Sprintf("%d tests: %d passed, %d failed %s", len(results), curlPassed(results), len(failed), failed)
}
