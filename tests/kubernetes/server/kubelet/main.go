// Command kubelet is the kubelet alone, for the tests of pods.
package main

import (
	"context"

	"github.com/pillion-project/pillion/tests/kubernetes/server/serve"
	"github.com/spf13/cobra"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

func main() {
	serve.Main(map[string]func() *cobra.Command{
		"kubelet": func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) },
	})
}
