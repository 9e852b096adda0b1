package bpf

import (
	"errors"
	"maps"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/tests/testutil"
)

// kind is where a program can be attached.
type kind struct {
	Type   ebpf.ProgramType
	Attach ebpf.AttachType
}

// programs are all programs of the shipped objects.
var programs = map[string]kind{
	ProgConnect4:     {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect},
	ProgConnect6:     {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Connect},
	ProgGetpeername4: {ebpf.CGroupSockAddr, ebpf.AttachCgroupInet4GetPeername},
	ProgGetpeername6: {ebpf.CGroupSockAddr, ebpf.AttachCgroupInet6GetPeername},
	ProgGetsockname4: {ebpf.CGroupSockAddr, ebpf.AttachCgroupInet4GetSockname},
	ProgGetsockname6: {ebpf.CGroupSockAddr, ebpf.AttachCgroupInet6GetSockname},
	ProgBind4:        {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Bind},
	ProgBind6:        {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Bind},
	ProgRelease:      {ebpf.CGroupSock, ebpf.AttachCgroupInetSockRelease},
	ProgSockops:      {ebpf.SockOps, ebpf.AttachCGroupSockOps},
	ProgLookup:       {ebpf.SkLookup, ebpf.AttachSkLookup},
	ProgHold:         {ebpf.SchedCLS, ebpf.AttachNone},
	ProgInject:       {ebpf.SchedCLS, ebpf.AttachNone},
	ProgExplain:      {ebpf.SchedCLS, ebpf.AttachNone},
	ProgMove:         {ebpf.SchedCLS, ebpf.AttachNone},
	ProgMoveLive:     {ebpf.SchedCLS, ebpf.AttachNone},
	ProgAdd:          {ebpf.SchedCLS, ebpf.AttachNone},
	ProgAddUsage:     {ebpf.SchedCLS, ebpf.AttachNone},
}

// rodata is the map behind the knobs of one object.
const rodata = ".rodata"

// knobs are the variables of include/config.h.
var knobs = []string{"cfg_frame_tag", "cfg_moves", "cfg_netns", "cfg_scope", "cfg_scope_level", "cfg_slot4", "cfg_slot6"}

func mustSpecs(t *testing.T) []*ebpf.CollectionSpec {
	t.Helper()
	specs, err := Specs()
	if err != nil {
		t.Fatal(err)
	}
	return specs
}

// loadAll loads the objects over one set of maps, as the loader does, with
// the knobs of values. All of it ends with the test.
func loadAll(t *testing.T, values map[string]any) (map[string]*ebpf.Program, map[string]*ebpf.Map) {
	t.Helper()
	testutil.RequireRoot(t)
	progs, shared := map[string]*ebpf.Program{}, map[string]*ebpf.Map{}
	for _, spec := range mustSpecs(t) {
		for name, value := range values {
			if err := spec.Variables[name].Set(value); err != nil {
				t.Fatalf("set %s: %v", name, err)
			}
		}
		c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: shared})
		if ve, ok := errors.AsType[*ebpf.VerifierError](err); ok {
			t.Fatalf("load: %+v", ve)
		}
		if err != nil {
			t.Fatalf("load: %v", err)
		}
		t.Cleanup(c.Close)
		maps.Copy(progs, c.Programs)
		if len(shared) == 0 {
			maps.Copy(shared, c.Maps)
			delete(shared, rodata)
		}
	}
	return progs, shared
}

func TestProgramsOfTheObjects(t *testing.T) {
	got := map[string]kind{}
	for _, spec := range mustSpecs(t) {
		for name, p := range spec.Programs {
			got[name] = kind{p.Type, p.AttachType}
			if p.License != "Dual BSD/GPL" {
				t.Errorf("%s: licence %q", name, p.License)
			}
		}
	}
	if diff := cmp.Diff(programs, got); diff != "" {
		t.Errorf("the objects hold other programs (-want +got):\n%s", diff)
	}
}

// TestObjectsShareTheirMaps checks what makes one set of maps serve every object:
// all have the same, and in one layout. The knobs are each object's own.
func TestObjectsShareTheirMaps(t *testing.T) {
	type layout struct {
		Type                       ebpf.MapType
		Key, Value, Entries, Flags uint32
	}
	var first map[string]layout
	for _, spec := range mustSpecs(t) {
		got := map[string]layout{}
		for name, m := range spec.Maps {
			if name == rodata {
				continue
			}
			got[name] = layout{m.Type, m.KeySize, m.ValueSize, m.MaxEntries, m.Flags}
		}
		if first == nil {
			first = got
		}
		if diff := cmp.Diff(first, got); diff != "" {
			t.Errorf("two objects differ in their maps:\n%s", diff)
		}
		if diff := cmp.Diff(knobs, slices.Sorted(maps.Keys(spec.Variables))); diff != "" {
			t.Errorf("an object has other knobs (-want +got):\n%s", diff)
		}
	}
}

func TestEveryProgramLoads(t *testing.T) {
	testutil.CheckLeaks(t)
	progs, shared := loadAll(t, nil)
	for name, want := range programs {
		p := progs[name]
		if p == nil {
			t.Errorf("%s: not loaded", name)
			continue
		}
		info, err := p.Info()
		if err != nil {
			t.Fatalf("%s: read info: %v", name, err)
		}
		if info.Name != name || info.Type != want.Type {
			t.Errorf("%s: the kernel shows %s of type %v, want type %v", name, info.Name, info.Type, want.Type)
		}
	}
	for name, m := range shared {
		info, err := m.Info()
		if err != nil {
			t.Fatalf("map %s: read info: %v", name, err)
		}
		if info.Name != name {
			t.Errorf("map %s: the kernel shows %s", name, info.Name)
		}
	}
}
