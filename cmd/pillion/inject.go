package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/pillion-project/pillion/cmd/pillion/inject"
	"github.com/spf13/cobra"
)

// imageName is where the project's images are.
const imageName = "ghcr.io/pillion-project/pillion"

// injectFlags are those that inject and webhook have in common.
type injectFlags struct {
	inject.Options
	form string
}

func (f *injectFlags) add(c *cobra.Command) {
	f.Version = buildVersion()
	flags := c.Flags()
	flags.StringVar(&f.Image, "image", imageName+":"+strings.ReplaceAll(f.Version, "+", "-"), "image of the containers")
	flags.StringVar(&f.form, "form", string(inject.Sidecar), "sidecar: an init container that goes on (Kubernetes 1.29); or container: one among the others")
	flags.StringVar(&f.ConfigMap, "config-map", "pillion", "ConfigMap with the configuration, in pillion.yaml")
	flags.BoolVar(&f.HostNetwork, "allow-host-network", false, "also pods in the node's network namespace")
	flags.BoolVar(&f.CgroupMount, "cgroup-mount", false, "find the pod by a mount of the node's /sys/fs/cgroup, without CAP_DAC_READ_SEARCH; needed where the node has cgroup v1 beside v2")
}

// options returns what the flags say, if it makes sense.
func (f *injectFlags) options() (inject.Options, error) {
	o := f.Options
	o.Form = inject.Form(f.form)
	return o, usage(o.Check())
}

func newInject() *cobra.Command {
	f := &injectFlags{}
	var file string
	c := &cobra.Command{
		Use:   "inject -f FILE",
		Short: "Put Pillion beside the pods of a Kubernetes manifest",
		Long: `Reads a manifest (YAML of one or more documents, or JSON) and writes it with Pillion
beside the pods of every Pod, Deployment, ReplicaSet, ReplicationController, StatefulSet,
DaemonSet, Job and CronJob, also in a List. Lines that it does not have to change stay as they are,
comments and order too. Done again, it changes nothing; by another version, what
was added is replaced. A workload that Pillion cannot stand beside is refused with
the reason, and then nothing is written. A pod with the annotation
` + inject.Inject + `: "false" is left alone.`,
		Example: `  pillion inject -f deployment.yaml | kubectl apply -f -`,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) > 0 && file == "" {
				return usage(fmt.Errorf("inject: the manifest is named by -f: -f %s", args[0]))
			}
			return noArgs(c, args)
		},
		RunE: func(c *cobra.Command, _ []string) error {
			o, err := f.options()
			if err != nil {
				return err
			}
			return injectManifest(c, o, file)
		},
	}
	f.add(c)
	c.Flags().StringVarP(&file, "file", "f", "", "the manifest; - is standard input")
	return c
}

func injectManifest(c *cobra.Command, o inject.Options, file string) error {
	var text []byte
	var err error
	switch file {
	case "":
		return usage(errors.New("inject: which manifest? -f FILE, or -f - for standard input"))
	case "-":
		text, err = io.ReadAll(c.InOrStdin())
	default:
		text, err = os.ReadFile(file)
	}
	if err != nil {
		return usage(fmt.Errorf("read the manifest: %w", err))
	}
	out, results, err := o.Manifest(text)
	if err != nil {
		return usage(fmt.Errorf("inject %s: %w", file, err))
	}
	if _, err := c.OutOrStdout().Write(out); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	// Of the output, whatever reads it next wants the manifest alone.
	said := "no workload in it"
	if len(results) > 0 {
		var all []string
		for _, r := range results {
			what := "as it was"
			if r.Changed {
				what = "injected"
			}
			all = append(all, r.Workload+" "+what)
		}
		said = strings.Join(all, ", ")
	}
	_, err = fmt.Fprintf(c.ErrOrStderr(), "pillion: %s: %s\n", file, said)
	return err
}
