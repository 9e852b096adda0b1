package live

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/rig/app"
	"github.com/pillion-project/pillion/tests/testutil"
)

func remove(t testing.TB, file string) {
	t.Helper()
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
}

// mount lays files out as the kubelet does a ConfigMap, and replaces all of them
// by moving one link.
func mount(t testing.TB, dir string, version int, files map[string]string) {
	t.Helper()
	data := filepath.Join(dir, fmt.Sprintf("..version-%d", version))
	if err := os.Mkdir(data, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		write(t, filepath.Join(data, name), text)
	}
	link := filepath.Join(dir, "..data_tmp")
	if err := os.Symlink(filepath.Base(data), link); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(link, filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	for name := range files {
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil && !os.IsExist(err) {
			t.Fatal(err)
		}
	}
	if version > 1 {
		old := filepath.Join(dir, fmt.Sprintf("..version-%d", version-1))
		if err := os.RemoveAll(old); err != nil {
			t.Fatal(err)
		}
	}
}

// TestConfigMap has configuration and endpoints in a ConfigMap that changes.
func TestConfigMap(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	serve(t, r, 1, 2, 3, 4)
	dir := t.TempDir()
	files := func(static, found int) map[string]string {
		return map[string]string{
			"pillion.yaml":   "services:\n" + service(1, "", static) + service(2, fmt.Sprintf("discover: {file: %q}", filepath.Join(dir, "endpoints.json"))),
			"endpoints.json": list(found),
		}
	}
	mount(t, dir, 1, files(1, 2))
	s := &stage{Rig: r, file: filepath.Join(dir, "pillion.yaml")}
	s.Instance = r.Run(t, "", "--config", s.file)
	s.Application = app.Start(t, r)
	s.goes(t, 1, 1)
	s.goes(t, 2, 2)
	for version := 2; version < 6; version++ {
		static, found := 1+version%3, 2+version%3
		mount(t, dir, version, files(static, found))
		s.has(t, "s1", fmt.Sprint(static))
		s.has(t, "s2", fmt.Sprint(found))
		s.goes(t, 1, static)
		s.goes(t, 2, found)
	}
}

// TestConfigurationFile changes the configuration in all the ways in which files
// are changed, and tells nobody.
func TestConfigurationFile(t *testing.T) {
	t.Parallel()
	r := rig.New(t)
	serve(t, r, 1, 2, 3)
	s := newStage(t, r, "services:\n"+service(1, "", 1))
	of := func(n int) string { return "services:\n" + service(1, "", n) }
	s.load(t, 2, 0, vip(1))

	put(t, s.file, of(2))
	s.has(t, "s1", "2")

	write(t, s.file, of(3)) // truncated, then written
	s.has(t, "s1", "3")

	// Truncated and left so for a while: nothing is in it, which is not the same
	// as a configuration without services.
	write(t, s.file, "")
	testutil.Eventually(t, rig.Limit, func() bool { return len(s.status(t).Configuration.Refused) > 0 }, "the empty file is refused")
	s.has(t, "s1", "3")
	write(t, s.file, of(1))
	s.has(t, "s1", "1")

	remove(t, s.file)
	testutil.Eventually(t, rig.Limit, func() bool { return len(s.status(t).Configuration.Refused) > 0 }, "the file is missed")
	s.has(t, "s1", "1")
	write(t, s.file, of(2))
	s.has(t, "s1", "2")
	s.unload(t)

	// A configuration that says that there is nothing is one.
	put(t, s.file, "services: []\n")
	testutil.Eventually(t, rig.Limit, func() bool { return len(s.status(t).Services) == 0 }, "no service is left")
}

// TestFileSource has endpoints in a file, in both formats.
func TestFileSource(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"json", "yaml"} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			onPaths(t, func(t *testing.T, path string) { fileSource(t, format, path) })
		})
	}
}

func fileSource(t *testing.T, format, path string) {
	r := rig.New(t)
	serve(t, r, 1, 2, 3)
	file := filepath.Join(t.TempDir(), "endpoints."+format)
	group := func(targets, labels string) string {
		if format == "json" {
			return fmt.Sprintf(`[{"targets": %s, "labels": {%s}}]`, targets, labels)
		}
		return fmt.Sprintf("- targets: %s\n  labels: {%s}\n", targets, labels)
	}
	put(t, file, group(list(1), `"job": "web"`))
	s := newStage(t, r, "zone: a\nservices:\n"+service(1, fmt.Sprintf("path: %s, discover: {file: %q}", path, file)))
	s.goes(t, 1, 1)
	s.load(t, 2, 0, vip(1))

	put(t, file, group(list(1, 2), `"weight": "3", "zone": "a"`))
	s.has(t, "s1", "1 weight 3 zone a", "2 weight 3 zone a")
	s.goes(t, 1, 1, 2)

	stale := `pillion_discovery_stale{service="s1",source="file"}`
	age := `pillion_discovery_age_seconds{service="s1",source="file"}`
	for name, text := range map[string]string{
		"garbage": "{[", "nothing": "", "a name": group(`["web.example:80"]`, ""), "a mapping": "{}\n", "half": group(list(3), "")[:20],
	} {
		put(t, file, text)
		testutil.Eventually(t, rig.Limit, func() bool { return s.metric(t, stale) == "1" }, name, " is refused")
		s.has(t, "s1", "1 weight 3 zone a", "2 weight 3 zone a")
		source := s.service(t, "s1").Source
		if !source.Stale || !strings.Contains(source.Error, file+":") || source.Name != file {
			t.Errorf("%s: %+v", name, source)
		}
		if got := s.metric(t, age); got == "0" || got == "" {
			t.Errorf("%s: age %q", name, got)
		}
		put(t, file, group(list(1, 2), `"weight": "3", "zone": "a"`))
		testutil.Eventually(t, rig.Limit, func() bool { return s.metric(t, stale) == "0" && s.metric(t, age) == "0" }, "mended")
	}
	remove(t, file)
	testutil.Eventually(t, rig.Limit, func() bool { return s.metric(t, stale) == "1" }, "the file is missed")
	s.goes(t, 1, 1, 2)
	put(t, file, list(2, 3))
	s.has(t, "s1", "2", "3")
	s.goes(t, 1, 2, 3)
	s.unload(t)

	// Nobody, said explicitly.
	put(t, file, "[]")
	s.has(t, "s1")
	testutil.Eventually(t, rig.Limit, func() bool { return s.Dial(t, vip(1)) == "ECONNREFUSED" }, "nobody serves")
	put(t, file, list(3))
	s.has(t, "s1", "3")
	testutil.Eventually(t, rig.Limit, func() bool { return s.Dial(t, vip(1)) == far(3).String() }, "somebody serves again")
	if s.service(t, "s1").Source.Stale {
		t.Error("stale, although the file is right")
	}
}
