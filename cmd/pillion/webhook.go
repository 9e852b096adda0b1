package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"

	"github.com/pillion-project/pillion/cmd/pillion/webhook"
	"github.com/spf13/cobra"
)

type webhookFlags struct {
	injectFlags
	listen, cert, key string
	admit             bool
}

func newWebhook(g *global) *cobra.Command {
	f := &webhookFlags{}
	c := &cobra.Command{
		Use:   "webhook --cert FILE --key FILE",
		Short: "Put Pillion beside pods as a Kubernetes cluster creates them",
		Long: `Serves a mutating admission webhook, which does to pods what inject does to manifests.
It needs no privilege. Certificate and key are read again when their files have
changed. A pod that Pillion cannot stand beside is denied with the reason.`,
		Example: `  pillion webhook --cert /etc/webhook/tls.crt --key /etc/webhook/tls.key`,
		Args:    noArgs,
		RunE:    func(c *cobra.Command, _ []string) error { return serveWebhook(c.Context(), g, f) },
	}
	f.add(c)
	flags := c.Flags()
	flags.StringVar(&f.listen, "listen", ":8443", "where reviews are served, over TLS")
	flags.StringVar(&f.cert, "cert", "", "file of the certificate, with those between it and the CA's")
	flags.StringVar(&f.key, "key", "", "file of its key")
	flags.BoolVar(&f.admit, "admit-refused", false, "admit, with a warning and without Pillion, what it cannot stand beside")
	return c
}

// reviewersMost is how many connections there are to the webhook at once: API servers have
// a few each, and anybody in the cluster may connect.
const reviewersMost = 512

func serveWebhook(ctx context.Context, g *global, f *webhookFlags) error {
	log, err := g.logger(slog.LevelInfo)
	if err != nil {
		return err
	}
	defer outliveLog()()
	ctx, stop := heeding(ctx)
	defer stop()
	o, err := f.options()
	if err != nil {
		return err
	}
	if f.cert == "" || f.key == "" {
		return usage(errors.New("webhook: want --cert FILE and --key FILE: the API server speaks TLS only"))
	}
	cert, err := webhook.LoadCertificate(f.cert, f.key, log)
	if err != nil {
		return usage(err)
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", f.listen)
	if err != nil {
		return usage(fmt.Errorf("serve reviews: %w", err))
	}
	log.Info("serving", "address", ln.Addr().String(), "image", o.Image)
	return webhook.Serve(ctx, &bounded{Listener: ln, most: reviewersMost}, webhook.Options{Inject: o, Admit: f.admit, Log: log}, cert)
}
