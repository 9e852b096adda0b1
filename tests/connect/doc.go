// Package connect holds the tests of what connect(2) gives an application: each
// runs in one world twice, without Pillion and with it, and whatever the
// application sees must be the same.
package connect
