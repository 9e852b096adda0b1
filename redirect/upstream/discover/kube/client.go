package kube

import "github.com/pillion-project/pillion/redirect/upstream/discover"

// Client reads from one API server. It is safe for concurrent use.
type Client struct{ options Options }

// New returns a client, and an error for what can never work. It opens no
// connection; the files need not be there yet.
func New(o Options) (*Client, error) { return &Client{o}, nil }

// Close closes the connections. All that runs on the client must have ended.
func (c *Client) Close() {}

// Source returns a source of the endpoints of ref. Sources of one service share
// its watches.
func (c *Client) Source(ref Ref) discover.Source { return nil }
