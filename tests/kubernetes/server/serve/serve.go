// Package serve makes one command of several of Kubernetes'.
package serve

import (
	"fmt"
	"io"
	"maps"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
)

// Main runs the command that the first argument names. It ends with its standard
// input, but for kubectl, which reads manifests there.
func Main(commands map[string]func() *cobra.Command) {
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: COMMAND FLAGS, of", slices.Sorted(maps.Keys(commands)))
		os.Exit(2)
	}
	name := os.Args[1]
	os.Args = os.Args[1:]
	if name != "kubectl" {
		go endWithStdin()
	}
	os.Exit(cli.Run(commands[name]()))
}

// endWithStdin ends the process when whoever started it is gone, whatever way.
func endWithStdin() {
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(0)
}
