// Command server is a Kubernetes API server, or the etcd that it keeps its
// objects in, for the tests of what reads the API. It is a module of its own, so
// that nobody who builds Pillion fetches Kubernetes.
package main

import (
	"fmt"
	"io"
	"net/url"
	"os"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
	"k8s.io/component-base/cli"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: server kube-apiserver|etcd FLAGS")
		os.Exit(2)
	}
	go endWithStdin()
	name := os.Args[1]
	os.Args = os.Args[1:]
	switch name {
	case "kube-apiserver":
		os.Exit(cli.Run(apiserver.NewAPIServerCommand()))
	case "etcd":
		os.Exit(cli.Run(etcdCommand()))
	default:
		fmt.Fprintf(os.Stderr, "server: %s: not built in\n", name)
		os.Exit(2)
	}
}

// endWithStdin ends the process when whoever started it is gone, whatever way.
func endWithStdin() {
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(0)
}

// etcdCommand keeps its data without fsync: a test's data need not outlive it.
func etcdCommand() *cobra.Command {
	var dir, client, peer string
	c := &cobra.Command{Use: "etcd", RunE: func(*cobra.Command, []string) error {
		cfg := embed.NewConfig()
		cfg.Dir = dir
		clientURL, err := url.Parse(client)
		if err != nil {
			return err
		}
		peerURL, err := url.Parse(peer)
		if err != nil {
			return err
		}
		cfg.ListenClientUrls = []url.URL{*clientURL}
		cfg.AdvertiseClientUrls = cfg.ListenClientUrls
		cfg.ListenPeerUrls = []url.URL{*peerURL}
		cfg.AdvertisePeerUrls = cfg.ListenPeerUrls
		cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
		cfg.UnsafeNoFsync = true
		cfg.LogLevel = "warn"
		e, err := embed.StartEtcd(cfg)
		if err != nil {
			return err
		}
		return <-e.Err()
	}}
	c.Flags().StringVar(&dir, "data-dir", "", "where the data goes")
	c.Flags().StringVar(&client, "client", "", "the URL that clients reach it at")
	c.Flags().StringVar(&peer, "peer", "", "the URL that peers would reach it at")
	return c
}
