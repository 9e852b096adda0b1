// Command apiserver is a Kubernetes API server, or the etcd that it keeps its
// objects in, for the tests of what reads the API. It is in a module of its own,
// so that nobody who builds Pillion fetches Kubernetes.
package main

import (
	"github.com/pillion-project/pillion/tests/kubernetes/server/etcd"
	"github.com/pillion-project/pillion/tests/kubernetes/server/serve"
	"github.com/spf13/cobra"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
)

func main() {
	serve.Main(map[string]func() *cobra.Command{
		"etcd":           etcd.Command,
		"kube-apiserver": apiserver.NewAPIServerCommand,
	})
}
