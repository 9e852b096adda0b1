package webhook

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Certificate is a certificate and its key in two files, which are read again
// when they have changed. It is safe for concurrent use.
type Certificate struct {
	certFile, keyFile string
	log               *slog.Logger

	mu   sync.Mutex // orders looking at the files
	seen [2]stamp
	held *tls.Certificate
}

// stamp tells one content of a file from another.
type stamp struct {
	size, inode uint64
	changed     time.Time
}

// LoadCertificate reads the files for the first time.
func LoadCertificate(certFile, keyFile string, log *slog.Logger) (*Certificate, error) {
	c := &Certificate{certFile: certFile, keyFile: keyFile, log: log}
	if err := c.load(); err != nil {
		return nil, err
	}
	return c, nil
}

// Get returns the newest that is whole, for [tls.Config.GetCertificate]: files are
// looked at with every handshake, which costs two system calls, so that there is
// nobody who could have missed a change. Whoever is half-way through replacing them
// is not in the way.
func (c *Certificate) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	seen, err := c.look()
	if err == nil && seen == c.seen {
		return c.held, nil
	}
	if err == nil {
		err = c.load()
	}
	if err != nil {
		c.log.Warn("the certificate cannot be read again; the older one is used", "error", err)
	}
	return c.held, nil
}

func (c *Certificate) look() ([2]stamp, error) {
	var all [2]stamp
	for i, name := range []string{c.certFile, c.keyFile} {
		info, err := os.Stat(name)
		if err != nil {
			return all, fmt.Errorf("look at the certificate: %w", err)
		}
		all[i] = stamp{size: uint64(info.Size()), inode: inode(info), changed: info.ModTime()}
	}
	return all, nil
}

// load takes what the files have. The pair must belong together.
func (c *Certificate) load() error {
	// Looked at first: what changes meanwhile is read again.
	seen, err := c.look()
	if err != nil {
		return err
	}
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return fmt.Errorf("load the certificate: %w", err)
	}
	if pair.Leaf, err = x509.ParseCertificate(pair.Certificate[0]); err != nil {
		return fmt.Errorf("load the certificate: %w", err)
	}
	c.seen, c.held = seen, &pair
	c.log.Info("certificate loaded", "serial", pair.Leaf.SerialNumber.String(), "until", pair.Leaf.NotAfter)
	return nil
}
