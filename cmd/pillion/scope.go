package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/loader/probe"
)

const (
	// scopeAuto asks for the pod that this process is in.
	scopeAuto = "auto"
	// podUID is what the pod's uid is given by, from Kubernetes's downward API.
	podUID = "POD_UID"
	// podName begins the names of the instances of pods. Of a uid, 32 digits are
	// enough: those of podman are longer.
	podName = "pod-"

	// scopeLimit is how long a worker waits for the cgroup that the one before
	// captured, and scopeRetry how often it looks. Connections stand still meanwhile.
	scopeLimit = 10 * time.Second
	scopeRetry = 10 * time.Millisecond
)

// locate finds whose connections the flags ask for, and gives the plan the scope
// and the name. first tells that no application of the pod runs yet.
func (p *plan) locate(ctx context.Context, f *runFlags, first bool) error {
	find := p.locateCgroup
	if f.cgroup == "" || f.cgroup == scopeAuto {
		find = p.locatePod
	}
	if err := find(ctx, f, first); err != nil {
		return err
	}
	if f.name != "" {
		p.name = f.name
	}
	if err := loader.CheckName(p.name); err != nil {
		return usage(fmt.Errorf("--name: %w", err))
	}
	return nil
}

func (p *plan) locateCgroup(ctx context.Context, f *runFlags, _ bool) error {
	if err := probe.Required(ctx); err != nil {
		return &exitError{code: exitUnsupported, err: err}
	}
	var err error
	if p.cgroups, err = probe.CgroupRoot(); err != nil {
		return &exitError{code: exitUnsupported, err: err}
	}
	p.scope, err = loader.FindScope(p.cgroups, f.cgroup)
	// That of an earlier worker may be being made again just now.
	for end := time.Now().Add(scopeLimit); errors.Is(err, loader.ErrNoScope) && p.global.survival.revived() && time.Now().Before(end); {
		if !pauseFor(ctx, scopeRetry) {
			break
		}
		p.scope, err = loader.FindScope(p.cgroups, f.cgroup)
	}
	if err != nil {
		return usage(err)
	}
	p.name = nameOf(p.cgroups, p.scope.Path)
	return nil
}

func (p *plan) locatePod(ctx context.Context, _ *runFlags, first bool) error {
	if err := probe.RequiredInPod(ctx); err != nil {
		return &exitError{code: exitUnsupported, err: err}
	}
	var err error
	if p.pod, err = findPod(first); err != nil {
		return err
	}
	p.scope, p.name = p.pod.Scope, podName+p.pod.UID[:32]
	// Without a mount it is only not seen which other pods are gone.
	p.cgroups, _ = probe.CgroupRoot()
	return nil
}

func findPod(first bool) (*loader.Pod, error) {
	pod, err := loader.FindPod(loader.PodOptions{UID: os.Getenv(podUID), First: first})
	switch {
	case errors.Is(err, loader.ErrNoPod):
		return nil, usage(fmt.Errorf("%w; say which cgroup to capture with --cgroup PATH", err))
	case err != nil:
		return nil, &exitError{code: exitUnsupported, err: fmt.Errorf(
			"%w (it takes CAP_BPF and CAP_NET_ADMIN, and CAP_DAC_READ_SEARCH or a mount of the node's /sys/fs/cgroup; or say which cgroup to capture with --cgroup PATH)", err)}
	}
	return &pod, nil
}
