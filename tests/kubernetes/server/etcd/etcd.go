// Package etcd is the etcd that an API server keeps its objects in.
package etcd

import (
	"net/url"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
)

// Command keeps its data without fsync: a test's data need not outlive it.
func Command() *cobra.Command {
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
