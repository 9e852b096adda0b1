package deploy

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// exposureMax is where systemd-analyze's OK ends.
const exposureMax = 4.0

// analyze runs systemd-analyze over the units, with a service that has the
// drop-in.
func analyze(t *testing.T, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		if os.Getenv("PILLION_REQUIRE_ROOT") != "" {
			t.Fatal("systemd-analyze is not installed")
		}
		t.Skip("systemd-analyze is not installed")
	}
	units := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(units, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// The binary is not installed where tests run.
	unit := strings.ReplaceAll(unitText(t, "pillion@.service"), "/usr/local/bin/pillion", "/bin/true")
	write("pillion@.service", unit)
	write("pillion@shop.service", unit)
	write("shop.service", "[Service]\nExecStart=/bin/true\n")
	write("shop.service.d/pillion.conf", unitText(t, "pillion.conf"))
	for i, a := range args {
		if strings.HasSuffix(a, ".service") {
			args[i] = filepath.Join(units, a)
		}
	}
	cmd := exec.Command("systemd-analyze", args...)
	cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+units+":", "LC_ALL=C.UTF-8")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	// An unknown option is only told of.
	if err != nil || stderr.Len() > 0 {
		t.Errorf("systemd-analyze %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

func unitText(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "systemd", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestUnit(t *testing.T) {
	analyze(t, "verify", "--man=no", "pillion@shop.service", "shop.service")
}

func TestExposure(t *testing.T) {
	out := analyze(t, "security", "--offline=true", "--no-pager", "pillion@shop.service")
	m := regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+)`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no level in:\n%s", out)
	}
	level, err := strconv.ParseFloat(m[1], 64)
	if err != nil || level > exposureMax {
		t.Errorf("exposure %s, want %.1f at most: %v\n%s", m[1], exposureMax, err, out)
	}
}

// TestReasons wants a comment above every block of the unit's [Service].
func TestReasons(t *testing.T) {
	_, service, _ := strings.Cut(unitText(t, "pillion@.service"), "[Service]\n")
	service, _, _ = strings.Cut(service, "[Install]")
	for block := range strings.SplitSeq(strings.TrimSpace(service), "\n\n") {
		if !strings.HasPrefix(block, "#") {
			t.Errorf("no reason stands above:\n%s", block)
		}
	}
}

// TestSlice wants the unit and the drop-in to mean the same slice.
func TestSlice(t *testing.T) {
	unit, drop := unitText(t, "pillion@.service"), unitText(t, "pillion.conf")
	for text, where := range map[string]string{
		"Requires=pillion-%i.slice": unit, "After=pillion-%i.slice": unit,
		"/sys/fs/cgroup/pillion.slice/pillion-%i.slice": unit,
		"Slice=pillion-%p.slice":                        drop, "After=pillion@%p.service": drop,
	} {
		if !strings.Contains(where, text) {
			t.Errorf("%q is missing in:\n%s", text, where)
		}
	}
}
