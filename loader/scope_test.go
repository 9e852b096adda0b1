package loader

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/pillion-project/pillion/tests/testutil"
)

// A cgroup is found by its id with and without the right to open it by that,
// and so is that there is none.
func TestCgroupPath(t *testing.T) {
	testutil.CheckLeaks(t)
	root := testutil.CgroupRoot(t)
	top := testutil.NewCgroup(t)
	deep := top.Child(t, "a").Child(t, "b")
	for name, find := range map[string]func(root string, id uint64) (string, error){"by id": cgroupPath, "by search": searchCgroup} {
		if path, err := find(root, deep.ID); path != deep.Path || err != nil {
			t.Errorf("%s: %q, %v, want %s", name, path, err, deep.Path)
		}
		if path, err := find(root, 1<<60); !errors.Is(err, ErrNoScope) {
			t.Errorf("%s: %q, %v for none", name, path, err)
		}
	}
	// Who sees a part only cannot say that there is none.
	if path, err := searchCgroup(filepath.Dir(deep.Path), top.ID); err == nil || errors.Is(err, ErrNoScope) {
		t.Errorf("above what is seen: %q, %v", path, err)
	}
}

// TestFindScopeFile names a file of a cgroup, which is none.
func TestFindScopeFile(t *testing.T) {
	scope := testutil.NewCgroup(t)
	if s, err := FindScope(testutil.CgroupRoot(t), filepath.Join(scope.Path, "cgroup.procs")); !errors.Is(err, ErrNoScope) {
		t.Errorf("%+v, %v", s, err)
	}
}
