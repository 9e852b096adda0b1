// Command image writes Pillion's container image: an OCI layout for several
// architectures, and the same as one archive. It needs Go and git alone, and
// gives the same bytes for the same commit and the same Go.
//
// Each architecture's image has one layer with one file, the static binary. What
// that was built of is told by an SPDX document beside each image, attached to
// it as BuildKit does it.
package main
