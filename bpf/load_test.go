package bpf

import (
	"errors"
	"testing"

	"github.com/cilium/ebpf"
)

func TestLoad(t *testing.T) {
	specs, err := Specs()
	if err != nil {
		t.Fatal(err)
	}
	var maps map[string]*ebpf.Map
	for _, s := range specs {
		for _,p:=range s.Programs { t.Log(p.Name,p.Type,p.AttachType,len(p.Instructions)) }
		c, err := ebpf.NewCollectionWithOptions(s, ebpf.CollectionOptions{MapReplacements: maps})
		if err != nil {
			var ve *ebpf.VerifierError
			if errors.As(err, &ve) {
				t.Fatalf("%+v", ve)
			}
			t.Fatal(err)
		}
		if maps == nil {
			maps = map[string]*ebpf.Map{}
			for n, m := range c.Maps {
				if n != ".rodata" {
					maps[n] = m
				}
			}
		}
	}
}
